"""Timing several calls against each other: interleaved rounds, so that a busy moment hits all of them alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch

K = TypeVar("K")


class Timing(NamedTuple):
    """Milliseconds of one call over several runs."""

    median: float
    least: float
    most: float
    runs: int


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, on the device's own clock where it has one."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    least: int = 3,
    most: int = 15,
    after_each: Callable[[int, int], object] = lambda done, planned: None,
) -> dict[str, Timing]:
    """Times every call in rounds, one run of each a round.

    A call runs as often as fits `seconds`, judged by its first run, but at least `least` and at most `most` times. The
    calls must have run before: nothing is discarded as warm-up here.

    Args:
        seconds: what one call may take in all.
        after_each: told after every run how many are done and planned, to show progress.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    wanted = dict.fromkeys(calls, least)
    for round_index in range(max(least, most)):
        for name, call in calls.items():
            if round_index >= wanted[name]:
                continue
            spent[name].append(once(call, device))
            if round_index == 0:
                fitting = int(seconds * 1e3 / max(spent[name][0], 1e-6))
                wanted[name] = min(max(fitting, least), most)
            after_each(sum(map(len, spent.values())), sum(wanted.values()))
    return {name: Timing(statistics.median(runs), min(runs), max(runs), len(runs)) for name, runs in spent.items()}


L2_FLUSH_BYTES = 2**28
"""Written between two runs on a GPU: several times the L2 of any GPU, as `triton.testing.do_bench` does."""

SETTLE = 60.0
"""Milliseconds of a turn on a GPU that pass before anything counts. On an H200 one and the same cuDNN forward measured
687 TFLOP/s right after a lighter kernel, 605 after 20 ms of its own and 569 after 60 (LOG.md)."""


def in_rounds(
    calls: Mapping[K, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 5,
    fill: float = 20.0,
    after_each: Callable[[int, int], object] = lambda done, planned: None,
) -> dict[K, Timing]:
    """Times short calls in rounds that are long enough to be told from noise; the runs of a `Timing` are rounds.

    In a round the calls take turns, and each runs in a row as often as fills `fill` milliseconds; the round counts with
    the median of these. Every run on a GPU starts with the inputs out of its L2 cache, between events of its own. One
    round before the first warms everything up and is not counted.

    What ran just before sets the clock that a GPU at its power limit has, for tens of milliseconds: so the order is
    drawn anew for each round, and on a GPU `SETTLE` milliseconds of runs that do not count come first in each turn.

    Args:
        fill: of the device's time, per call and round.
        after_each: told after every call of every round how many are done and planned.
    """
    scratch = torch.empty(L2_FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    names = list(calls)
    settling: dict[K, int] = {}
    repeats: dict[K, int] = {}
    for name, call in calls.items():
        call()
        taken = max(*_in_a_row(call, 1, device, scratch), 1e-3)
        settling[name] = math.ceil(SETTLE / taken) if device.type == "cuda" else 0
        repeats[name] = max(1, math.ceil(fill / taken))
    spent: dict[K, list[float]] = {name: [] for name in names}
    planned = (rounds + 1) * len(names)
    draw = random.Random(0)
    for index in range(rounds + 1):
        for turn, name in enumerate(draw.sample(names, len(names)), start=1):
            runs = _in_a_row(calls[name], settling[name] + repeats[name], device, scratch)
            if index > 0:
                spent[name].append(statistics.median(runs[settling[name] :]))
            after_each(index * len(names) + turn, planned)
    return {name: Timing(statistics.median(runs), min(runs), max(runs), len(runs)) for name, runs in spent.items()}


def _in_a_row(call: Callable[[], object], repeats: int, device: torch.device, scratch: torch.Tensor) -> list[float]:
    """Milliseconds of each of several runs; on a GPU all are queued before the first is waited for."""
    if device.type != "cuda":
        return [once(call, device) for _ in range(repeats)]
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for begin, end in events:
        scratch.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]
