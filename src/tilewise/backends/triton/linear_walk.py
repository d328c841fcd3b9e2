"""Linear attention's engine: outputs and all three gradients are one walk, `y_i = Σ_j w_ij (x_i·a_j) b_j`.

    role   x        a        b        order       state T = Σ w a bᵀ
    out    φ(q)     φ(k)     v        forward     S          [K, Dv]
    dq     dout     v        φ(k)     forward     Sᵀ         [Dv, K]
    dv     φ(k)     φ(q)     dout     backward    dS         [K, Dv]
    dk     v        dout     φ(q)     backward    dSᵀ        [Dv, K]

One program owns block_b columns of y for one segment of one head and walks its chunks with T [all of a, block_b] in
registers (float32). A chunk: x·T, what the tokens beyond the chunk give; x·aᵀ, masked and decayed, times b, what those
within it give; y is written; T decays by the chunk's total and takes in aᵀ·b. Four products, x a b once from HBM, y
once to it, T never. Shared memory holds the chunk's x, a, b (pipelined) and T in the operands' precision.

Decay is a compile-time parameter. NONE; TOKEN: weights are e^{differences of running sums}, rows and columns of the
chunk's scores; CHANNEL: weights differ along K, so they multiply x and a (out, dv) or b and y (dq, dk), with exponents
counted from the chunk's start or end, and what happens within the chunk comes from `linear_scores.py`. No exponent is
ever positive. Normalised: `out` also sums the denominator; dq and dk add its gradient e to every score of its row.

Sources: Katharopoulos et al. (2020); Yang et al., GLA (2023); that all gradients are one walk is this library's.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.backends.triton.linear_tiles import (
    CHANNEL,
    EPSILON,
    NONE,
    TOKEN,
    channel_decay,
    load_rows,
    locate,
    mapped,
    product,
    slope,
    token_decay,
)

OUT, DQ, DV, DK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit(do_not_specialize=["heads", "segments", "n", "length"])
def walk(
    x_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    source_ptr,
    s_ptr,
    z_ptr,
    e_ptr,
    den_ptr,
    gate_ptr,
    inner_ptr,
    moved_ptr,
    cu_ptr,
    slot_sequence,
    first_slot,
    stride_xb: tl.int64,
    stride_xh: tl.int64,
    stride_xn: tl.int64,
    stride_ab: tl.int64,
    stride_ah: tl.int64,
    stride_an: tl.int64,
    stride_bb: tl.int64,
    stride_bh: tl.int64,
    stride_bn: tl.int64,
    stride_yb: tl.int64,
    stride_yh: tl.int64,
    stride_yn: tl.int64,
    stride_cb: tl.int64,
    stride_ch: tl.int64,
    stride_cn: tl.int64,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gn: tl.int64,
    stride_moved: tl.int64,
    heads: tl.int32,
    segments: tl.int32,
    n: tl.int32,
    length: tl.int32,
    scale: tl.float32,
    ROLE: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    STATE: tl.constexpr,
    DECAY: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    FEATURE: tl.constexpr,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GATES: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of every segment. STATE: there are states to begin with; GATES: write what the decays' gradient is made of."""
    REVERSE: tl.constexpr = ROLE >= 2
    KEYED: tl.constexpr = (ROLE & 1) == 0
    blocks_b: tl.constexpr = (DB + BLOCK_B - 1) // BLOCK_B
    program = tl.program_id(0)
    block_b = program % blocks_b
    h = program // blocks_b % heads
    slot = program // blocks_b // heads
    sequence, batch, first, live = locate(slot, segments, n, cu_ptr, slot_sequence, first_slot, length, PACKED)
    if live <= 0:
        return
    a_dims = tl.arange(0, BLOCK_A)
    b_dims = block_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offsets = tl.arange(0, CHUNK)
    head = (batch * heads + h).to(tl.int64)
    x_ptr += batch * stride_xb + h * stride_xh + first * stride_xn
    y_ptr += batch * stride_yb + h * stride_yh + first * stride_yn
    if CAUSAL:
        a_ptr += batch * stride_ab + h * stride_ah + first * stride_an
        b_ptr += batch * stride_bb + h * stride_bh + first * stride_bn
    if DECAY != NONE:
        gate_ptr += batch * stride_gb + h * stride_gh + first * stride_gn
    if not KEYED:
        source_ptr += batch * stride_cb + h * stride_ch + first * stride_cn
    if NORMALIZE and ROLE == OUT:
        den_ptr += head * n + first
    if NORMALIZE and not KEYED:
        e_ptr += head * n + first

    t_inside = (a_dims < DA)[:, None] & (b_dims < DB)[None, :]
    state = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    z = tl.zeros([BLOCK_A if ROLE == OUT else BLOCK_B], tl.float32)
    if STATE:
        place = (slot if CAUSAL else sequence).to(tl.int64) * heads + h
        if KEYED:
            s_ptrs = s_ptr + place * DA * DB + a_dims[:, None] * DB + b_dims[None, :]
        else:
            s_ptrs = s_ptr + place * DA * DB + a_dims[:, None] + b_dims[None, :] * DA
        state = tl.load(s_ptrs, mask=t_inside, other=0.0)
        if NORMALIZE and ROLE == OUT:
            z = tl.load(z_ptr + place * DA + a_dims, mask=a_dims < DA, other=0.0)
        if NORMALIZE and not KEYED:
            z = tl.load(z_ptr + place * DB + b_dims, mask=b_dims < DB, other=0.0)

    chunks = (live + CHUNK - 1) // CHUNK
    for t in range(0, chunks):
        start = t * CHUNK
        if REVERSE:
            start = (chunks - 1 - t) * CHUNK
        rows = start + offsets
        x = load_rows(x_ptr, stride_xn, rows, live, a_dims, DA)
        if KEYED:
            x = mapped(x, scale, rows, live, a_dims, DA, FEATURE, SCALED and ROLE == OUT)
        if CAUSAL:
            a = load_rows(a_ptr, stride_an, rows, live, a_dims, DA)
            b = load_rows(b_ptr, stride_bn, rows, live, b_dims, DB)
            if KEYED:
                a = mapped(a, scale, rows, live, a_dims, DA, FEATURE, SCALED and ROLE == DV)
            else:
                b = mapped(b, scale, rows, live, b_dims, DB, FEATURE, SCALED and ROLE == DK)
        e = tl.zeros([CHUNK], tl.float32)
        if NORMALIZE and not KEYED:
            e = tl.load(e_ptr + rows, mask=rows < live, other=0.0)

        if CAUSAL and DECAY != CHANNEL:
            p = product(x, tl.trans(a), tl.zeros([CHUNK, CHUNK], tl.float32), PRECISION)
            if NORMALIZE and ROLE == DQ:
                p += e[:, None]
            if NORMALIZE and ROLE == DK:
                p += e[None, :]
            ahead = offsets[:, None] - offsets[None, :]
            seen = ahead <= 0 if REVERSE else ahead >= 0
            if DECAY == TOKEN:
                sums, last = token_decay(gate_ptr, stride_gn, rows, live)
                if REVERSE:
                    exponent = sums[None, :] - sums[:, None]
                    beyond = tl.exp(last - sums)
                    within = tl.exp(sums)
                else:
                    exponent = sums[:, None] - sums[None, :]
                    beyond = tl.exp(sums)
                    within = tl.exp(last - sums)
                p = tl.where(seen, p * tl.exp(tl.minimum(exponent, 0.0)), 0.0)
            else:
                p = tl.where(seen, p, 0.0)
        if DECAY == CHANNEL and KEYED:
            sums_x, last = channel_decay(gate_ptr, rows, start, live, a_dims, DA, EXCLUSIVE and ROLE == OUT, CHUNK)
            sums_a = sums_x
            if EXCLUSIVE:
                sums_a, _ = channel_decay(gate_ptr, rows, start, live, a_dims, DA, ROLE == DV, CHUNK)
            if REVERSE:
                x = (x.to(tl.float32) * tl.exp(last[None, :] - sums_x)).to(x.dtype)
                a = (a.to(tl.float32) * tl.exp(sums_a)).to(a.dtype)
            else:
                x = (x.to(tl.float32) * tl.exp(sums_x)).to(x.dtype)
                a = (a.to(tl.float32) * tl.exp(last[None, :] - sums_a)).to(a.dtype)
            inner = inner_ptr + (head * n + first + start) * CHUNK
            if REVERSE:
                inner += offsets[None, :] * CHUNK + offsets[:, None]
                p = tl.load(inner, mask=(rows < live)[None, :], other=0.0)
            else:
                inner += offsets[:, None] * CHUNK + offsets[None, :]
                p = tl.load(inner, mask=(rows < live)[:, None], other=0.0)
        if DECAY == CHANNEL and not KEYED:
            sums_x, last = channel_decay(gate_ptr, rows, start, live, b_dims, DB, EXCLUSIVE and ROLE == DQ, CHUNK)
            sums_b = sums_x
            if EXCLUSIVE:
                sums_b, _ = channel_decay(gate_ptr, rows, start, live, b_dims, DB, ROLE == DK, CHUNK)

        if x.dtype == tl.float16:
            y = product(x, state, tl.zeros([CHUNK, BLOCK_B], tl.float32), PRECISION)
        else:
            y = tl.dot(x, state.to(x.dtype), input_precision=PRECISION)
        if NORMALIZE and ROLE == OUT:
            den = tl.sum(x.to(tl.float32) * z[None, :], 1)
        if NORMALIZE and ROLE == DQ:
            y += e[:, None] * z[None, :]
        if NORMALIZE and ROLE == DK:
            y += z[None, :]
        if CAUSAL:
            if DECAY == TOKEN:
                y *= beyond[:, None]
                if NORMALIZE and ROLE == OUT:
                    den *= beyond
            if DECAY == CHANNEL and not KEYED:
                if REVERSE:
                    y *= tl.exp(last[None, :] - sums_x)
                else:
                    y *= tl.exp(sums_x)
                inner = inner_ptr + (head * n + first + rows)[:, None] * DB + b_dims[None, :]
                y += tl.load(inner, mask=(rows < live)[:, None] & (b_dims < DB)[None, :], other=0.0)
            else:
                if x.dtype == a.dtype:  # else dout / den, which may be beyond float16's range, and so may be p
                    p = p.to(b.dtype)
                y = product(p, b, y, PRECISION)
                if NORMALIZE and ROLE == OUT:
                    den += tl.sum(p.to(tl.float32), 1)
        if NORMALIZE and ROLE == OUT:
            den += EPSILON
            y /= den[:, None]
            if block_b == 0:
                tl.store(den_ptr + rows, den, mask=rows < live)
        y_inside = (rows < live)[:, None] & (b_dims < DB)[None, :]
        if not KEYED:
            source = load_rows(source_ptr, stride_cn, rows, live, b_dims, DB)
            if GATES:
                moved = mapped(source.to(tl.float32), scale, rows, live, b_dims, DB, FEATURE, SCALED and ROLE == DQ) * y
                if DECAY == TOKEN:
                    tl.store(
                        moved_ptr + block_b * stride_moved + head * n + first + rows, tl.sum(moved, 1), mask=rows < live
                    )
                else:
                    tl.store(
                        moved_ptr + (head * n + first + rows)[:, None] * DB + b_dims[None, :], moved, mask=y_inside
                    )
            if FEATURE != 0:
                y *= slope(source, FEATURE)
            if SCALED and ROLE == DQ:
                y *= scale
        y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * stride_yn + b_dims[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_inside)

        if CAUSAL:
            if DECAY == TOKEN:
                b = (b.to(tl.float32) * within[:, None]).to(b.dtype)
                state *= tl.exp(last)
                z *= tl.exp(last)
                if NORMALIZE and ROLE == OUT:
                    z += tl.sum(a.to(tl.float32) * within[:, None], 0)
            if DECAY == CHANNEL and KEYED:
                state *= tl.exp(last)[:, None]
            if DECAY == CHANNEL and not KEYED:
                if REVERSE:
                    b = (b.to(tl.float32) * tl.exp(sums_b)).to(b.dtype)
                else:
                    b = (b.to(tl.float32) * tl.exp(last[None, :] - sums_b)).to(b.dtype)
                state *= tl.exp(last)[None, :]
                z *= tl.exp(last)
            if DECAY == CHANNEL and NORMALIZE and ROLE == OUT:
                z *= tl.exp(last)
            if NORMALIZE and ROLE == OUT and DECAY != TOKEN:
                z += tl.sum(a.to(tl.float32), 0)
            if NORMALIZE and ROLE == DQ:
                z += tl.sum(b.to(tl.float32), 0)
            if NORMALIZE and ROLE == DK:
                z += tl.sum(b.to(tl.float32) * e[:, None], 0)
            state = product(tl.trans(a), b, state, PRECISION)
