"""Timing several calls against each other: interleaved rounds, so that a busy moment hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


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
