"""Launch shapes of decoding as data, and into how many splits a call is cut."""

from __future__ import annotations

from typing import NamedTuple

from tilewise.backends.triton.configs import BUCKETS
from tilewise.spec import DecodeSpec


class DecodeTile(NamedTuple):
    """Launch shape of the split kernel. block_m follows from the rows of a call."""

    block_n: int
    num_warps: int
    num_stages: int
    resident: int
    """Programs for each multiprocessor that the number of splits is chosen for."""
    registers: int = 0
    """The most that a thread may have, 0 for no limit: fewer let more programs run at once."""
    company: int = 0
    """Blocks that a program must have for more than one to share a multiprocessor."""

    def __str__(self) -> str:
        return f"{self.block_n} tokens, {self.num_warps} warps, {self.num_stages} stages"


HOPPER = {
    64: DecodeTile(128, 4, 4, 1),
    128: DecodeTile(64, 4, 4, 1),
    256: DecodeTile(32, 4, 4, 1),
    512: DecodeTile(16, 4, 4, 1),
}
"""float16 and bfloat16 on sm_90. What counts is bytes in flight, about 100 KB a multiprocessor.

D = 128: of 18 shapes the one that is at 0.98 to 1.01 of cuDNN's speed in all five rows of docs/decoding.md; runners-up
(128 tokens with 3 stages, 64 with 3) lose 2 to 6 % in one of them. Measured 2026-11-21 on an H200 (torch 2.11.0, Triton
3.6.0, bf16, one query, H = 32, Hkv = 8). Other head dims have as many bytes in flight and are not measured.
"""

HOPPER_PAGED = {bucket: tile._replace(resident=2, company=16) for bucket, tile in HOPPER.items()}
"""The same through a page table, whose look-up a second program a multiprocessor hides: 126 µs against 147 µs at
16 × 8192 with pages of 64, 483 against 563 at 16 × 32768 (same device and day). With few tokens each the second costs
more than it hides: 18.5 µs against 17.5 at 1 × 8192, 27.7 against 26.4 at 2 × 8192, 28.1 against 26.5 at 1 × 16384."""

HOPPER_INT8 = {
    64: DecodeTile(32, 1, 3, 8),
    128: DecodeTile(32, 1, 2, 12, registers=168),
    256: DecodeTile(32, 2, 3, 4),
    512: DecodeTile(16, 2, 3, 2),
}
"""int8 on sm_90: turning bytes into numbers keeps the arithmetic units busy, so what counts is independent warps. One
warp a program needs no barrier: 326 µs at 16 × 32768 with D = 128 against 347 to 450 for 2 to 8 warps (same device and
day). Two stages and 168 registers a thread, so that twelve programs run at once: 293 µs, where cuDNN takes 479 for bf16
(of 11 shapes; next is 64 tokens, 2 warps, 168 registers with 309). Other head dims are not measured."""

HOPPER_LATENT = {512: DecodeTile(64, 8, 2, 1)}
"""Latents of 512 columns on sm_90, for 64 rows a tile: of 7 shapes the fastest at B = 64, H = 128, M = 8192 (541 µs;
with 32 tokens 648 and more; same device and day)."""

COMPACT = {
    64: DecodeTile(64, 4, 2, 2),
    128: DecodeTile(32, 4, 3, 2),
    256: DecodeTile(32, 4, 2, 2),
    512: DecodeTile(16, 4, 2, 1),
}
"""float16, bfloat16 and int8 elsewhere, within 99 KiB of shared memory. Compiled, never run or measured."""

SINGLE = {
    64: DecodeTile(32, 4, 1, 2),
    128: DecodeTile(16, 4, 1, 2),
    256: DecodeTile(16, 4, 1, 1),
    512: DecodeTile(16, 8, 1, 1),
}
"""float32, correct first: chosen to spill nothing with 16 rows, not measured."""

INTERPRETED = DecodeTile(16, 4, 1, 2)

MAX_SPLITS = 128


def tile_for(spec: DecodeSpec) -> DecodeTile:
    """Launch shape for a spec."""
    if spec.device == "cpu":
        return INTERPRETED
    bucket = next(size for size in BUCKETS if (spec.v_head_dim if spec.latent else spec.head_dim) <= size)
    if spec.dtype == "float32":
        return SINGLE[bucket]
    if spec.device != "sm_90":
        return COMPACT[bucket]
    if spec.latent and bucket in HOPPER_LATENT and spec.group * spec.q_len > 16:
        return HOPPER_LATENT[bucket]
    if spec.int8:
        return HOPPER_INT8[bucket]
    return (HOPPER if spec.page_size is None else HOPPER_PAGED)[bucket]


def rows_of_tile(spec: DecodeSpec) -> int:
    """block_m: the heads of a group times the queries, as a power of two that the matrix unit takes."""
    rows = spec.group * spec.q_len
    if spec.int8 or spec.dtype == "float32" or rows <= 16:
        return 16
    # Warp groups multiply 64 rows at a time, and a latent's tiles are too wide for anything less.
    return 64 if spec.latent else min(64, 1 << (rows - 1).bit_length())


def choose_splits(spec: DecodeSpec, tile: DecodeTile, tiles: int, multiprocessors: int) -> int:
    """The fewest splits with which the last wave of programs is nearly as full as it can be.

    `tiles` row tiles a K/V head. Without splits a small batch leaves multiprocessors idle; each split beyond that costs
    a partial result in float32, and a program with few tokens does not fill its pipeline.
    """
    if spec.num_splits is not None:
        return min(spec.num_splits, MAX_SPLITS)
    left = spec.window[0]
    visible = spec.k_len if left is None else min(spec.k_len, left + spec.q_len)
    most = max(1, min(MAX_SPLITS, visible // (4 * tile.block_n)))
    programs = spec.batch * spec.kv_heads * tiles
    splits = _fewest(programs, multiprocessors * tile.resident, most)
    crowded = visible < splits * tile.company * tile.block_n
    return min(splits, _fewest(programs, multiprocessors, most)) if crowded else splits


def _fewest(programs: int, places: int, most: int) -> int:
    """The fewest splits up to `most` that fill the last wave of places to 95 % of what any number of them does."""

    def fullness(splits: int) -> float:
        waves = programs * splits / places
        return waves / -(-programs * splits // places)

    best = max(fullness(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if fullness(splits) >= 0.95 * best)
