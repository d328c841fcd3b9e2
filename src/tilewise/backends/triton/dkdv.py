"""dK and dV, portable.

One program owns block_n keys of one key head. K and V stay in shared memory, dK and dV in registers; tiles of block_m
query rows of every head of the group stream by, so that grouped heads need no atomics and no second pass. Scores are
computed transposed, KQᵀ, so that Pᵀ and dSᵀ come out of the registers as the left operands of dV += Pᵀ·dO and dK +=
dSᵀ·Q (FlashAttention-2, Dao 2023). Rows out of range have an LSE of +∞, hence P = 0, and need no test of their own;
keys out of range are rows of dK and dV that are not stored.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.backends.triton.features import (
    ALIBI,
    BASE_TILE,
    BIAS,
    LOG2E,
    MAP_ARRAYS,
    RELATIVE,
    SHARED_INTEGERS,
    SOFTCAP,
    ceil_div,
    first_run,
    head_rows,
    kept,
    load_tile,
    map_row,
    next_in_run,
    probabilities,
    row_offset,
    sequence,
    visible_tiles,
)


@triton.jit
def _fold_rows(
    dk,
    dv,
    k,
    v,
    q_source,
    dout_source,
    stride_qn,
    stride_dn,
    lse2_ptr,
    delta_ptr,
    j,
    rows,
    dims,
    v_dims,
    start_n,
    start_m,
    bits,
    bits_id,
    geometry,
    extras,
    random,
    place,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SCORE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    BOUND: tl.constexpr,
    BITS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add what the query rows at start_m give to dk (without its scale) and dv. BOUND tests i < N when loading."""
    n = geometry[0]
    batch, h, first_q = place
    q = load_tile(q_source, batch, h, first_q, start_m, stride_qn, rows, n, dims, D, BLOCK_D, BLOCK_M, TMA, BOUND)
    dout = load_tile(
        dout_source, batch, h, first_q, start_m, stride_dn, rows, n, v_dims, DV, BLOCK_DV, BLOCK_M, TMA, BOUND
    )
    live = start_m + rows < n
    if BOUND:
        lse2 = tl.load(lse2_ptr + start_m + rows, mask=live, other=float("inf"))
    else:
        lse2 = tl.load(lse2_ptr + start_m + rows)
    i = (start_m + rows)[None, :]
    dots = tl.dot(k, tl.trans(q), input_precision="ieee")
    p, capped = probabilities(
        dots, lse2[None, :], i, j, start_m, start_n, bits, bits_id, geometry, extras,
        LEFT, RIGHT, SCORE, False, BITS, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if DROPOUT:
        seed, threshold, keep_scale, h, b = random
        keep = kept(seed, threshold, start_m, start_n, h, b, BLOCK_M, BLOCK_N, True)
    if WANT_K:
        if BOUND:
            delta = tl.load(delta_ptr + start_m + rows, mask=live, other=0.0)
        else:
            delta = tl.load(delta_ptr + start_m + rows)
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        if DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[None, :])
        if SOFTCAP & SCORE:
            ds *= 1.0 - capped * capped
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    # Both accumulating products come last: nothing waits for them before the next tile's scores.
    if WANT_V:
        weights = p
        if DROPOUT:
            weights = tl.where(keep, p * keep_scale, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=SHARED_INTEGERS, do_not_specialize_on_alignment=MAP_ARRAYS)
def keys_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    bias_ptr,
    relative_ptr,
    alibi_ptr,
    offset_ptr,
    cu_q_ptr,
    cu_k_ptr,
    seed_ptr,
    run_begin,
    run_end,
    run_start,
    run_stop,
    part_begin,
    part_end,
    part_col,
    part_id,
    bits_ptr,
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
    stride_gkb: tl.int64,
    stride_gkh: tl.int64,
    stride_gkn: tl.int64,
    stride_gvb: tl.int64,
    stride_gvh: tl.int64,
    stride_gvn: tl.int64,
    bias_stride_b: tl.int64,
    bias_stride_h: tl.int64,
    bias_stride_n: tl.int64,
    bias_stride_m: tl.int64,
    alibi_stride_b: tl.int64,
    map_batch: tl.int32,
    map_heads: tl.int32,
    map_tiles: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    q_len: tl.int32,
    k_len: tl.int32,
    q_rows: tl.int32,
    offset: tl.int32,
    left: tl.int32,
    right: tl.int32,
    radius: tl.int32,
    threshold: tl.int32,
    scale: tl.float32,
    softcap: tl.float32,
    keep_scale: tl.float32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    PACKED: tl.constexpr,
    MAP: tl.constexpr,
    SCORE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    TMA: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
):
    """dk and dv of block_n keys of one key head, over all query heads of its group. stride_o* are dout's here."""
    tile_count = ceil_div(k_len, BLOCK_N)
    kv_heads = heads // group
    program = tl.program_id(0)
    # Under the causal rule the first keys are seen by most rows, so they already come first.
    start_n = program % tile_count * BLOCK_N
    kv_head = (program // tile_count) % kv_heads
    b = program // tile_count // kv_heads
    first_k, m = sequence(cu_k_ptr, b, k_len, PACKED)
    if start_n >= m:
        return
    first_q, n = sequence(cu_q_ptr, b, q_len, PACKED)
    offset = row_offset(offset_ptr, offset, b, n, m, OFFSET)
    batch = b
    if PACKED:
        batch = 0

    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    j = (start_n + cols)[:, None]
    bounds = j < m
    k_ptrs = head_rows(k_ptr, batch, kv_head, first_k + start_n, cols, dims, stride_kb, stride_kh, stride_kn, True)
    k = tl.load(k_ptrs, mask=bounds & (dims < D)[None, :], other=0.0)
    v = k
    if WANT_K:
        v_ptrs = head_rows(
            v_ptr, batch, kv_head, first_k + start_n, cols, v_dims, stride_vb, stride_vh, stride_vn, True
        )
        v = tl.load(v_ptrs, mask=bounds & (v_dims < DV)[None, :], other=0.0)

    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    geometry = (n, m, offset, left, right, scale * LOG2E)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        h = kv_head * group + member
        place = (batch, h, first_q)
        q_source = q_ptr
        dout_source = dout_ptr
        if not TMA:
            q_source = head_rows(q_ptr, batch, h, first_q, rows, dims, stride_qb, stride_qh, stride_qn, WIDE)
            dout_source = head_rows(dout_ptr, batch, h, first_q, rows, v_dims, stride_ob, stride_oh, stride_on, WIDE)
        statistics = (batch * heads + h).to(tl.int64) * q_rows + first_q
        slope = 0.0
        if ALIBI & SCORE:
            slope = tl.load(alibi_ptr + b * alibi_stride_b + h)
        bias_at = 0
        if BIAS & SCORE:
            bias_at = bias_ptr + b * bias_stride_b + h * bias_stride_h
        relative_at = 0
        if RELATIVE & SCORE:
            relative_at = relative_ptr + h * (2 * radius + 1)
        extras = (scale, softcap, bias_at, bias_stride_n, bias_stride_m, relative_at, radius, slope)
        random = (seed, threshold, keep_scale, h, b)
        if MAP:
            row = map_row(b, h, start_n // BASE_TILE, map_batch, map_heads, map_tiles)
            count, entry, tile, stop, last_run = first_run(run_begin, run_end, run_start, run_stop, row, BLOCK_M)
            for _ in range(0, count):
                dk, dv = _fold_rows(
                    dk, dv, k, v, q_source, dout_source, stride_qn, stride_on, lse2_ptr + statistics, delta_ptr +
                    statistics, j, rows, dims, v_dims, start_n, tile * BLOCK_M, bits_ptr, 0, geometry, extras, random,
                    place, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE, DROPOUT, WANT_K, WANT_V,
                    False, False, TMA,
                )  # fmt: skip
                entry, tile, stop = next_in_run(run_start, run_stop, entry, tile, stop, last_run, BLOCK_M)
            part_first = tl.load(part_begin + row)
            part_count = tl.load(part_end + row) - part_first
            for t in range(0, part_count * (BASE_TILE // BLOCK_M)):
                step = t // (BASE_TILE // BLOCK_M)
                part = part_first + step
                start_m = tl.load(part_col + part) * BASE_TILE + (t - step * (BASE_TILE // BLOCK_M)) * BLOCK_M
                dk, dv = _fold_rows(
                    dk, dv, k, v, q_source, dout_source, stride_qn, stride_on, lse2_ptr + statistics, delta_ptr +
                    statistics, j, rows, dims, v_dims, start_n, start_m, bits_ptr, tl.load(part_id + part), geometry,
                    extras, random, place, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE, DROPOUT,
                    WANT_K, WANT_V, True, True, TMA,
                )  # fmt: skip
        else:
            first, full_from, full_to, last = visible_tiles(
                start_n, tl.minimum(start_n + BLOCK_N, m), offset, left, right, n, LEFT, RIGHT, False, BLOCK_M
            )
            for t in range(first, last - (full_to - full_from)):
                tile = tl.where(t < full_from, t, t + full_to - full_from)
                dk, dv = _fold_rows(
                    dk, dv, k, v, q_source, dout_source, stride_qn, stride_on, lse2_ptr + statistics, delta_ptr +
                    statistics, j, rows, dims, v_dims, start_n, tile * BLOCK_M, bits_ptr, 0, geometry, extras, random,
                    place, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE, DROPOUT, WANT_K, WANT_V,
                    True, False, TMA,
                )  # fmt: skip
            for tile in range(full_from, full_to):
                dk, dv = _fold_rows(
                    dk, dv, k, v, q_source, dout_source, stride_qn, stride_on, lse2_ptr + statistics, delta_ptr +
                    statistics, j, rows, dims, v_dims, start_n, tile * BLOCK_M, bits_ptr, 0, geometry, extras, random,
                    place, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, False, SCORE, DROPOUT, WANT_K, WANT_V,
                    False, False, TMA,
                )  # fmt: skip

    if WANT_K:
        dk_ptrs = head_rows(
            dk_ptr, batch, kv_head, first_k + start_n, cols, dims, stride_gkb, stride_gkh, stride_gkn, True
        )
        tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=bounds & (dims < D)[None, :])
    if WANT_V:
        dv_ptrs = head_rows(
            dv_ptr, batch, kv_head, first_k + start_n, cols, v_dims, stride_gvb, stride_gvh, stride_gvn, True
        )
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=bounds & (v_dims < DV)[None, :])
