"""Compiles what a benchmark needs before it starts, in parallel processes that fill the compilers' caches on disk."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from tilewise.bench.environment import usable_cores
from tilewise.bench.peers import by_name, compiler_settings
from tilewise.bench.suites import Case
from tilewise.bench.workload import Workload

COMPILED_PEERS = frozenset({"flex", "flash_attn.cute", "fla"})


def compile_ahead(
    cases: Sequence[Case],
    backends: Sequence[str],
    peers: Sequence[str],
    *,
    device: torch.device,
    backward: bool,
    after_each: Callable[[int, int], object] = lambda done, planned: None,
) -> None:
    """Runs every backend and every compiled peer once on every case, each in whichever process is free.

    Whatever refuses there refuses in the benchmark too, which reports it; here it is passed over.
    """
    tasks = [(case, device, name, False, backward) for case in cases for name in backends]
    tasks += [(case, device, name, True, backward) for case in cases for name in peers if name in COMPILED_PEERS]
    in_processes(_once, tasks, after_each)


def in_processes(
    call: Callable[..., object],
    tasks: Sequence[tuple[Any, ...]],
    after_each: Callable[[int, int], object] = lambda done, planned: None,
) -> list[BaseException | None]:
    """Runs `call` on every task, each in whichever process is free, and returns what each of them raised."""
    workers = max(1, min(len(tasks), usable_cores()))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin) as pool:
        started = [pool.submit(call, *task) for task in tasks]
        try:
            for done, future in enumerate(as_completed(started), start=1):
                future.exception()
                after_each(done, len(started))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.exception() for future in started]


def _begin() -> None:
    """Ctrl-C is the parent's business, and each process compiles with one thread of its own."""
    import torch._inductor.config as inductor

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inductor.compile_threads = 1


def _once(case: Case, device: torch.device, name: str, peer: bool, backward: bool) -> None:
    with compiler_settings():
        work = Workload.of(case, device)
        out = by_name()[name].prepare(work)() if peer else work.ours(name)()
        if backward:
            torch.autograd.grad(out, work.leaves, work.dout)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
