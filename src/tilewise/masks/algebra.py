"""Masks as values: which query may see which key, said by parameters instead of a matrix or a callback.

With i a query row, j a key column and `p = i + offset` the position of the row among the keys (offset is M − N where
none is given: the last row stands at the last key), each value below is the set of pairs that its docstring states.
Values are frozen, hashable and printable, are equal when their parameters mean the same, and combine with `&`, `|`,
`~` and `PerHead`. `str(mask)` is its canonical expression (expression.py reads it back); arrays stand in it as
placeholders $0, $1, …, in the order of `mask.arrays`. Nothing here imports torch.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewise.errors import bad_type, bad_value
from tilewise.masks.arrays import Held
from tilewise.masks.frame import Grid, joint

if TYPE_CHECKING:
    from tilewise.masks.draw import Picture
    from tilewise.masks.tensors import TileTensors
    from tilewise.masks.tilemap import TileMap


class Mask(ABC):
    """A set of (query, key) pairs that may attend. Immutable.

    Methods take sizes: n query rows, m keys, and by keyword the `offset` (int or integers [B]; None is m − n) and the
    number of `heads` (None: as many as the mask itself names; it matters to `Random`, which draws each head apart).
    """

    batch: int = 1
    """How many sequences the mask tells apart (1: all alike)."""
    heads: int | None = None
    """How many heads the mask names (None: any number)."""
    by_head: bool = False
    """Whether heads differ although the mask names no number of them."""

    @abstractmethod
    def allow(self, grid: Grid) -> Any:
        """The predicate on a grid of pairs, boolean; `PerHead` wants `grid.h` to be an int."""

    def check(self, n: int, m: int) -> None:
        """Raises ValueError if the mask does not fit n rows and m keys."""
        del n, m

    @abstractmethod
    def _write(self, arrays: list[Held]) -> str:
        """The expression; arrays that it mentions are appended to `arrays`."""

    @property
    @abstractmethod
    def _meaning(self) -> object:
        """A hashable value that is equal for equal masks."""

    @property
    def _written(self) -> tuple[str, tuple[Held, ...]]:
        # Not a cached_property: before Python 3.12 that takes a lock, which torch.compile cannot trace.
        known = self._written_once
        if known is None:
            arrays: list[Held] = []
            known = self._write(arrays), tuple(arrays)
            self._set(_written_once=known)
        return known

    _written_once: tuple[str, tuple[Held, ...]] | None = None
    _hash_once: int | None = None

    @property
    def arrays(self) -> tuple[Held, ...]:
        """The arrays that the placeholders $0, $1, … of `str(mask)` stand for."""
        return self._written[1]

    @property
    def _hash(self) -> int:
        known = self._hash_once
        if known is None:
            known = hash(self._meaning)
            self._set(_hash_once=known)
        return known

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"masks are values: cannot set {name}")

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        # Another process hashes strings and types to other numbers.
        return {name: value for name, value in self.__dict__.items() if name not in ("_hash_once", "_written_once")}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self is other or (self._hash == other._hash and self._meaning == other._meaning)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self._written[0]

    def __repr__(self) -> str:
        return f"<mask {self}>"

    def __and__(self, other: Mask) -> Mask:
        return _gather(And, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _gather(Or, self, other)

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        # `a and b` would be b without a word.
        raise bad_type("mask", "a mask as a truth value", "`&`, `|` and `~` where Python says and, or, not")

    def to_dense(self, n: int, m: int, *, offset: Any = None, heads: int | None = None) -> np.ndarray:
        """The boolean matrix [n, m], with leading [H] or [B, 1|H] only where the mask has heads or sequences.

        Straight from the predicate, by rows; it shares nothing with the tile map but the predicate.
        """
        from tilewise.masks.compiler import dense

        return dense(self, n, m, offset, heads)

    def tile_map(
        self, n: int, m: int, device: Any = None, *, offset: Any = None, heads: int | None = None
    ) -> TileMap | TileTensors:
        """The mask compiled to 128×128 tiles: NumPy arrays, or torch tensors on `device` where one is given."""
        if device is not None:
            from tilewise.masks import tensors

            return tensors.tile_map(self, n, m, offset=offset, device=device, heads=heads)
        from tilewise.masks.compiler import tile_map

        return tile_map(self, n, m, offset=offset, heads=heads)

    def sparsity(self, n: int, m: int, *, offset: Any = None, heads: int | None = None) -> float:
        """The fraction of pairs that may not attend, in [0, 1]; counted on the tile map, never on a matrix."""
        from tilewise.masks.compiler import tile_map

        return tile_map(self, n, m, offset=offset, heads=heads).sparsity

    def show(self, n: int, m: int, *, offset: Any = None, heads: int | None = None) -> Picture:
        """A picture: `str()` of it is Unicode, `.svg()` an inline SVG."""
        from tilewise.masks.draw import Picture

        return Picture.of(self, n, m, offset=offset, heads=heads)


class Combination(Mask):
    """What `And` and `Or` share: a tuple of masks of which the order does not matter."""

    masks: tuple[Mask, ...]
    symbol: str

    def __init__(self, masks: tuple[Mask, ...]) -> None:
        named = [mask.heads for mask in masks if mask.heads is not None]
        self._set(
            masks=masks,
            batch=joint("mask", [mask.batch for mask in masks], "sequences"),
            heads=joint("mask", named, "heads") if named else None,
            by_head=any(mask.by_head for mask in masks),
        )

    def check(self, n: int, m: int) -> None:
        for mask in self.masks:
            mask.check(n, m)

    def _write(self, arrays: list[Held]) -> str:
        parts = []
        for mask in self.masks:
            text = mask._write(arrays)
            parts.append(f"({text})" if isinstance(mask, Combination) else text)
        return f" {self.symbol} ".join(parts)

    @property
    def _meaning(self) -> object:
        return (type(self), frozenset(self.masks))


class And(Combination):
    """Pairs in all of the masks; made by `a & b`."""

    symbol = "&"

    def allow(self, grid: Grid) -> Any:
        return reduce(operator.and_, (mask.allow(grid) for mask in self.masks))


class Or(Combination):
    """Pairs in any of the masks; made by `a | b`."""

    symbol = "|"

    def allow(self, grid: Grid) -> Any:
        return reduce(operator.or_, (mask.allow(grid) for mask in self.masks))


class Not(Mask):
    """Pairs not in the mask; made by `~a`."""

    mask: Mask

    def __init__(self, mask: Mask) -> None:
        self._set(mask=mask, batch=mask.batch, heads=mask.heads, by_head=mask.by_head)

    def allow(self, grid: Grid) -> Any:
        return ~self.mask.allow(grid)

    def check(self, n: int, m: int) -> None:
        self.mask.check(n, m)

    def _write(self, arrays: list[Held]) -> str:
        text = self.mask._write(arrays)
        return f"~({text})" if isinstance(self.mask, Combination) else f"~{text}"

    @property
    def _meaning(self) -> object:
        return (Not, self.mask)


class PerHead(Mask):
    """Head h sees by `masks[h]`: one mask a query head, none of them a `PerHead` itself."""

    masks: tuple[Mask, ...]

    def __init__(self, masks: Iterable[Mask]) -> None:
        each = tuple(masks)
        if not each:
            raise bad_value("masks", "no masks", "one mask a head")
        for mask in each:
            if not isinstance(mask, Mask):
                raise bad_type("masks", mask, "masks", "wrap a boolean tensor in `Dense`")
            if mask.heads is not None:
                got = f"a mask that already names {mask.heads} heads"
                raise bad_value("masks", got, "masks of one head each", "split it: PerHead takes one mask a head")
        self._set(masks=each, batch=joint("masks", [mask.batch for mask in each], "sequences"), heads=len(each))

    def allow(self, grid: Grid) -> Any:
        return self.masks[grid.h].allow(grid)

    def check(self, n: int, m: int) -> None:
        for mask in self.masks:
            mask.check(n, m)

    def _write(self, arrays: list[Held]) -> str:
        return f"per_head({', '.join(mask._write(arrays) for mask in self.masks)})"

    @property
    def _meaning(self) -> object:
        return (PerHead, self.masks)


def _gather(kind: type[Combination], left: Mask, right: Mask) -> Mask:
    """`left kind right` with nested operands of the same kind and repeated ones taken out."""
    if not isinstance(right, Mask):
        if hasattr(right, "dtype"):
            raise bad_type("mask", right, "a mask", "wrap a boolean tensor in `Dense`")
        return NotImplemented
    parts = [part for side in (left, right) for part in (side.masks if type(side) is kind else (side,))]
    distinct = tuple(dict.fromkeys(parts))
    return distinct[0] if len(distinct) == 1 else kind(distinct)
