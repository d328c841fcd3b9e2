"""Memory latency by pointer chase: each load's address is the result of the load before it, so none can overlap.

The chain visits a working set of a given size in random order; as the set outgrows one level of cache after another,
the time a step rises to the next level's latency. On a CPU an interpreted loop makes the steps, and its own cost, the
time a step in the smallest set, is subtracted: what is left is latency beyond the first level. On CUDA one thread of a
Triton kernel makes them, and nothing is subtracted.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tilewise.errors import bad_value

LINE = 64
"""Bytes a step jumps over at least: a cache line."""


class Latency(NamedTuple):
    """One working set."""

    size: int
    """Bytes."""
    nanoseconds: float
    """A dependent load takes; on a CPU beyond that in the smallest set."""


def chain(size: int, stride: int = LINE, seed: int = 0) -> np.ndarray:
    """int64 [size / 8]: element `i·stride/8` holds the index of the next one; the chain is one cycle through all.

    Raises ValueError for fewer than two places.
    """
    places = size // stride
    if places < 2:
        raise bad_value("size", size, f"at least {2 * stride} bytes")
    order = np.random.default_rng(seed).permutation(places)
    links = np.zeros(places * stride // 8, dtype=np.int64)
    links[order * (stride // 8)] = np.roll(order, -1) * (stride // 8)
    return links


def chase(sizes: Sequence[int], device: torch.device | None = None, *, steps: int = 200_000) -> list[Latency]:
    """Nanoseconds a dependent load takes in working sets of `sizes` bytes, smallest first.

    Raises ValueError where no size is given.
    """
    if not sizes:
        raise bad_value("sizes", "none", "at least one working set")
    ordered = sorted(sizes)
    if device is not None and device.type == "cuda":
        from tilewise.backends.triton.chase import nanoseconds_a_load

        return [Latency(size, nanoseconds_a_load(torch.from_numpy(chain(size)).to(device), steps)) for size in ordered]
    taken = [_interpreted(chain(size), steps) for size in ordered]
    return [Latency(size, max(0.0, ns - taken[0])) for size, ns in zip(ordered, taken, strict=True)]


def _interpreted(links: np.ndarray, steps: int) -> float:
    """The least of three runs; the first also brings the set into the caches it fits."""
    follow = array("q", links.tobytes())
    best = float("inf")
    for _ in range(3):
        place = 0
        begun = time.perf_counter()
        for _ in range(steps):
            place = follow[place]
        best = min(best, (time.perf_counter() - begun) / steps)
    return best * 1e9
