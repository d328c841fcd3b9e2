"""Which CTA computes which tiles, in which order.

Where tiles differ in length, the last long one decides when the kernel ends. So the longest come first, each to the CTA
that has been given least so far (longest-processing-time-first, Graham 1969; a few at a time, so that it is NumPy's
work and no heap's). Heads are taken in sections whose K and V fit in the L2 cache together.

Three sources of length: geometry known to the host (`of_band`, cached by its numbers), which deals the tiles out in
advance; a tile map on the device (`of_tile_map`, cached with the map) and sequence lengths on the device
(`of_sequences`, made anew in each call by one small kernel), which only order a queue. None waits for the device.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tilewise.masks.tensors import TileTensors
from tilewise.resident import capturing, from_host, made, used
from tilewise.spec import AttentionSpec

L2_BYTES = 32 << 20
"""Of the 50 MB of L2, what the K and V of a section of heads may take."""

OVERHEAD = 3
"""What a tile costs beyond its blocks, in blocks: its prologue and epilogue."""


def section_of(spec: AttentionSpec) -> int:
    """Query heads whose K and V fit in L2 together."""
    head_bytes = 2 * spec.k_len * (spec.head_dim + spec.v_head_dim)
    return max(1, min(spec.batch * spec.heads, L2_BYTES * spec.group // max(1, head_bytes)))


def of_band(spec: AttentionSpec, rows: int, block_n: int, programs: int, device: torch.device) -> Tensor:
    """Lists for causal rules and windows: int32 [programs + 1 + tiles], see `as_lists`."""
    left, right = spec.reach
    offset = spec.offset
    assert offset is not None
    numbers = (spec.q_len, spec.k_len, offset, left, right, spec.batch * spec.heads, section_of(spec), rows, block_n)
    return used(_of_band(*numbers, programs, device), device)


@lru_cache(maxsize=256)
def _of_band(
    n: int,
    m: int,
    offset: int,
    left: int | None,
    right: int | None,
    planes: int,
    section: int,
    rows: int,
    block_n: int,
    programs: int,
    device: torch.device,
) -> Tensor:
    lo = np.arange(0, n, rows)
    last, first = np.full(len(lo), -(-m // block_n)), np.zeros(len(lo), np.int64)
    if right is not None:
        last = np.minimum(last, -(-np.maximum(lo + rows + offset + right, 0) // block_n))
    if left is not None:
        first = np.maximum(lo + offset - left, 0) // block_n
    cost = np.maximum(last - first, 1) + OVERHEAD
    order = np.argsort(-cost, kind="stable")
    # Within a section: longest first, all its heads side by side.
    tiles = [
        (np.arange(start, min(start + section, planes))[None, :] * len(lo) + order[:, None]).reshape(-1)
        for start in range(0, planes, section)
    ]
    ids = np.concatenate(tiles)
    return from_host(torch.from_numpy(as_lists(ids, cost[ids % len(lo)], programs)), device, "this shape's schedule")


def as_lists(ids: np.ndarray, cost: np.ndarray, programs: int) -> np.ndarray:
    """Deal tiles out: where each CTA's list begins [programs + 1], then the lists; int32."""
    load = np.zeros(programs, np.int64)
    owner = np.empty(len(ids), np.int64)
    # One a step would be exact, and four are within 0.2 % of it; a million tiles take half a second.
    step = min(programs, max(4, len(ids) // 12500))
    for start in range(0, len(ids), step):
        length = min(step, len(ids) - start)
        chosen = np.argsort(load, kind="stable")[:length]
        owner[start : start + length] = chosen
        load[chosen] += cost[start : start + length]
    lists = ids[np.argsort(owner, kind="stable")]
    begins = np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=programs)))) + programs + 1
    return np.concatenate((begins, lists)).astype(np.int32)


_OF_MAPS: Any = WeakTensorKeyDictionary()
"""By a tile map's tensor of row ends: its counts, and its lists by shape."""


def of_tile_map(tiles: TileTensors, spec: AttentionSpec, rows: int) -> tuple[Tensor, Tensor]:
    """Counts [R, 2] of partial and full tiles a row, and the queue of a tile map, int32 [1 + tiles]: number, tiles.

    Cached with the map's tensors; made on the device, whatever the encoding.
    """
    device = tiles.part_end.device
    known = _OF_MAPS.setdefault(tiles.part_end, {})
    key = (spec.batch, spec.heads, section_of(spec), rows)
    if key in known:
        return used(known[key], device)
    counts = _map_counts(tiles)
    found = made((counts, _map_queue(counts, tiles, spec, rows)), device)
    if not capturing(device):  # what a capture makes is there when its graph has run, not before
        known[key] = found
    return found


def _map_counts(tiles: TileTensors) -> Tensor:
    """int32 [R, 2]: partial and full tiles of each row, on the device."""
    lengths = torch.nn.functional.pad((tiles.run_stop - tiles.run_start).cumsum(0), (1, 0))
    fulls = lengths[tiles.run_end.long()] - lengths[tiles.run_begin.long()]
    return torch.stack((tiles.part_end - tiles.part_begin, fulls.int()), dim=1).contiguous()


def _map_queue(counts: Tensor, tiles: TileTensors, spec: AttentionSpec, rows: int) -> Tensor:
    """Longest first in each section."""
    device = counts.device
    row_tiles, planes = -(-spec.q_len // rows), spec.batch * spec.heads
    cost = counts.sum(1).view(tiles.batch, tiles.heads, tiles.q_tiles)
    cost = cost.expand(spec.batch, spec.heads, -1).reshape(planes, -1)
    cost = cost[:, torch.arange(row_tiles, device=device) * rows // 128]
    section = torch.arange(planes, device=device) // section_of(spec)
    ids = (section[:, None] * (1 << 40) - cost).reshape(-1).argsort(stable=True)
    return torch.nn.functional.pad(ids, (1, 0), value=planes * row_tiles).int()


def of_sequences(cu_seqlens_q: Tensor, spec: AttentionSpec, rows: int) -> tuple[Tensor, Tensor]:
    """How many (sequence, tile) pairs there are, and the pairs as sequence·tiles + tile; and the queue's counter, which
    is 0: int32 on the device.

    Long sequences first, and in each its last tile first, which sees most under a causal rule.
    """
    kernel = _sequence_kernel()
    n_m = -(-spec.q_len // rows)
    room = min(spec.q_total // rows + spec.batch, n_m * spec.batch)
    items = torch.empty(1 + room, dtype=torch.int32, device=cu_seqlens_q.device)
    queue = torch.empty(1, dtype=torch.int32, device=cu_seqlens_q.device)
    block = max(16, 1 << (spec.batch - 1).bit_length())
    kernel[(spec.batch,)](
        cu_seqlens_q, items, queue, spec.batch, n_m, ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )
    return items, queue


@cache
def _sequence_kernel() -> Any:
    from tilewise.backends.hopper.sequences import order_sequences

    return order_sequences
