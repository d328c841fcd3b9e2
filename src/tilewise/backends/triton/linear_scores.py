"""Linear attention with a decay per key channel: what happens within a chunk, which is where the exponents differ.

`w_ij = Σ_d q_id k_jd e^{G_id − G_jd}` with G the running sums of the log decays. A product of `q e^{G}` and `k e^{−G}`
would overflow. So a chunk is cut into subchunks of 16 rows: between subchunks the exponent splits at the sum A before
the row's own subchunk, `q e^{G_i − A} · k e^{A − G_j}`, both at most 0, and goes through the tensor cores. Within a
subchunk one of the two is positive. Where the whole subchunk decays by less than e^{−40} (e^{−8} in float16), as with
gates that let anything through, A moves half way into it, so that both stay within ±20 (±4), and one product serves it
too; otherwise every exponent is formed for itself, key by key. Where that holds of the whole chunk (WHOLE), all of it
is one product, split half way.

`running_sums`: G from the decays, float32, counted from each chunk's start. `inner_scores`: one program owns the rows
of one subchunk and writes their w [16, chunk]. `inner_gradients`: one program owns the rows of one subchunk and writes
what the chunk gives to their dq (as queries) and dk (as keys), float32, from dw_ij = dout_i·v_j (+ e_i). With WHOLE a
program owns a chunk, and does one subchunk after the other where it must.
`decay_gradient`: the log decay at t moves every pair j < t ≤ i: the suffix sum of q∘dq − k∘dk within the segment, plus
what crosses its end.

Sources: Yang et al., GLA (2023), secondary chunking; Zhang et al., "Gated Slot Attention" (2024) uses the same split.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.backends.triton.linear_tiles import (
    LEAST,
    channel_decay,
    load_rows,
    locate,
    mapped,
)

SUBCHUNK = tl.constexpr(16)
"""Rows, the least that tensor cores take."""


@triton.jit
def _edges(sums_ptr, start, own, end, dims, D: tl.constexpr, HALF: tl.constexpr):
    """Where the exponents of a subchunk's queries and of its keys split, and whether the subchunk itself may be split.

    The running sums before it and at its end; half way between these if it may.
    """
    before = tl.load(sums_ptr + tl.maximum(own - 1, 0) * D + dims, mask=dims < D, other=0.0)
    before = tl.where(own > start, before, 0.0)
    last = tl.load(sums_ptr + (end - 1) * D + dims, mask=dims < D, other=0.0)
    safe = tl.max(before - last, 0) < (8.0 if HALF else 40.0)
    middle = 0.5 * (before + last)
    return tl.where(safe, middle, before), tl.where(safe, middle, last), safe


@triton.jit
def _middle(sums_ptr, end, dims, D: tl.constexpr):
    """Half of what a chunk that ends before row `end` decays by."""
    return 0.5 * tl.load(sums_ptr + (end - 1) * D + dims, mask=dims < D, other=0.0)


@triton.jit
def _whole_is_safe(sums_ptr, end, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Whether a chunk that ends before row `end` decays so little in every channel that it need not be cut."""
    most = 0.0
    for block in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        dims = block * BLOCK_D + tl.arange(0, BLOCK_D)
        last = tl.load(sums_ptr + (end - 1) * D + dims, mask=dims < D, other=0.0)
        most = tl.maximum(most, tl.max(-last, 0))
    return most < (8.0 if HALF else 40.0)


@triton.jit(do_not_specialize=["heads", "segments", "n", "length"])
def running_sums(
    gate_ptr,
    sums_ptr,
    cu_ptr,
    slot_sequence,
    first_slot,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gn: tl.int64,
    heads: tl.int32,
    segments: tl.int32,
    n: tl.int32,
    length: tl.int32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """sums [B, H, N, D] of one chunk's decays; program: (slot, head, chunk, block of channels)."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    dims = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    chunks = length // CHUNK
    start = program // blocks % chunks * CHUNK
    h = program // blocks // chunks % heads
    slot = program // blocks // chunks // heads
    _, batch, first, live = locate(slot, segments, n, cu_ptr, slot_sequence, first_slot, length, PACKED)
    if start >= live:
        return
    rows = start + tl.arange(0, CHUNK)
    gate_ptr += batch * stride_gb + h * stride_gh + first * stride_gn
    gate = tl.maximum(load_rows(gate_ptr, stride_gn, rows, live, dims, D).to(tl.float32), LEAST)
    sums_ptr += ((batch * heads + h).to(tl.int64) * n + first) * D
    inside = (rows < live)[:, None] & (dims < D)[None, :]
    tl.store(sums_ptr + rows[:, None] * D + dims[None, :], tl.cumsum(gate, 0), mask=inside)


@triton.jit
def _corner(
    program, heads, segments, n, length, cu_ptr, slot_sequence, first_slot, ROWS: tl.constexpr, PACKED: tl.constexpr
):
    """Head, batch row, first token and length of the segment, and the first of the program's rows."""
    pieces = length // ROWS
    own = program % pieces * ROWS
    h = program // pieces % heads
    slot = program // pieces // heads
    _, batch, first, live = locate(slot, segments, n, cu_ptr, slot_sequence, first_slot, length, PACKED)
    return h, batch, first, live, own


@triton.jit
def _subchunk_scores(
    q_ptr, k_ptr, sums_ptr, scores_ptr, stride_qn, stride_kn, live, own, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, EXCLUSIVE: tl.constexpr, FEATURE: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [16, CHUNK] of the rows from `own`; pointers to the segment's first token."""
    start = own // CHUNK * CHUNK
    rows = own + tl.arange(0, SUBCHUNK)
    cols = start + tl.arange(0, CHUNK)
    one = tl.arange(0, 1)
    SHIFT = tl.constexpr(1 if EXCLUSIVE else 0)
    end = tl.minimum(own + SUBCHUNK, live)
    scores = tl.zeros([SUBCHUNK, CHUNK], tl.float32)
    for block in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        dims = block * BLOCK_D + tl.arange(0, BLOCK_D)
        q = mapped(load_rows(q_ptr, stride_qn, rows, live, dims, D), scale, rows, live, dims, D, FEATURE, SCALED)
        sums_q, _ = channel_decay(sums_ptr, rows, start, live, dims, D, EXCLUSIVE, CHUNK)
        anchor, _, safe = _edges(sums_ptr, start, own, end, dims, D, q.dtype == tl.float16)
        near = tl.where(safe, end, own)
        if near > start:
            k = mapped(load_rows(k_ptr, stride_kn, cols, near, dims, D), 1.0, cols, near, dims, D, FEATURE, False)
            sums_k = load_rows(sums_ptr, D, cols, near, dims, D)
            left = q.to(tl.float32) * tl.exp(sums_q - anchor[None, :])
            right = tl.where((cols < near)[:, None], k.to(tl.float32) * tl.exp(anchor[None, :] - sums_k), 0.0)
            part = tl.dot(left.to(q.dtype), tl.trans(right.to(q.dtype)), input_precision=PRECISION)
            scores += tl.where(cols[None, :] <= rows[:, None] - SHIFT, part, 0.0)
        for step in range(tl.where(safe, 16, 0), 16):
            j = own + step + one
            k = mapped(load_rows(k_ptr, stride_kn, j, live, dims, D), 1.0, j, live, dims, D, FEATURE, False)
            sums_k = load_rows(sums_ptr, D, j, live, dims, D)
            kept = tl.exp(tl.minimum(sums_q - sums_k, 0.0))
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32) * kept, 1)
            if EXCLUSIVE:
                seen = (cols[None, :] == own + step) & (rows > own + step)[:, None]
            else:
                seen = (cols[None, :] == own + step) & (rows >= own + step)[:, None]
            scores += tl.where(seen, score[:, None], 0.0)
    out = scores_ptr + rows[:, None] * CHUNK + (cols - start)[None, :]
    tl.store(out, scores.to(scores_ptr.dtype.element_ty), mask=(rows < live)[:, None])


@triton.jit
def _chunk_scores(
    q_ptr, k_ptr, sums_ptr, scores_ptr, stride_qn, stride_kn, live, start, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, EXCLUSIVE: tl.constexpr, FEATURE: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [CHUNK, CHUNK] of a chunk that decays little."""
    rows = start + tl.arange(0, CHUNK)
    SHIFT = tl.constexpr(1 if EXCLUSIVE else 0)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        dims = block * BLOCK_D + tl.arange(0, BLOCK_D)
        q = mapped(load_rows(q_ptr, stride_qn, rows, live, dims, D), scale, rows, live, dims, D, FEATURE, SCALED)
        k = mapped(load_rows(k_ptr, stride_kn, rows, live, dims, D), 1.0, rows, live, dims, D, FEATURE, False)
        sums_q, _ = channel_decay(sums_ptr, rows, start, live, dims, D, EXCLUSIVE, CHUNK)
        sums_k = load_rows(sums_ptr, D, rows, live, dims, D)
        middle = _middle(sums_ptr, tl.minimum(start + CHUNK, live), dims, D)[None, :]
        left = (q.to(tl.float32) * tl.exp(sums_q - middle)).to(q.dtype)
        right = (k.to(tl.float32) * tl.exp(middle - sums_k)).to(q.dtype)
        scores = tl.dot(left, tl.trans(right), scores, input_precision=PRECISION)
    scores = tl.where(rows[None, :] <= rows[:, None] - SHIFT, scores, 0.0)
    out = scores_ptr + rows[:, None] * CHUNK + (rows - start)[None, :]
    tl.store(out, scores.to(scores_ptr.dtype.element_ty), mask=(rows < live)[:, None])


@triton.jit(do_not_specialize=["heads", "segments", "n", "length"])
def inner_scores(
    q_ptr,
    k_ptr,
    sums_ptr,
    scores_ptr,
    cu_ptr,
    slot_sequence,
    first_slot,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qn: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    heads: tl.int32,
    segments: tl.int32,
    n: tl.int32,
    length: tl.int32,
    scale: tl.float32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    FEATURE: tl.constexpr,
    SCALED: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """scores [B, H, N, CHUNK], 0 where a row sees nothing."""
    ROWS: tl.constexpr = CHUNK if WHOLE else SUBCHUNK
    h, batch, first, live, own = _corner(
        tl.program_id(0), heads, segments, n, length, cu_ptr, slot_sequence, first_slot, ROWS, PACKED
    )
    if own >= live:
        return
    head = (batch * heads + h).to(tl.int64) * n + first
    q_ptr += batch * stride_qb + h * stride_qh + first * stride_qn
    k_ptr += batch * stride_kb + h * stride_kh + first * stride_kn
    sums_ptr += head * D
    scores_ptr += head * CHUNK
    begin = own
    if WHOLE:
        end = tl.minimum(own + CHUNK, live)
        if _whole_is_safe(sums_ptr, end, D, BLOCK_D, q_ptr.dtype.element_ty == tl.float16):
            _chunk_scores(
                q_ptr, k_ptr, sums_ptr, scores_ptr, stride_qn, stride_kn, live, own, scale,
                D, BLOCK_D, CHUNK, EXCLUSIVE, FEATURE, SCALED, PRECISION,
            )  # fmt: skip
            begin = end
        for piece in range(begin, end, SUBCHUNK):
            _subchunk_scores(
                q_ptr, k_ptr, sums_ptr, scores_ptr, stride_qn, stride_kn, live, piece, scale,
                D, BLOCK_D, CHUNK, EXCLUSIVE, FEATURE, SCALED, PRECISION,
            )  # fmt: skip
    else:
        _subchunk_scores(
            q_ptr, k_ptr, sums_ptr, scores_ptr, stride_qn, stride_kn, live, own, scale,
            D, BLOCK_D, CHUNK, EXCLUSIVE, FEATURE, SCALED, PRECISION,
        )  # fmt: skip


@triton.jit
def _subchunk_gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, e_ptr, sums_ptr, dq_ptr, dk_ptr, stride_qn, stride_kn, stride_vn, stride_on,
    live, own, scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, EXCLUSIVE: tl.constexpr, FEATURE: tl.constexpr, SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk [16, D] of the rows from `own`; pointers to the segment's first token."""
    start = own // CHUNK * CHUNK
    rows = own + tl.arange(0, SUBCHUNK)
    cols = start + tl.arange(0, CHUNK)
    one = tl.arange(0, 1)
    SHIFT = tl.constexpr(1 if EXCLUSIVE else 0)
    dtype = dout_ptr.dtype.element_ty
    as_query = tl.zeros([SUBCHUNK, CHUNK], tl.float32)
    as_key = tl.zeros([SUBCHUNK, CHUNK], tl.float32)
    for block in tl.static_range((DV + BLOCK_V - 1) // BLOCK_V):
        dims = block * BLOCK_V + tl.arange(0, BLOCK_V)
        v = load_rows(v_ptr, stride_vn, cols, live, dims, DV)
        dout = load_rows(dout_ptr, stride_on, rows, live, dims, DV)
        as_query = tl.dot(dout, tl.trans(v.to(dout.dtype)), as_query, input_precision=PRECISION)
        v = load_rows(v_ptr, stride_vn, rows, live, dims, DV)
        dout = load_rows(dout_ptr, stride_on, cols, live, dims, DV)
        as_key = tl.dot(v.to(dout.dtype), tl.trans(dout), as_key, input_precision=PRECISION)
    if NORMALIZE:
        as_query += tl.load(e_ptr + rows, mask=rows < live, other=0.0)[:, None]
        as_key += tl.load(e_ptr + cols, mask=cols < live, other=0.0)[None, :]
    end = tl.minimum(own + SUBCHUNK, live)
    for block in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        dims = block * BLOCK_D + tl.arange(0, BLOCK_D)
        sums_q, _ = channel_decay(sums_ptr, rows, start, live, dims, D, EXCLUSIVE, CHUNK)
        sums_k = load_rows(sums_ptr, D, rows, live, dims, D)
        dq = tl.zeros([SUBCHUNK, BLOCK_D], tl.float32)
        dk = tl.zeros([SUBCHUNK, BLOCK_D], tl.float32)
        split_q, split_k, safe = _edges(sums_ptr, start, own, end, dims, D, k_ptr.dtype.element_ty == tl.float16)
        near = tl.where(safe, end, own)
        if near > start:
            k = mapped(load_rows(k_ptr, stride_kn, cols, near, dims, D), 1.0, cols, near, dims, D, FEATURE, False)
            sums = load_rows(sums_ptr, D, cols, near, dims, D)
            right = tl.where((cols < near)[:, None], k.to(tl.float32) * tl.exp(split_q[None, :] - sums), 0.0)
            earlier = tl.where((cols < near)[None, :] & (cols[None, :] <= rows[:, None] - SHIFT), as_query, 0.0)
            dq = tl.dot(earlier.to(dtype), right.to(dtype), input_precision=PRECISION)
            dq *= tl.exp(sums_q - split_q[None, :])
        far = tl.where(safe, own, end)
        if far < tl.minimum(start + CHUNK, live):
            q = mapped(load_rows(q_ptr, stride_qn, cols, live, dims, D), scale, cols, live, dims, D, FEATURE, SCALED)
            sums, _ = channel_decay(sums_ptr, cols, start, live, dims, D, EXCLUSIVE, CHUNK)
            after = ((cols >= far) & (cols < live))[:, None]
            left = tl.where(after, q.to(tl.float32) * tl.exp(tl.where(after, sums - split_k[None, :], 0.0)), 0.0)
            later = tl.where((cols >= far)[None, :] & (cols[None, :] >= rows[:, None] + SHIFT), as_key, 0.0)
            dk = tl.dot(later.to(dtype), left.to(dtype), input_precision=PRECISION)
            dk *= tl.exp(split_k[None, :] - sums_k)
        for step in range(tl.where(safe, 16, 0), 16):
            other = own + step
            row = other + one
            k = mapped(load_rows(k_ptr, stride_kn, row, live, dims, D), 1.0, row, live, dims, D, FEATURE, False)
            q = mapped(load_rows(q_ptr, stride_qn, row, live, dims, D), scale, row, live, dims, D, FEATURE, SCALED)
            other_k = load_rows(sums_ptr, D, row, live, dims, D)
            other_q, _ = channel_decay(sums_ptr, row, start, live, dims, D, EXCLUSIVE, CHUNK)
            if EXCLUSIVE:
                is_key, is_query = rows > other, rows < other
            else:
                is_key, is_query = rows >= other, rows <= other
            weight = tl.sum(tl.where(cols[None, :] == other, as_query, 0.0), 1)
            weight = tl.where(is_key, weight, 0.0)
            dq += weight[:, None] * k.to(tl.float32) * tl.exp(tl.minimum(sums_q - other_k, 0.0))
            weight = tl.sum(tl.where(cols[None, :] == other, as_key, 0.0), 1)
            weight = tl.where(is_query & (other < live), weight, 0.0)
            dk += weight[:, None] * q.to(tl.float32) * tl.exp(tl.minimum(other_q - sums_k, 0.0))
        at = rows[:, None] * D + dims[None, :]
        inside = (rows < live)[:, None] & (dims < D)[None, :]
        tl.store(dq_ptr + at, dq, mask=inside)
        tl.store(dk_ptr + at, dk, mask=inside)


@triton.jit
def _chunk_gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, e_ptr, sums_ptr, dq_ptr, dk_ptr, stride_qn, stride_kn, stride_vn, stride_on,
    live, own, scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, EXCLUSIVE: tl.constexpr, FEATURE: tl.constexpr, SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dk [CHUNK, D] of a chunk that decays little, which begins at row `own`."""
    rows = own + tl.arange(0, CHUNK)
    SHIFT = tl.constexpr(1 if EXCLUSIVE else 0)
    dtype = dout_ptr.dtype.element_ty
    dw = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in tl.static_range((DV + BLOCK_V - 1) // BLOCK_V):
        dims = block * BLOCK_V + tl.arange(0, BLOCK_V)
        v = load_rows(v_ptr, stride_vn, rows, live, dims, DV)
        dout = load_rows(dout_ptr, stride_on, rows, live, dims, DV)
        dw = tl.dot(dout, tl.trans(v.to(dout.dtype)), dw, input_precision=PRECISION)
    if NORMALIZE:
        dw += tl.load(e_ptr + rows, mask=rows < live, other=0.0)[:, None]
    dw = tl.where((rows[None, :] <= rows[:, None] - SHIFT) & (rows < live)[:, None], dw, 0.0).to(dtype)
    for block in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        dims = block * BLOCK_D + tl.arange(0, BLOCK_D)
        sums_q, _ = channel_decay(sums_ptr, rows, own, live, dims, D, EXCLUSIVE, CHUNK)
        sums_k = load_rows(sums_ptr, D, rows, live, dims, D)
        k = mapped(load_rows(k_ptr, stride_kn, rows, live, dims, D), 1.0, rows, live, dims, D, FEATURE, False)
        middle = _middle(sums_ptr, tl.minimum(own + CHUNK, live), dims, D)[None, :]
        right = (k.to(tl.float32) * tl.exp(middle - sums_k)).to(dtype)
        dq = tl.dot(dw, right, input_precision=PRECISION) * tl.exp(sums_q - middle)
        q = mapped(load_rows(q_ptr, stride_qn, rows, live, dims, D), scale, rows, live, dims, D, FEATURE, SCALED)
        left = (q.to(tl.float32) * tl.exp(sums_q - middle)).to(dtype)
        dk = tl.dot(tl.trans(dw), left, input_precision=PRECISION) * tl.exp(middle - sums_k)
        at = rows[:, None] * D + dims[None, :]
        inside = (rows < live)[:, None] & (dims < D)[None, :]
        tl.store(dq_ptr + at, dq, mask=inside)
        tl.store(dk_ptr + at, dk, mask=inside)


@triton.jit(do_not_specialize=["heads", "segments", "n", "length"])
def inner_gradients(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    e_ptr,
    sums_ptr,
    dq_ptr,
    dk_ptr,
    cu_ptr,
    slot_sequence,
    first_slot,
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
    heads: tl.int32,
    segments: tl.int32,
    n: tl.int32,
    length: tl.int32,
    scale: tl.float32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    FEATURE: tl.constexpr,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dq and dk [B, H, N, D] float32: gradients of the features (with their scale), from within the chunk alone."""
    ROWS: tl.constexpr = CHUNK if WHOLE else SUBCHUNK
    h, batch, first, live, own = _corner(
        tl.program_id(0), heads, segments, n, length, cu_ptr, slot_sequence, first_slot, ROWS, PACKED
    )
    if own >= live:
        return
    head = (batch * heads + h).to(tl.int64) * n + first
    q_ptr += batch * stride_qb + h * stride_qh + first * stride_qn
    k_ptr += batch * stride_kb + h * stride_kh + first * stride_kn
    v_ptr += batch * stride_vb + h * stride_vh + first * stride_vn
    dout_ptr += batch * stride_ob + h * stride_oh + first * stride_on
    sums_ptr += head * D
    dq_ptr += head * D
    dk_ptr += head * D
    if NORMALIZE:
        e_ptr += head
    begin = own
    if WHOLE:
        end = tl.minimum(own + CHUNK, live)
        if _whole_is_safe(sums_ptr, end, D, BLOCK_D, k_ptr.dtype.element_ty == tl.float16):
            _chunk_gradients(
                q_ptr, k_ptr, v_ptr, dout_ptr, e_ptr, sums_ptr, dq_ptr, dk_ptr, stride_qn, stride_kn, stride_vn,
                stride_on, live, own, scale, D, DV, BLOCK_D, BLOCK_V, CHUNK, EXCLUSIVE, FEATURE, SCALED, NORMALIZE,
                PRECISION,
            )  # fmt: skip
            begin = end
        for piece in range(begin, end, SUBCHUNK):
            _subchunk_gradients(
                q_ptr, k_ptr, v_ptr, dout_ptr, e_ptr, sums_ptr, dq_ptr, dk_ptr, stride_qn, stride_kn, stride_vn,
                stride_on, live, piece, scale, D, DV, BLOCK_D, BLOCK_V, CHUNK, EXCLUSIVE, FEATURE, SCALED, NORMALIZE,
                PRECISION,
            )  # fmt: skip
    else:
        _subchunk_gradients(
            q_ptr, k_ptr, v_ptr, dout_ptr, e_ptr, sums_ptr, dq_ptr, dk_ptr, stride_qn, stride_kn, stride_vn,
            stride_on, live, own, scale, D, DV, BLOCK_D, BLOCK_V, CHUNK, EXCLUSIVE, FEATURE, SCALED, NORMALIZE,
            PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "segments", "n", "length", "parts_q", "parts_k"])
def decay_gradient(
    queries_ptr,
    keys_ptr,
    crossing_ptr,
    ddecay_ptr,
    cu_ptr,
    slot_sequence,
    first_slot,
    stride_part: tl.int64,
    heads: tl.int32,
    segments: tl.int32,
    n: tl.int32,
    length: tl.int32,
    parts_q: tl.int32,
    parts_k: tl.int32,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """ddecay [B, H, N, D] from q∘dq and k∘dk, which lie in `parts` to be summed; D = 1 for a decay a token."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    dims = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    h = program // blocks % heads
    slot = program // blocks // heads
    _, batch, first, live = locate(slot, segments, n, cu_ptr, slot_sequence, first_slot, length, PACKED)
    if live <= 0:
        return
    head = (batch * heads + h).to(tl.int64) * n + first
    place = (slot * heads + h).to(tl.int64)
    later = tl.load(crossing_ptr + place * D + dims, mask=dims < D, other=0.0)
    chunks = (live + CHUNK - 1) // CHUNK
    for t in range(0, chunks):
        start = (chunks - 1 - t) * CHUNK
        rows = start + tl.arange(0, CHUNK)
        at = (head + rows)[:, None] * D + dims[None, :]
        inside = (rows < live)[:, None] & (dims < D)[None, :]
        queries = tl.zeros([CHUNK, BLOCK_D], tl.float32)
        keys = tl.zeros([CHUNK, BLOCK_D], tl.float32)
        for part in range(0, parts_q):
            queries += tl.load(queries_ptr + part * stride_part + at, mask=inside, other=0.0)
        for part in range(0, parts_k):
            keys += tl.load(keys_ptr + part * stride_part + at, mask=inside, other=0.0)
        moved = queries - keys
        sums = tl.sum(moved, 0)
        result = sums[None, :] - tl.cumsum(moved, 0) + moved + later[None, :]
        if EXCLUSIVE:
            result -= queries
        tl.store(ddecay_ptr + at, result, mask=inside)
        later += sums
