"""Linear attention token by token, for decoding: one kernel for a few tokens, whatever came before them.

One program owns block_v columns of one head's state S [K, Dv], in registers (float32): it loads them, and for every
token decays them, takes in φ(k)ᵀ v, reads φ(q)·S, and at the end writes them. A step reads and writes the state once,
so its time is the state's size over the memory's bandwidth, the same at token 1,000 and 1,000,000. z [K] is kept by
every program and written by the first.

Source: Katharopoulos et al., "Transformers are RNNs" (2020), section 3.4.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.backends.triton.linear_tiles import CHANNEL, EPSILON, LEAST, TOKEN, load_rows, mapped


@triton.jit(do_not_specialize=["heads", "n"])
def recur(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    den_ptr,
    gate_ptr,
    begin_s_ptr,
    begin_z_ptr,
    end_s_ptr,
    end_z_ptr,
    cu_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qn: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_on: tl.int64,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gn: tl.int64,
    heads: tl.int32,
    n: tl.int32,
    scale: tl.float32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BEGIN: tl.constexpr,
    BEGIN_Z: tl.constexpr,
    END: tl.constexpr,
    DECAY: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    FEATURE: tl.constexpr,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """out, den and the final state of block_v value columns of one sequence's head."""
    blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % blocks
    h = program // blocks % heads
    sequence = program // blocks // heads
    batch = sequence
    first = 0
    live = n
    if PACKED:
        batch = 0
        first = tl.load(cu_ptr + sequence)
        live = tl.load(cu_ptr + sequence + 1) - first
    dims = tl.arange(0, BLOCK_D)
    v_dims = block * BLOCK_V + tl.arange(0, BLOCK_V)
    one = tl.arange(0, 1)
    q_ptr += batch * stride_qb + h * stride_qh + first * stride_qn
    k_ptr += batch * stride_kb + h * stride_kh + first * stride_kn
    v_ptr += batch * stride_vb + h * stride_vh + first * stride_vn
    out_ptr += batch * stride_ob + h * stride_oh + first * stride_on
    gate_ptr += batch * stride_gb + h * stride_gh + first * stride_gn
    own = (sequence * heads + h).to(tl.int64)
    within = own * D * DV + dims[:, None] * DV + v_dims[None, :]
    inside = (dims < D)[:, None] & (v_dims < DV)[None, :]
    s = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    z = tl.zeros([BLOCK_D], tl.float32)
    if BEGIN:
        s = tl.load(begin_s_ptr + within, mask=inside, other=0.0)
    if BEGIN_Z:
        z = tl.load(begin_z_ptr + own * D + dims, mask=dims < D, other=0.0)
    for i in range(0, live):
        row = i + one
        q = tl.sum(
            mapped(
                load_rows(q_ptr, stride_qn, row, live, dims, D).to(tl.float32),
                scale,
                row,
                live,
                dims,
                D,
                FEATURE,
                SCALED,
            ),
            0,
        )
        k = tl.sum(
            mapped(
                load_rows(k_ptr, stride_kn, row, live, dims, D).to(tl.float32), 1.0, row, live, dims, D, FEATURE, False
            ),
            0,
        )
        v = tl.sum(load_rows(v_ptr, stride_vn, row, live, v_dims, DV).to(tl.float32), 0)
        if EXCLUSIVE:
            out = tl.sum(q[:, None] * s, 0)
        if DECAY == TOKEN:
            kept = tl.exp(tl.maximum(tl.load(gate_ptr + i * stride_gn).to(tl.float32), LEAST))
            s *= kept
            z *= kept
        if DECAY == CHANNEL:
            gate = tl.load(gate_ptr + i * stride_gn + dims, mask=dims < D, other=0.0).to(tl.float32)
            kept = tl.exp(tl.maximum(gate, LEAST))
            s *= kept[:, None]
            z *= kept
        s += k[:, None] * v[None, :]
        z += k
        if not EXCLUSIVE:
            out = tl.sum(q[:, None] * s, 0)
        if NORMALIZE:
            den = tl.sum(q * z, 0) + EPSILON
            out /= den
            if block == 0:
                tl.store(den_ptr + (batch * heads + h).to(tl.int64) * n + first + i, den)
        tl.store(out_ptr + i * stride_on + v_dims, out.to(out_ptr.dtype.element_ty), mask=v_dims < DV)
    if END:
        tl.store(end_s_ptr + within, s, mask=inside)
        if NORMALIZE and block == 0:
            tl.store(end_z_ptr + own * D + dims, z, mask=dims < D)
