"""Tile shapes as data: which configuration runs for which device generation, head dim, dtype and features.

Nothing is tuned at run time; `python -m tilewise.bench.tuning` measures a row against all others that fit. A row gives
block_m query rows, block_n keys, warps and pipeline stages of each kernel. What bounds a row is shared memory (Q and
the streamed K and V, stage by stage) and registers (accumulators in float32).
"""

from __future__ import annotations

from typing import NamedTuple

from tilewise.spec import AttentionSpec


class Tile(NamedTuple):
    """Launch shape of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Stream tiles through the copy engine where the strides allow it."""

    def __str__(self) -> str:
        return f"{self.block_m}×{self.block_n}, {self.num_warps} warps, {self.num_stages} stages"


class TileSet(NamedTuple):
    """Launch shapes of the forward and backward kernels of one row of the table."""

    forward: Tile
    dkdv: Tile
    dq: Tile
    bias: Tile = Tile(32, 32, 4, 1)
    """Gradients of biases, which few calls ask for."""

    def __str__(self) -> str:
        return "; ".join(f"{name} {tile}" for name, tile in self._asdict().items() if name != "bias")


BUCKETS = (64, 128, 256, 512)
"""Rows are for the larger of D and Dv, rounded up to one of these."""

HOPPER = {
    64: TileSet(Tile(64, 128, 4, 2, True), Tile(128, 64, 4, 2, True), Tile(128, 64, 8, 3, True)),
    128: TileSet(Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 2, True), Tile(128, 64, 8, 3, True)),
    256: TileSet(Tile(128, 64, 8, 2, True), Tile(64, 64, 8, 2, True), Tile(64, 32, 4, 3, True)),
    512: TileSet(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}
"""float16 and bfloat16 on sm_90.

D = 64, 128, 256: the fastest of 6 to 12 shapes a kernel, measured 2026-11-21 on an H200 (torch 2.11.0, Triton 3.6.0,
bf16, N = 4096 and 16384, B·N = 16384, H·D = 2048); runners-up are 2 to 10 % slower. 512: the largest that fits, not
measured.
"""

HOPPER_BANDED = {
    64: TileSet(Tile(64, 128, 4, 3, True), Tile(128, 64, 4, 2, True), Tile(128, 64, 4, 3, True)),
    128: TileSet(Tile(64, 64, 4, 3, True), Tile(32, 64, 4, 3, True), Tile(128, 64, 8, 3, True)),
    256: TileSet(Tile(128, 64, 8, 2, True), Tile(32, 64, 8, 3, True), Tile(64, 32, 4, 3, True)),
    512: HOPPER[512],
}
"""The same with the causal rule; measured in the same run."""

HOPPER_MAPPED = {**HOPPER_BANDED, 128: HOPPER_BANDED[128]._replace(dkdv=HOPPER[128].dkdv)}
"""The same with a tile map: at 0, 50 and 90 % of random empty 128×128 blocks the backward takes 1.08, 0.56 and 0.16 of
the dense one's time, against 1.14, 0.59 and 0.16 with the causal row (N = 16384, D = 128, 16 heads, same device and
day)."""

HOPPER_WINDOW = {**HOPPER_BANDED, 64: HOPPER_BANDED[64]._replace(forward=Tile(64, 64, 4, 2, True))}
"""The same with a window: few tiles a row, and finer ones waste less at its two edges (0.45 ms against 0.53 ms and more
for block_n = 128 and block_m = 128; window 1024, N = 16384, same device and day)."""

HOPPER_LADEN = {
    64: TileSet(Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 3, True)),
    128: TileSet(Tile(64, 64, 4, 3, True), Tile(32, 64, 4, 3, True), Tile(64, 64, 4, 2, True)),
    256: TileSet(Tile(128, 64, 8, 2, True), Tile(64, 64, 8, 2, True), Tile(64, 32, 4, 3, True)),
    512: HOPPER[512],
}
"""The same where scores are modified or dropped, which takes registers beside the accumulators. Chosen for low spills,
not measured one against another; with many features at once they still spill, up to 2.8 KB a thread at D = 256."""

COMPACT = {
    64: TileSet(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: TileSet(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)),
    256: TileSet(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    512: TileSet(Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 1)),
}
"""float16 and bfloat16 elsewhere: up to 256 within the 99 KiB of shared memory of sm_86, sm_89 and sm_120. Compiled,
never run or measured."""

SINGLE = {
    64: TileSet(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    128: TileSet(Tile(32, 32, 8, 1), Tile(16, 64, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
    256: TileSet(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
    512: TileSet(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
}
"""float32, correct first: plain multiply-adds, since three TF32 products a product round about four times as coarsely.
Chosen to spill nothing where scores are not modified, not measured one against another."""

INTERPRETED = TileSet(Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1))

LARGE_SHARED = ("sm_80", "sm_90", "sm_100", "sm_103")
"""163 KiB or more a block."""


def largest_head_dim(device: str) -> int:
    """Beyond 256 the gradients of keys need 128 KiB of shared memory, which the smaller chips of a generation lack."""
    return 512 if device in ("cpu", *LARGE_SHARED) else 256


def tiles_for(spec: AttentionSpec) -> TileSet:
    """Launch shapes for a spec."""
    if spec.device == "cpu":
        return INTERPRETED
    bucket = next(size for size in BUCKETS if max(spec.head_dim, spec.v_head_dim) <= size)
    return table_for(spec)[bucket]


def table_for(spec: AttentionSpec) -> dict[int, TileSet]:
    """The rows for a spec's device, dtype and features."""
    if spec.dtype == "float32":
        return SINGLE
    if spec.device != "sm_90":
        return COMPACT
    laden = spec.softcap is not None or spec.dropout > 0.0 or spec.alibi or spec.scale <= 0.0
    if laden or spec.bias is not None or spec.relative is not None:
        return HOPPER_LADEN
    if spec.mask is not None:
        return HOPPER_MAPPED
    if spec.windowed:
        return HOPPER_WINDOW
    return HOPPER_BANDED if spec.causal else HOPPER
