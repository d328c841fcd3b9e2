"""Timing calls inside CUDA graphs: what the GPU takes, without the host that launches the kernels one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from tilewise.bench.timer import L2_FLUSH_BYTES, Timing, in_rounds

K = TypeVar("K")


def capture(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    """A graph of the calls one after the other, each of which ran twice before.

    Args:
        stream: to capture on. A backward runs on its forward's stream, so a call that is a backward alone needs that.
    """
    side = stream or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    return graph


def sets_beyond_cache(read: int) -> int:
    """How many sets of inputs, of `read` bytes each, calls must go through so that none finds its own in the L2."""
    return 1 if read >= L2_FLUSH_BYTES else math.ceil(L2_FLUSH_BYTES / read)


def in_graphs(
    calls: Mapping[K, Sequence[Callable[[], object]]],
    device: torch.device,
    *,
    rounds: int = 5,
    stream: torch.cuda.Stream | None = None,
) -> dict[K, Timing]:
    """Milliseconds a call, in interleaved rounds (`timer.in_rounds`), of graphs of several calls each."""
    graphs = {name: capture(several, stream) for name, several in calls.items()}
    timings = in_rounds({name: graph.replay for name, graph in graphs.items()}, device, rounds=rounds)
    found: dict[K, Timing] = {}
    for name, timing in timings.items():
        several = len(calls[name])
        found[name] = Timing(timing.median / several, timing.least / several, timing.most / several, timing.runs)
    return found
