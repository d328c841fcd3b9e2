"""Launch shapes as data: which configuration of the forward kernel runs for which head dim and kind of problem.

Nothing is tuned at run time. A row gives the consumer warpgroups of 64 query rows, keys a block, stages, and how
operands are held; `REGISTERS` follows from the warpgroups. Measured 2026-11-20 to 22 on H200s (torch 2.11.0, Triton
3.6.0, bf16, B·N = 16384, H·D = 2048, medians of interleaved runs). Under Triton 3.6 and 3.7 none spills in its loops.
"""

from __future__ import annotations

from typing import NamedTuple

from tilewise.spec import AttentionSpec

REGISTERS = {2: 240, 3: 160, 4: 112}
"""Registers a thread of each consumer, by how many there are: the producer's 24 and these fill the 64 Ki."""


class ForwardConfig(NamedTuple):
    """One selectable shape of the forward kernel."""

    block_d: int
    """Columns of Q and K tiles; D is padded to it."""
    block_dv: int
    warpgroups: int
    block_n: int
    stages: int = 2
    q_in_registers: bool = False
    """Q as wgmma's register operand: less shared-memory traffic, and its buffer is free at once."""
    q_buffers: int = 1
    """Buffers of Q a consumer, 1 or 2: with two, the next tile's rows come while this one's are read."""
    out_over_q: bool = False
    """The output leaves through Q's buffer, where shared memory is short."""
    chains: int = 2
    """Independent chains of comparisons in a row maximum; 0 for the compiler's own."""

    def __str__(self) -> str:
        held = ", Q in registers" if self.q_in_registers else ", two buffers of Q" if self.q_buffers == 2 else ""
        return f"{64 * self.warpgroups}×{self.block_n}, {self.warpgroups} consumers, {self.stages} stages{held}"

    @property
    def shared_bytes(self) -> int:
        """Shared memory of the tiles."""
        rows = 64 * self.warpgroups
        q, kv = self.q_buffers * rows * self.block_d, self.stages * self.block_n * (self.block_d + self.block_dv)
        return 2 * (q + kv + (0 if self.out_over_q else rows * self.block_dv))


D64_LONG = ForwardConfig(64, 64, 3, 128)
"""Three consumers of 160 registers: more warps to hide exponentials behind products, of which D = 64 has few."""

D64_SHORT = ForwardConfig(64, 64, 4, 64, stages=3)
"""Four of 112 registers hide short tiles' prologues better: N up to 2048, causal up to 4096; and packed sequences (64
of 512, TFLOP/s: 381 full and 236 causal, against 328 and 150 with three consumers, 321 and 190 with two). Three stages
for two: N = 512 and packed sequences up to +5 %, N = 2048 without a causal rule 0 to −1 %."""

D64_AHEAD = D64_SHORT._replace(q_buffers=2)
"""The same with the next tile's rows fetched ahead: N = 512 401 → 418 full and 265 → 284 causal, from N = 1024 on
nothing. Packed sequences, a soft cap and positions from a tensor leave none of 112 registers for one more address."""

D64_NARROW = ForwardConfig(64, 64, 2, 128, q_in_registers=True)
"""128 rows, which a tile map's base tiles hold whole and a window's edges waste less of: window 1024 at N = 16384 takes
0.408 ms against 0.420 with three consumers and 0.415 with four, Q in shared memory. Q in registers: maps 2 % faster."""

D128 = ForwardConfig(128, 128, 2, 128)
"""Two consumers of 240 registers. Three lose 3 to 5 %, block_n = 64 loses 9 to 17 %."""

D128_HELD = D128._replace(q_in_registers=True)
"""Less shared-memory traffic: +1 % without a causal rule; up to N = 2048 also with one, as Q's buffer is free at once
(N = 512 325 → 334, 1024 461 → 468, 2048 555 → 564 TFLOP/s); window 1024 at N = 16384 takes 0.275 ms against 0.285."""

D192 = ForwardConfig(256, 128, 2, 64, chains=0)
"""D of 136 to 256 with Dv of 72 to 128, as in the expanded form of latent attention. Not measured against others."""

D256 = ForwardConfig(256, 256, 2, 64, out_over_q=True, chains=0)
"""What fits: 192 KiB of tiles, accumulators of 128 registers. block_n = 128 spills."""

SELECTABLE = (D64_LONG, D64_SHORT, D64_AHEAD, D64_NARROW, D128, D128_HELD, D192, D256)
"""Every configuration that `forward_config` may choose."""


def block_dims(head_dim: int, v_head_dim: int) -> tuple[int, int]:
    """Columns of the tiles that hold D and Dv: both the same, except for a value head that is half as wide."""
    d, dv = (next(size for size in (64, 128, 256) if dim <= size) for dim in (head_dim, v_head_dim))
    return (256, 128) if (d, dv) == (256, 128) else (max(d, dv), max(d, dv))


def forward_config(spec: AttentionSpec) -> ForwardConfig:
    """The configuration of a spec."""
    blocks = block_dims(spec.head_dim, spec.v_head_dim)
    left, right = spec.reach
    window = spec.mask is None and left is not None and right is not None
    if blocks == (64, 64):
        if spec.mask is not None or (window and not spec.packed):
            return D64_NARROW
        short = spec.q_len <= 2048 or (right is not None and spec.q_len <= 4096)
        if not (spec.packed or short):
            return D64_LONG
        crowded = spec.packed or spec.softcap is not None or spec.q_offset == "tensor"
        return D64_SHORT if crowded else D64_AHEAD
    if blocks == (128, 128):
        held = spec.mask is None and not spec.packed and (window or right is None or spec.q_len <= 2048)
        return D128_HELD if held else D128
    return D192 if blocks == (256, 128) else D256
