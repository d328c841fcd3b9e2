"""Run the Hopper kernels' own source on a CPU, with NumPy for registers and threads for warpgroups.

machine.py models the device. CTAs run one after the other. Float16 only.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from machine import (
    CTA,
    HERE,
    Barrier,
    Descriptor,
    Scheduler,
    Value,
    Warpgroup,
    allocate,
    barrier_arrive,
    barrier_sync,
    fence,
    integer,
    reinterpret,
    storage,
    store_wait,
    tma_load,
    tma_store,
    value,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from torch import Tensor
from triton.language import constexpr
from triton.runtime.jit import ConstexprFunction, JITFunction

from tilewise.backends.hopper import forward, launch, primitives


class Pointer:
    """Addresses inside a tensor's storage, in elements."""

    def __init__(self, memory: np.ndarray, at: Any) -> None:
        self.memory, self.at, self.dtype = memory, at, SimpleNamespace(element_ty=memory.dtype.type)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + np.asarray(offset).astype(np.int64))

    def __sub__(self, offset: Any) -> Pointer:
        return self + -np.asarray(offset)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        at, live = np.broadcast_arrays(self.at, True if mask is None else np.asarray(mask))
        assert ((at >= 0) & (at < len(self.memory)))[live].all(), "an address outside its tensor"
        return at, live


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    at, live = pointer.places(mask)
    undefined = np.nan if pointer.memory.dtype.kind == "f" else np.iinfo(np.int32).max
    held = pointer.memory[np.where(live, at, 0)] if len(pointer.memory) else 0
    return value(np.where(live, held, undefined if other is None else np.asarray(other)), pointer.memory.dtype)


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    at, live = pointer.places(mask)
    pointer.memory[at[live]] = np.broadcast_to(np.asarray(x), at.shape)[live]


def atomic_add(pointer: Pointer, x: Any, sem: str) -> Any:
    before = load(pointer)
    store(pointer, before + x)
    return before


def warp_specialize(partitions: list[Any], _warps: Any, _registers: Any) -> None:
    def task(function: Any, arguments: Any) -> None:
        HERE.own = Warpgroup()
        CTA.warpgroups.append(HERE.own)
        with np.errstate(all="ignore"):
            function(*arguments)

    CTA.scheduler.run([lambda f=function, a=arguments: task(f, a) for function, arguments in partitions])


def linear_order(bases: list[list[int]], _blocks: Any, _alignment: int) -> np.ndarray:
    """Which element of a [64, 64] tile lies where, by the bits of the place."""
    places = np.arange(1 << len(bases))
    bits = [(places >> bit & 1)[:, None] * np.array(base) for bit, base in enumerate(bases)]
    rows, columns = sum(bits).T
    return rows * 64 + columns


def where(condition: Any, x: Any, y: Any) -> Any:
    both = isinstance(x, int) and isinstance(y, int)
    return value(np.where(np.asarray(condition), *(np.asarray(z) if isinstance(z, Value) else z for z in (x, y))),
                 np.int32 if both else None)  # fmt: skip


def _layout(*_: Any) -> None:
    return None


_layout.get_default_for = _layout

LANGUAGE = SimpleNamespace(
    constexpr=lambda x: x, tensor=None, shared_memory_descriptor=None, static_range=range,
    int32=np.int32, int64=np.int64, float32=np.float32, float16=np.float16,
    NVMMADistributedLayout=_layout, DotOperandLayout=_layout, SliceLayout=_layout, BlockedLayout=_layout,
    SwizzledSharedLayout=_layout, NVMMASharedLayout=_layout, SharedLinearLayout=linear_order,
    program_id=lambda axis: integer(CTA.program[axis]), num_programs=lambda axis: integer(CTA.grid[axis]),
    load=load, store=store, atomic_add=atomic_add, where=where,
    minimum=lambda x, y: value(np.fmin(x, y)), maximum=lambda x, y: value(np.fmax(x, y)),
    cdiv=lambda x, y: (x + (y - 1)) // y, abs=np.abs, exp2=np.exp2, log2=np.log2,
    max=lambda x, axis: value(np.max(np.asarray(x), axis)),
    sum=lambda x, axis: value(np.sum(np.asarray(x), axis), x.dtype),
    arange=lambda start, stop, layout=None: value(np.arange(start, stop), np.int32),
    zeros=lambda shape, dtype, layout=None: value(np.zeros(shape), dtype),
    full=lambda shape, x, dtype, layout=None: value(np.full(shape, x), dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    reshape=lambda x, shape: x.reshape(shape), permute=lambda x, order: x.transpose(order),
    inline_asm_elementwise=lambda *_: integer(0), allocate_shared_memory=allocate, warp_specialize=warp_specialize,
)  # fmt: skip

REPLACED = {
    "gl": LANGUAGE, "tl": LANGUAGE, "reinterpret": reinterpret, "tma_load": tma_load, "store_wait": store_wait,
    "tma_store": tma_store, "tma_reduce_add": partial(tma_store, add=True),
    "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait, "fence_async_shared": fence,
    "at_most_zero": lambda x: value(np.minimum(x, 0.0), x.dtype),
    "barrier_arrive": barrier_arrive, "barrier_sync": barrier_sync,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "mbarrier", init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, count: barrier.add(arrivals=1, expected=count),
        arrive=lambda barrier, count: barrier.add(arrivals=count), wait=Barrier.wait,
    ),
    "Call": lambda *fields: SimpleNamespace(**dict(zip(_fields_of_call(), fields, strict=True))),
}  # fmt: skip


@cache
def _fields_of_call() -> list[str]:
    """Names of `forward.Call`, which Triton's versions keep in different places."""
    call = next(node for node in ast.parse(inspect.getsource(forward)).body if isinstance(node, ast.ClassDef))
    return [line.target.id for line in call.body if isinstance(line, ast.AnnAssign)]  # type: ignore[union-attr]


class _Scalars(ast.NodeTransformer):
    """A plain integer given to a variable becomes a scalar of the kernel, as Triton does it."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if isinstance(node.value, ast.Constant) and type(node.value.value) is int:
            node.value = ast.Call(ast.Name("_integer", ast.Load()), [node.value], [])
        return node


@cache
def functions(module: str) -> dict[str, Any]:
    """The globals of a module of kernels, with everything of the device replaced."""
    found = dict(vars(sys.modules[module])) | {"_integer": integer}
    for name, item in vars(sys.modules[module]).items():
        if name in REPLACED:
            found[name] = REPLACED[name]
        elif isinstance(item, constexpr):
            found[name] = item.value
        elif isinstance(item, JITFunction | ConstexprFunction) and item.fn.__module__ != module:
            found[name] = functions(item.fn.__module__)[item.fn.__name__]
        elif isinstance(item, ConstexprFunction):
            found[name] = FunctionType(item.fn.__code__, found)
        elif isinstance(item, JITFunction):
            tree = ast.parse(textwrap.dedent(inspect.getsource(item.fn)))
            tree.body[0].decorator_list = []  # type: ignore[attr-defined]
            exec(compile(ast.fix_missing_locations(_Scalars().visit(tree)), name, "exec"), found)  # noqa: S102
    return found


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(storage(x), x.storage_offset())
    if isinstance(x, int) and not isinstance(x, bool):
        return integer(x)
    return value(x, np.float32) if isinstance(x, float) else x


def _run(
    kernel: JITFunction, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any], seed: int
) -> None:
    given = dict(zip((p.name for p in kernel.params), arguments, strict=False))
    given |= {p.name: options[p.name] for p in kernel.params if p.name in options}
    given = {p.name: given[p.name] if p.is_constexpr else _argument(given[p.name]) for p in kernel.params}
    function = functions(kernel.fn.__module__)[kernel.fn.__name__]
    CTA.grid = grid
    for CTA.program in itertools.product(*map(range, grid)):
        CTA.scheduler, CTA.barriers, CTA.warpgroups = Scheduler(seed), {}, []
        with np.errstate(all="ignore"):
            function(**given)


@contextmanager
def emulating(processors: int = 3, seed: int = 0) -> Iterator[None]:
    """Inside, kernels launched on CPU tensors run here, a persistent one as `processors` CTAs."""
    before = JITFunction.__getitem__, launch.multiprocessors, primitives.box_descriptor

    def launched(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: _run(kernel, grid, arguments, options, seed)

    JITFunction.__getitem__ = launched  # type: ignore[method-assign]
    launch.multiprocessors = lambda index: processors  # type: ignore[assignment]
    primitives.box_descriptor = Descriptor  # type: ignore[assignment]
    try:
        yield
    finally:
        JITFunction.__getitem__, launch.multiprocessors, primitives.box_descriptor = before
