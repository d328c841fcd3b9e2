"""What the backward of normalised linear attention needs of a row before its walks.

With out = num / den: dnum = dout / den, and the gradient of den is e = −rowsum(dout∘out) / den. One program takes
block_m rows of one head; both go to memory once, so that three walks read them as if there were no denominator.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.backends.triton.linear_tiles import load_rows


@triton.jit(do_not_specialize=["heads", "n"])
def denominator_gradient(
    dout_ptr,
    out_ptr,
    den_ptr,
    dnum_ptr,
    e_ptr,
    stride_db: tl.int64,
    stride_dh: tl.int64,
    stride_dn: tl.int64,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_on: tl.int64,
    heads: tl.int32,
    n: tl.int32,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dnum [B, H, N, DV] and e [B, H, N]."""
    tiles = (n + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    h = program // tiles % heads
    b = program // tiles // heads
    dims = tl.arange(0, BLOCK_V)
    head = (b * heads + h).to(tl.int64) * n
    dout = load_rows(dout_ptr + b * stride_db + h * stride_dh, stride_dn, rows, n, dims, DV).to(tl.float32)
    out = load_rows(out_ptr + b * stride_ob + h * stride_oh, stride_on, rows, n, dims, DV).to(tl.float32)
    den = tl.load(den_ptr + head + rows, mask=rows < n, other=1.0)
    dnum = dout / den[:, None]
    tl.store(e_ptr + head + rows, -tl.sum(dnum * out, 1), mask=rows < n)
    at = (head + rows)[:, None] * DV + dims[None, :]
    inside = (rows < n)[:, None] & (dims < DV)[None, :]
    tl.store(dnum_ptr + at, dnum.to(dnum_ptr.dtype.element_ty), mask=inside)
