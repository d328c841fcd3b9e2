"""The few things that Gluon lacks or names differently from version to version: the only file that knows its Triton.

Checked with Triton 3.6.0 to 3.9.0. The kernels import everything that touches the hardware from here.
"""

# Kernel functions are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import PropagateNan, _aggregate, base_value

__all__ = [
    "RAGGED",
    "Address",
    "at_most_zero",
    "barrier_arrive",
    "barrier_sync",
    "box_descriptor",
    "constexpr_function",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "record",
    "reinterpret",
    "shared_layout",
    "store_wait",
    "tensor_descriptor",
    "tile_descriptor",
    "tile_place",
    "tma_load",
    "tma_reduce_add",
    "tma_store",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

ALL_NANS = gl.constexpr(PropagateNan.ALL)

tensor_descriptor = tma.tensor_descriptor
"""What a descriptor is inside a kernel."""

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""Copy engine, global to shared memory: (descriptor, coordinates, mbarrier, buffer). Named `async_load` from 3.8 on."""

tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
"""Copy engine, shared to global memory: (descriptor, coordinates, buffer)."""


@builtin
def _reduce_add(descriptor: Any, coordinates: Any, buffer: Any, _semantic: Any = None) -> None:
    place = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, place, buffer.handle)


@builtin
def reinterpret(buffer: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """A buffer's bytes as another type, shape and layout. A method until 3.7 with, from 3.8 without an underscore."""
    plain = [getattr(size, "value", size) for size in shape]
    return _semantic.memdesc_reinterpret(
        buffer, getattr(dtype, "value", dtype), plain, getattr(layout, "value", layout)
    )


tma_reduce_add = getattr(tma, "async_atomic_add", None) or _reduce_add
"""Copy engine: add a buffer to global memory, in L2 and in no fixed order. Gluon knows it from 3.8 on."""

store_wait = tma.store_wait
"""Wait until at most n of this thread's stores still read their shared memory."""


def record(cls: type) -> Any:
    """Make an annotated class a value of kernels, made from its fields in order.

    The fields of 3.6's aggregates are set by hand; newer ones bring this along. Annotations must not be strings.
    """
    names = tuple(cls.__annotations__)

    def __init__(self: Any, *values: Any) -> None:  # noqa: N807  (becomes the class's own)
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value if isinstance(value, base_value) else gl.constexpr(value))

    for owner, name, value in ((__init__, "__triton_builtin__", True), (cls, "__init__", __init__)):
        setattr(owner, name, value)
    return _aggregate(cls)


@constexpr_function
def _barrier_code(kind: str, threads: int) -> str:
    return f"bar.{kind} $1, {threads}; mov.b32 $0, 0;"


@gluon.jit
def barrier_sync(barrier, THREADS: gl.constexpr):
    """Wait at hardware barrier `barrier` until THREADS threads have come, this warpgroup's 128 among them.

    Triton keeps barriers 0 to 1 + partitions for itself (5 at most here); kernels use 6 to 15. Against `mbarrier`: no
    phase to carry, and no thread to elect for the arrival, which would need a barrier of its own.
    """
    gl.inline_asm_elementwise(_barrier_code("sync", THREADS), "=r,r", [barrier], gl.int32, False, 1)


@gluon.jit
def barrier_arrive(barrier, THREADS: gl.constexpr):
    """Count this warpgroup's 128 threads in at hardware barrier `barrier`, and go on."""
    gl.inline_asm_elementwise(_barrier_code("arrive", THREADS), "=r,r", [barrier], gl.int32, False, 1)


@gluon.jit
def at_most_zero(x):
    """min(x, 0), and NaN where x is NaN, which the plain minimum would lose."""
    return gl.minimum(x, 0.0, propagate_nan=ALL_NANS)


_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@cache
def shared_layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory for the copy engine and the tensor cores: swizzled."""
    return gl.NVMMASharedLayout.get_default_for(list(box), _TYPES[dtype])


FLAT = gl.NVMMASharedLayout(0, 32, 2)
"""Of boxes of float32 that only the copy engine and plain loads touch: rows one after the other."""


class Address(NamedTuple):
    """What a descriptor needs of its tensor. It does not keep the tensor alive, so descriptors may be cached."""

    pointer: int
    dtype: Any

    def data_ptr(self) -> int:
        return self.pointer


def box_descriptor(x: Tensor, shape: list[int], strides: list[int], box: list[int], layout: Any) -> TensorDescriptor:
    """A copy-engine descriptor of any view of x's memory, in boxes."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(
        base=Address(x.data_ptr(), x.dtype),
        shape=shape,
        strides=strides,
        block_shape=box,
        layout=layout,
        padding="zero",
        round_f32_to_tf32=False,
    )
    return descriptor


RAGGED = gl.constexpr(1 << 30)
"""The virtual end of every packed sequence; see `tile_descriptor`."""


def tile_descriptor(x: Tensor, strides: list[int], rows: int, columns: int, packed: bool = False) -> TensorDescriptor:
    """A copy-engine descriptor of x [B, H, N, D] in tiles of one head's rows × columns; `tile_place` gives coordinates.

    What is out of range reads as 0 and is not written. The caller has checked what the copy engine wants: a base and
    strides in multiples of 16 bytes, and no empty dim.

    Packed sequences must not see each other, and a descriptor has only one end: so the token dim is written three
    times, with coordinates (2³⁰, first + length, 2³⁰ − length + row) and strides (2³⁴ − s, s, s). Their sum is the
    address of token first + row modulo 2⁶⁴ bytes, as 2³⁰·2³⁴ elements vanish, and the last coordinate reaches its end,
    2³⁰, exactly where the sequence does (the trick of Triton's own ragged descriptors).
    """
    shape, box = list(x.shape), [1, 1, rows, columns]
    if packed:
        tokens = strides[2]
        shape = [0x7FFF0000, 0x7FFF0000, shape[1], RAGGED.value, shape[3]]
        strides = [(1 << 34) - tokens, tokens, strides[1], tokens, 1]
        box = [1, *box]
    return box_descriptor(x, shape, strides, box, shared_layout(tuple(box), x.dtype))


@gluon.jit
def tile_place(batch, head, row, first, length, PACKED: gl.constexpr):
    """Coordinates of a row in a descriptor of `tile_descriptor`: row `row` of the sequence of `length` at `first`."""
    if PACKED:  # noqa: SIM108  (a branch on a compile-time constant is no expression of two types)
        place = (RAGGED, first + length, head, RAGGED - length + row, 0)
    else:
        place = (batch, head, row, 0)
    return place
