"""Arrays inside masks: what makes them the same, and how they reach the host.

A mask is a value, an array is memory that somebody may write to. Two rules join them:

- *Integers* (document ids, tree parents, offsets) that lie in host memory are **copied**, and compare by content. The
  hash reads at most 32 elements, so that hashing a mask of a million ids costs microseconds.
- *Booleans* of a `Dense` mask, and everything that lies on an accelerator, are **never hashed or compared by content**
  (that would read N×M bytes, or wait for the device, on every call). Such an array is the memory that it looks at:
  device, address, shape, strides, and the version that PyTorch counts up with each in-place write. Two views of one
  tensor are equal; a tensor written to since is another array. NumPy booleans are copied first, since NumPy counts
  no versions.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from tilewise.errors import bad_type, bad_value

_HASHED = 32


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor, asked without importing torch."""
    return hasattr(value, "data_ptr") and hasattr(value, "is_inference")


def looked_at(tensor: Any) -> tuple[tuple[object, ...], Any]:
    """(identity, owner) of a tensor: what stands for its memory at its version, and the object that keeps it alive.

    Inference tensors count no versions: each look at one is then an identity of its own.
    """
    stamp = object() if tensor.is_inference() else tensor._version
    owner = tensor if tensor._base is None else tensor._base
    layout = tuple(tensor.shape), tensor.stride(), str(tensor.dtype)
    return (str(tensor.device), tensor.data_ptr(), *layout, stamp), owner


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view whose base is the array: PyTorch takes only writable memory, everyone else gets the view."""
    view = array.view()
    view.flags.writeable = False
    return view


class Held:
    """A read-only array of a mask; build it with `Held.integers` or `Held.booleans`.

    `shape` is known without reading the array; `device` is "cpu" or the accelerator's name ("cuda:0").
    `source` is the torch tensor that it looks at (None for a copy); `owner` is the object whose death ends the
    memory's life, for weak references in caches.
    """

    __slots__ = ("_host", "_identity", "_tensor", "_version", "argument", "device", "owner", "shape", "source")

    argument: str
    shape: tuple[int, ...]
    device: str
    source: Any
    owner: Any

    def __init__(self, argument: str, host: np.ndarray | None, source: Any, by_content: bool) -> None:
        self.argument = argument
        self.source = source
        self._host = host
        self._tensor = source
        self._version: int | None = None
        self._identity: tuple[object, ...] | None = None
        torch = sys.modules.get("torch")
        if source is None and host is not None and torch is not None:
            # Ready before anything is traced: torch.compile reads this attribute, but cannot look into NumPy.
            self._tensor = torch.from_numpy(host.base)
        array: Any = source if source is not None else host
        self.shape = tuple(int(size) for size in array.shape)
        self.device = "cpu" if source is None else str(source.device)
        self.owner = array
        if source is not None:
            self._identity, self.owner = looked_at(source)
            self._version = None if source.is_inference() else source._version
        elif not by_content:
            assert host is not None
            # As `looked_at` would say of a torch tensor on this memory: a boolean is one byte, so strides agree.
            self._identity = (self.device, host.ctypes.data, self.shape, host.strides, "torch.bool", 0)

    @classmethod
    def integers(cls, value: Any, argument: str, ndims: tuple[int, ...]) -> Held:
        """Ids, parents or offsets: a sequence, an integer array or an integer tensor with one of `ndims` dimensions."""
        if isinstance(value, Held):
            return value
        source = None
        if is_tensor(value):
            kind = str(value.dtype)
            integral = not (value.is_floating_point() or value.is_complex() or kind == "torch.bool")
            host = None
            if value.device.type != "cpu":
                source = value
            elif integral:
                host = value.numpy().astype(np.int64)
        else:
            array = np.asarray(value)
            kind, integral = str(array.dtype), array.dtype.kind in "iu" or array.size == 0
            host = array.astype(np.int64) if integral else None
        if not integral:
            raise bad_type(argument, f"{kind} values", "integers")
        held = cls(argument, None if host is None else _frozen(host), source, by_content=True)
        if len(held.shape) not in ndims:
            wanted = " or ".join(str(n) for n in ndims)
            raise bad_value(argument, f"shape {list(held.shape)}", f"{wanted} dimensions")
        return held

    @classmethod
    def booleans(cls, value: Any, argument: str) -> Held:
        """The content of a dense mask: a boolean array (copied) or a boolean tensor (looked at)."""
        if isinstance(value, Held):
            return value
        fix = "True = attend; an additive mask of −∞ and 0 goes to `bias`, or compare: `mask == 0`"
        if is_tensor(value):
            if str(value.dtype) != "torch.bool":
                raise bad_type(argument, f"a {value.dtype} tensor", "a boolean one", fix)
            return cls(argument, None, value, by_content=False)
        array = np.array(value)
        if array.dtype != np.bool_:
            raise bad_type(argument, f"a {array.dtype} array", "a boolean one", fix)
        return cls(argument, _frozen(array), None, by_content=False)

    @property
    def on_device(self) -> bool:
        """Whether reading the values from the host would wait for an accelerator."""
        return self.device != "cpu"

    @property
    def identity(self) -> object:
        """What stands for this array in a cache's key: holds no tensor, so that a cache keeps no memory alive."""
        return self if self._identity is None else self._identity

    @property
    def cacheable(self) -> bool:
        return self.source is None or self._version is not None

    def current(self) -> Any:
        """The tensor looked at, or the host array; raises ValueError if the tensor was written to since."""
        if self.source is None:
            return self._host
        if self._version is not None and self.source._version != self._version:
            got = f"a tensor written to since the mask was made (version {self._version} → {self.source._version})"
            raise bad_value(self.argument, got, "an unchanged one", "make a new mask after writing to the tensor")
        return self.source

    def host(self) -> np.ndarray:
        """The values in host memory; from an accelerator this copies and waits."""
        array = self.current()
        if not is_tensor(array):
            return array
        if not self.on_device:
            return array.numpy()
        if self._host is None:
            host = array.cpu().numpy()
            self._host = host if host.dtype == np.bool_ else host.astype(np.int64)
        return self._host

    @property
    def as_made(self) -> Any:
        """The tensor as it was when the mask was made, with no look at its version; None if torch came later."""
        return self._tensor

    def tensor(self, make: Any) -> Any:
        """The values as a torch tensor; `make` (torch.from_numpy) turns a host copy into one, once."""
        if self.source is not None:
            return self.current()
        if self._tensor is None:
            assert self._host is not None
            self._tensor = make(self._host.base)
        return self._tensor

    def _sample(self) -> tuple[int, ...]:
        assert self._host is not None
        flat = self._host.reshape(-1)
        return tuple(flat[:: max(1, flat.size // _HASHED)].tolist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Held):
            return NotImplemented
        if self is other:
            return True
        if self._identity is not None or other._identity is not None:
            return self._identity == other._identity
        return self.shape == other.shape and bool(np.array_equal(self.host(), other.host()))

    def __hash__(self) -> int:
        if self._identity is not None:
            return hash(self._identity)
        return hash((self.shape, self._sample()))

    def __reduce__(self) -> tuple[Any, ...]:
        # An identity names an address and a version, which are not those of a copy: it is made anew.
        values = self.current()
        if "bool" in str(values.dtype):
            return Held.booleans, (values, self.argument)
        return Held.integers, (values, self.argument, (len(self.shape),))

    def __repr__(self) -> str:
        return f"<{self.argument} {list(self.shape)} on {self.device}>"
