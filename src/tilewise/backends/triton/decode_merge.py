"""Joins the splits of a decoding call: out = Σ out_i·2^(lse_i − lse), lse = log2 Σ 2^lse_i; and the sink, once.

One program owns one query row (a token's head) and block_dv of its columns: it reads the LSE of every split, then the
partial results that have a weight, and writes the row. Their reads come from L2, where the kernel
before left them. From sm_90 on its programs start while that kernel still runs (EARLY: programmatic dependent launch)
and wait for its end themselves, which hides the time of a launch.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from tilewise.backends.triton.features import LN2, LOG2E


@triton.jit(do_not_specialize=["stride_split", "splits", "heads", "q_rows", "columns"])
def merge_splits(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    sink_ptr,
    stride_split: tl.int64,
    splits: tl.int32,
    heads: tl.int32,
    q_rows: tl.int32,
    columns: tl.int32,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SINK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [tokens, H, Dv] and lse [B, H, q_rows] from float32 [splits, tokens, H, Dv] and [splits, tokens, H]."""
    program = tl.program_id(0)
    row = (program // columns).to(tl.int64)
    column = program % columns
    token = row // heads
    h = row - token * heads
    lanes = tl.arange(0, BLOCK_S)
    dims = column * BLOCK_DV + tl.arange(0, BLOCK_DV)
    if EARLY:
        gdc_wait()
    lse = tl.load(partial_lse_ptr + lanes * stride_split + row, mask=lanes < splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    if SINK:
        logit = tl.load(sink_ptr + h).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, logit)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(lse - base)
    total = tl.sum(weights, 0)
    if SINK:
        total += tl.exp2(logit - base)
    at = lanes[:, None] * stride_split * DV + row * DV + dims[None, :]
    # A split that saw nothing has written zeros, or, where the row's sequence is empty, nothing at all.
    found = tl.load(partial_ptr + at, mask=(weights > 0.0)[:, None] & (dims < DV)[None, :], other=0.0)
    total = tl.where(total > 0.0, total, 1.0)
    out = tl.sum(found * weights[:, None], 0) / total
    tl.store(out_ptr + row * DV + dims, out.to(out_ptr.dtype.element_ty), mask=dims < DV)
    if column == 0:
        batch = token // q_rows
        tl.store(lse_ptr + (batch * heads + h) * q_rows + token - batch * q_rows, (peak + tl.log2(total)) * LN2)
