"""dQ from the float32 accumulator: rows put in order, scaled and rounded.

The main kernel adds a warpgroup's tile of 64 × 64 to the accumulator in the order of its registers, which lets both
the store to shared memory and the copy engine run without bank conflicts. A tile's 4096 floats are, slowest index
first: column bits 5-3, row bits 5-4, row bits 2-0, column bits 2-1, row bit 3, column bit 0 (the accumulator fragment
of wgmma, PTX ISA; 16 bytes are two columns of two rows).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["heads", "q_len", "head_rows"])
def convert_dq(
    accumulator_ptr,
    dq_ptr,
    cu_q_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_n: tl.int64,
    heads: tl.int32,
    q_len: tl.int32,
    head_rows: tl.int32,
    scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dq [B, H, N, D] of one tile of 64 rows × 64 columns. Grid: (row blocks · BLOCK_D/64, B·H)."""
    block = tl.program_id(0) // (BLOCK_D // 64)
    half = tl.program_id(0) % (BLOCK_D // 64)
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
    if block * 64 >= n:
        return
    at = (batch * heads + h).to(tl.int64) * head_rows + padded + block * 64
    x = tl.load(accumulator_ptr + at * BLOCK_D + half * 4096 + tl.arange(0, 4096))
    x = tl.permute(tl.reshape(x, [8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    x = tl.reshape(x, [64, 64]) * scale
    rows = block * 64 + tl.arange(0, 64)
    columns = half * 64 + tl.arange(0, 64)
    place = batch.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    pointers = dq_ptr + place + (first + rows).to(tl.int64)[:, None] * stride_n + columns[None, :]
    tl.store(pointers, x.to(dq_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (columns < D)[None, :])
