"""A CPU's stand-in for a multiprocessor: what the emulated kernels (emulator.py) multiply, copy and wait with.

What a warp-specialised kernel can get wrong beside its arithmetic raises AssertionError:

- copies and products are asynchronous: a buffer becomes NaN when a load into it is asked for and is filled some time
  later; a store is read some time later, and until then nobody may write there; a product's operands must not change
  until it has been waited for, and its result cannot be used before;
- what ordinary stores wrote must be fenced before the copy engine or the tensor cores read it;
- a load into registers may still be under way when a copy into the buffer is asked for, and gives NaN then, unless a
  fence or a product that used it was waited for before (an arrival at a barrier waits for no load);
- barriers count arrivals, a hardware barrier each warpgroup once a round; where all wait, it says who for what;
- a descriptor's addresses are taken modulo 2⁶⁴, and every access must lie inside the tensor's storage.

Which warpgroup or copy goes on next is drawn from a seed. Layouts are not modelled, except the order in which the
backward stores dQ.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE: Any = threading.local()
"""`own`: the warpgroup that runs in this thread."""
CTA: Any = SimpleNamespace()
"""The CTA that runs: its number, scheduler, hardware barriers and warpgroups."""


class Value(np.ndarray):
    """A kernel's tensor or scalar: int32 wraps around and divides towards zero as on the device."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array).view(Value)

    def __getitem__(self, key: Any) -> Any:
        return value(np.asarray(self)[key])

    def __floordiv__(self, other: Any) -> Any:
        return value(np.sign(self) * np.sign(other) * np.floor_divide(np.abs(self), np.abs(other)), self.dtype)

    def __mod__(self, other: Any) -> Any:
        return np.fmod(self, other)

    def __iadd__(self, other: Any) -> Any:  # a new value: others hold this one
        return self + other

    def __imul__(self, other: Any) -> Any:
        return self * other

    def __ixor__(self, other: Any) -> Any:
        return self ^ other

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)


def value(x: Any, dtype: Any = None) -> Any:
    return np.asarray(x, dtype).view(Value)


def integer(x: int) -> Any:
    return value(x, np.int32 if abs(x) < 1 << 31 else np.int64)


def storage(x: Tensor) -> np.ndarray:
    """All of a tensor's memory."""
    return torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).numpy()


class Descriptor:
    """A copy-engine descriptor, made like `primitives.box_descriptor`."""

    def __init__(self, x: Tensor, shape: list[int], strides: list[int], box: list[int], layout: Any) -> None:
        self.memory, self.first, self.layout = storage(x), x.storage_offset(), layout
        self.shape, self.strides, self.box = shape, strides, box
        self.dtype, self.block_type = self.memory.dtype.type, SimpleNamespace(shape=box)

    def rows(self, place: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where a box's columns lie, [rows, columns], and which of them exist."""
        at = [int(coordinate) for coordinate in place]
        *outer, row, column = zip(at, self.shape, self.strides, self.box, strict=True)
        start = self.first + sum(coordinate * stride for coordinate, _, stride, _ in outer) + column[0]
        inside = all(0 <= coordinate < size and count == 1 for coordinate, size, _, count in outer)
        wrap = (1 << 64) // self.memory.itemsize
        rows = [((start + (row[0] + r) * row[2]) % wrap, 0 <= row[0] + r < row[1]) for r in range(row[3])]
        columns = np.arange(column[3])
        live = np.array([there and inside for _, there in rows])[:, None] & (columns + column[0] < column[1])
        places = np.array([at if there and inside else 0 for at, there in rows])[:, None] + columns
        assert ((places >= 0) & (places < len(self.memory)))[live].all(), "a descriptor points outside its tensor"
        return places, live


class Scheduler:
    """One thread runs at a time; which one goes on, or which copy is made, is drawn at every `step`."""

    numbers = itertools.count()

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.copies: list[tuple[float, int, Callable[[], None]]] = []
        """A heap: each has drawn how long it takes, some very long, so that later ones overtake it."""
        self.waiting: dict[str, tuple[Callable[[], bool], str]] = {}
        self.turns: dict[str, threading.Semaphore] = {}
        self.error: BaseException | None = None
        self.finished = threading.Semaphore(0)

    def run(self, tasks: list[Callable[[], None]]) -> None:
        def body(name: str, task: Callable[[], None]) -> None:
            self.turns[name].acquire()
            try:
                task()
            except BaseException as error:  # noqa: BLE001  (handed to the thread that called `run`)
                self.error = self.error or error
            self.pass_on()

        names = [f"warpgroup {number}" for number in range(len(tasks))]
        for name in names:
            self.waiting[name], self.turns[name] = (lambda: True, "its start"), threading.Semaphore(0)
        for name, task in zip(names, tasks, strict=True):
            threading.Thread(target=body, args=(name, task), name=name, daemon=True).start()
        self.pass_on()
        self.finished.acquire()
        while self.copies:
            heapq.heappop(self.copies)[2]()
        if self.error is not None:
            raise self.error

    def add_copy(self, copy: Callable[[], None]) -> None:
        heapq.heappush(self.copies, (self.random.random(), next(self.numbers), copy))
        self.step()

    def pass_on(self) -> None:
        """Let somebody who can go on; whoever calls is not `waiting` or waits for a turn."""
        while True:
            if self.error is not None or not self.waiting:
                self.finished.release()
                return
            able = [name for name, (ready, _) in self.waiting.items() if ready()]
            if able and (not self.copies or self.random.random() < 0.98):
                name = self.random.choice(able)
                del self.waiting[name]
                self.turns[name].release()
                return
            if self.copies:
                heapq.heappop(self.copies)[2]()
            else:
                self.error = AssertionError(f"deadlock: { ({name: what for name, (_, what) in self.waiting.items()}) }")

    def step(self, what: str = "its turn", ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on; come back when `ready`."""
        name = threading.current_thread().name
        self.waiting[name] = ready, what
        self.pass_on()
        self.turns[name].acquire()


class Warpgroup:
    """What one warpgroup has under way: products, stores that still read, writes that are not fenced, and loads."""

    def __init__(self) -> None:
        self.products: list[Product] = []
        self.stores: list[Shared] = []
        self.dirty: list[np.ndarray] = []
        self.loads: list[tuple[np.ndarray, weakref.ref[Value]]] = []


class Shared:
    """A part of shared memory."""

    def __init__(self, data: np.ndarray, order: np.ndarray | None = None) -> None:
        self.data, self.order, self.dtype = data, order, data.dtype.type
        self.type = SimpleNamespace(shape=list(data.shape), layout=None)

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)], self.order)

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.reshape(shape))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.transpose(order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def load(self, _layout: Any) -> Any:
        found = self.data.copy()
        if self.order is not None:
            found.reshape(-1)[self.order] = self.data.reshape(-1)
        found = value(found)
        HERE.own.loads.append((self.data, weakref.ref(found)))
        return found

    def store(self, x: Any) -> None:
        assert x.dtype == self.dtype
        nobody_reads(self.data)
        if self.order is None:
            self.data[...] = x
        else:
            self.data.reshape(-1)[...] = np.asarray(x).reshape(-1)[self.order]
        HERE.own.dirty.append(self.data)


def reinterpret(buffer: Shared, dtype: Any, shape: list[int], layout: Any) -> Shared:
    return Shared(
        buffer.data.reshape(-1).view(dtype).reshape(shape), layout if isinstance(layout, np.ndarray) else None
    )


def visible_to_async(*buffers: Any) -> None:
    for buffer in buffers:
        for warpgroup in CTA.warpgroups if isinstance(buffer, Shared) else ():
            for data in warpgroup.dirty:
                assert not np.may_share_memory(buffer.data, data), "the async proxy reads what nobody has fenced"


def nobody_reads(data: np.ndarray) -> None:
    for warpgroup in CTA.warpgroups:
        for buffer in warpgroup.stores:
            assert not np.may_share_memory(buffer.data, data), "a buffer is written that a copy still reads"


def overtake_loads(data: np.ndarray) -> None:
    for warpgroup in CTA.warpgroups:
        warpgroup.loads = [(source, found) for source, found in warpgroup.loads if found() is not None]
        for source, found in warpgroup.loads:
            if np.may_share_memory(source, data):
                found()[...], found().overtaken = np.nan, True


class Product:
    """An asynchronous matrix product."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        visible_to_async(a, b)
        assert not getattr(a, "overtaken", False), "a copy overtook a load that nobody had waited for"
        self.left = a
        self.operands = [x.data for x in (a, b) if isinstance(x, Shared)]
        self.seen = [x.copy() for x in self.operands]
        left, right = (np.asarray(x.data if isinstance(x, Shared) else x, np.float32) for x in (a, b))
        self.result = value(left @ right)
        if use_acc:
            self.result = self.result + (acc.result if isinstance(acc, Product) else acc)

    def finish(self) -> None:
        for now, seen in zip(self.operands, self.seen, strict=True):
            assert np.array_equal(now, seen, equal_nan=True), "an operand changed under a product"


def warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    product = Product(a, b, acc, use_acc)
    HERE.own.products.append(product)
    CTA.scheduler.step()
    return product


def warpgroup_mma_wait(pending: int, deps: list[Any]) -> Any:
    CTA.scheduler.step()
    under_way = HERE.own.products
    while len(under_way) > pending:
        product = under_way.pop(0)
        product.finish()
        HERE.own.loads = [(source, found) for source, found in HERE.own.loads if found() is not product.left]
    assert not any(x is product for x in deps for product in under_way), "a product is used before it is done"
    found = [x.result if isinstance(x, Product) else x for x in deps]
    return found[0] if len(found) == 1 else tuple(found)


def fence() -> None:
    if hasattr(HERE, "own"):
        HERE.own.dirty.clear()
        HERE.own.loads.clear()


def tma_load(descriptor: Descriptor, place: Any, barrier: Barrier, buffer: Shared) -> None:
    nobody_reads(buffer.data)
    overtake_loads(buffer.data)
    buffer.data[...] = np.nan

    def copy() -> None:
        places, live = descriptor.rows(place)
        found = np.where(live, descriptor.memory[np.where(live, places, 0)], 0)
        buffer.data[...] = found.reshape(buffer.data.shape)
        barrier.add(transferred=buffer.data.nbytes)

    CTA.scheduler.add_copy(copy)


def tma_store(descriptor: Descriptor, place: Any, buffer: Shared, add: bool = False) -> None:
    assert all(int(x) >= 0 for x in place), "an illegal instruction: a store before the tensor's beginning"
    visible_to_async(buffer)
    stores = HERE.own.stores
    stores.append(buffer)

    def copy() -> None:
        places, live = descriptor.rows(place)
        found = buffer.data.reshape(places.shape)[live]
        descriptor.memory[places[live]] = found + (descriptor.memory[places[live]] if add else 0)
        stores.remove(buffer)

    CTA.scheduler.add_copy(copy)


def store_wait(pending: int) -> None:
    stores = HERE.own.stores
    CTA.scheduler.step("stores", lambda: len(stores) <= pending)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come."""

    numbers = itertools.count()

    def __init__(self) -> None:
        self.number, self.phase, self.bytes = next(self.numbers), 0, 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def add(self, arrivals: int = 0, expected: int = 0, transferred: int = 0) -> None:
        self.pending -= arrivals
        self.bytes += expected - transferred
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1
        if arrivals:
            CTA.scheduler.step()

    def wait(self, phase: Any) -> None:
        CTA.scheduler.step(f"mbarrier {self.number}, phase {phase}", lambda: self.phase != phase)


def barrier_arrive(number: Any, threads: int) -> None:
    number, name = int(number), threading.current_thread().name
    assert 6 <= number < 16
    come = CTA.barriers.setdefault(number, set())
    assert name not in come, "a warpgroup arrives twice in one round of a hardware barrier"
    come.add(name)
    if 128 * len(come) == threads:
        CTA.barriers[number] = set()
    CTA.scheduler.step()


def barrier_sync(number: Any, threads: int) -> None:
    come = CTA.barriers.setdefault(int(number), set())
    barrier_arrive(number, threads)
    CTA.scheduler.step(f"hardware barrier {number}", lambda: CTA.barriers[int(number)] is not come)


class Barriers(list[Barrier]):
    def index(self, i: Any) -> Any:
        return self[int(i)]


def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if isinstance(layout, str):  # mbarriers
        return Barriers(Barrier() for _ in range(shape[0])) if len(shape) > 1 else Barrier()
    fill = np.nan if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    return Shared(np.full(shape, fill, dtype), layout if isinstance(layout, np.ndarray) else None)
