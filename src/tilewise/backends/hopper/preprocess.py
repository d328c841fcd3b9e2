"""What the backward needs of each query row besides its scores: LSE in log2 units and Δ = rowsum(dO∘O) − dLSE.

One program does BLOCK rows of one head, and on its way zeroes their part of the float32 accumulator of dQ, if there is
one, to which the main kernel adds: all three stages of memory traffic (read O and dO, write zeros) then run at once.
Rows are padded to pairs of blocks of 64, each sequence of a packed batch for itself; a padded row and one that saw
nothing get an LSE of +∞, which makes their P, and with it all that they add to a gradient, exactly 0.

With a sink, also −Σ P_sink∘Δ over the program's rows, the sink's gradient in parts (P_sink = e^{sink − LSE}).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["heads", "q_len", "q_rows", "head_rows"])
def row_statistics(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    sink_ptr,
    cu_q_ptr,
    statistics_ptr,
    dq_ptr,
    dsink_ptr,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_on: tl.int64,
    stride_db: tl.int64,
    stride_dh: tl.int64,
    stride_dn: tl.int64,
    heads: tl.int32,
    q_len: tl.int32,
    q_rows: tl.int32,
    head_rows: tl.int32,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    DLSE: tl.constexpr,
    SINK: tl.constexpr,
):
    """statistics [B·H·head_rows/64, 2, 64]: LSE·log2 e, then Δ, of 64 rows. dsink [B, H, tiles]. Grid: (tiles, B·H)."""
    tile = tl.program_id(0)
    h = tl.program_id(1) % heads
    b = tl.program_id(1) // heads
    first = 0
    n = q_len
    padded = 0
    batch = b
    if PACKED:
        first = tl.load(cu_q_ptr + b)
        n = tl.load(cu_q_ptr + b + 1) - first
        padded = (first + b * 128) // 128 * 128
        batch = 0
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    live = rows < n
    part = 0.0
    if tile * BLOCK < (n + 127) // 128 * 128:
        columns = tl.arange(0, BLOCK_D)
        mask = live[:, None] & (columns < DV)[None, :]
        tokens = (first + rows).to(tl.int64)[:, None]
        place = batch.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
        out = tl.load(out_ptr + place + tokens * stride_on + columns[None, :], mask=mask, other=0.0)
        place = batch.to(tl.int64) * stride_db + h.to(tl.int64) * stride_dh
        dout = tl.load(dout_ptr + place + tokens * stride_dn + columns[None, :], mask=mask, other=0.0)
        head = (batch * heads + h).to(tl.int64)
        at = head * head_rows + padded + tile * BLOCK
        if dq_ptr is not None:
            zeros = tl.zeros([BLOCK * BLOCK_D], tl.float32)
            tl.store(dq_ptr + at * BLOCK_D + tl.arange(0, BLOCK * BLOCK_D), zeros)
        lse = tl.load(lse_ptr + head * q_rows + first + rows, mask=live, other=float("-inf"))
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        if DLSE:
            delta -= tl.load(dlse_ptr + head * q_rows + first + rows, mask=live, other=0.0)
        seen = lse != float("-inf")
        places = statistics_ptr + at * 2 + tl.arange(0, BLOCK) // 64 * 64 + tl.arange(0, BLOCK)
        tl.store(places, tl.where(seen, lse * LOG2E, float("inf")))
        tl.store(places + 64, delta)
        if SINK:
            sink = tl.load(sink_ptr + h).to(tl.float32)
            share = tl.exp2(tl.where(seen, (sink - lse) * LOG2E, -float("inf")))
            part = -tl.sum(share * delta, 0)
    if SINK:
        tl.store(dsink_ptr + tl.program_id(1) * tl.num_programs(0) + tile, part)
