"""A pointer chase on the GPU: one program of one warp follows a chain of loads, each of which gives the next address.

Nothing overlaps, so the time a step is the latency of whichever level of memory holds the chain. The kernel is timed
twice, with one number of steps and with twice that, and the difference counts: the launch drops out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_RUNS = 5


@triton.jit
def follow(links_ptr, last_ptr, steps):
    """last = links[links[… links[0]]], `steps` deep."""
    place = tl.load(links_ptr)
    for _ in range(steps):
        place = tl.load(links_ptr + place)
    tl.store(last_ptr, place)


def last_of_chain(links: Tensor, steps: int) -> Tensor:
    """The place where a chain [places] int64 has led after `steps + 1` links, [1] int64."""
    last = torch.empty(1, dtype=torch.int64, device=links.device)
    follow[(1,)](links, last, steps, num_warps=1)
    return last


def nanoseconds_a_load(links: Tensor, steps: int) -> float:
    """Time of one dependent load in a chain on a CUDA device: the least of several runs."""
    least: list[float] = []
    for count in (steps, 2 * steps):
        last_of_chain(links, count)
        runs: list[float] = []
        for _ in range(_RUNS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            last_of_chain(links, count)
            end.record()
            end.synchronize()
            runs.append(begin.elapsed_time(end))
        least.append(min(runs))
    return (least[1] - least[0]) * 1e6 / steps
