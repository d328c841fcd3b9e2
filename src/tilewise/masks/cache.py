"""A bounded cache for what is worked out from masks, which keeps no tensor alive."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from tilewise.masks.algebra import Mask
from tilewise.masks.frame import Frame

T = TypeVar("T")


class Cache(Generic[T]):
    """Values by key, least recently used out first.

    An entry also leaves when one of its owners dies: a key that names a tensor's address means nothing after that.

    Args:
        entries: the most values kept.
        nbytes: the most bytes that they may have together; a larger value is returned and not kept.
        size: the bytes of a value.
    """

    def __init__(self, entries: int, nbytes: int, size: Callable[[T], int]) -> None:
        self._entries, self._nbytes, self._size = entries, nbytes, size
        self._lock = threading.RLock()
        self._values: OrderedDict[Hashable, tuple[T, int, list[Any]]] = OrderedDict()
        self._held_bytes = 0

    def get(self, key: Hashable, owners: Sequence[Any], build: Callable[[], T]) -> T:
        """The value for `key`, built if it is not there."""
        with self._lock:
            known = self._values.get(key)
            if known is not None:
                self._values.move_to_end(key)
                return known[0]
        value = build()
        size = self._size(value)
        with self._lock:
            if size <= self._nbytes and key not in self._values:
                watch = [weakref.ref(owner, lambda _: self._drop(key)) for owner in owners]
                self._values[key] = (value, size, watch)
                self._held_bytes += size
                while len(self._values) > self._entries or self._held_bytes > self._nbytes:
                    self._drop(next(iter(self._values)))
        return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def _drop(self, key: Hashable) -> None:
        with self._lock:
            known = self._values.pop(key, None)
            if known is not None:
                self._held_bytes -= known[1]


def cached(cache: Cache[T], mask: Mask, frame: Frame, build: Callable[[], T], extra: Hashable = None) -> T:
    """What `build` makes of a mask in a frame: keyed by its expression and its arrays' identities."""
    arrays = mask.arrays if isinstance(frame.offset, int) else (*mask.arrays, frame.offset)
    if not arrays:
        return cache.get((str(mask), frame, extra), (), build)
    if not all(array.cacheable for array in arrays):
        return build()
    identities = tuple(array.identity for array in arrays)
    # Integers on the host are their own identity: compared by content, and the key holds their copy.
    owners = [array.owner for array in arrays if array.identity is not array]
    offset = frame.offset if isinstance(frame.offset, int) else None
    return cache.get((str(mask), identities, frame.n, frame.m, offset, frame.batch, frame.heads, extra), owners, build)
