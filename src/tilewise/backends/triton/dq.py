"""dQ, portable.

One program owns block_m query rows of one head, as in the forward kernel: Q and dO stay in shared memory; dQ, the LSE
and Δ of its rows in registers; tiles of block_n keys and their values stream through a pipeline of num_stages. Each
step: S = QKᵀ, P = 2^(S − LSE), dP = dO·Vᵀ, dS = P∘(dP − Δ), dQ += dS·K; the scale is applied once, at the end. Tiles
are visited as in the forward kernel, whole ones first.

A kernel of its own rather than atomic additions from the dK/dV kernel: two more matrix products a tile, but the result
is the same bits every time (FlashAttention-2, Dao 2023, adds atomically).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

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
def _fold_keys(
    dq,
    q,
    dout,
    lse2,
    delta,
    k_source,
    v_source,
    stride_kn,
    stride_vn,
    i,
    cols,
    dims,
    v_dims,
    start_m,
    start_n,
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
    BOUND: tl.constexpr,
    BITS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add what the keys at start_n give to dq (without its scale). BOUND tests j < M."""
    m = geometry[1]
    batch, kv_head, first_k = place
    k = load_tile(k_source, batch, kv_head, first_k, start_n, stride_kn, cols, m, dims, D, BLOCK_D, BLOCK_N, TMA, BOUND)
    v = load_tile(
        v_source, batch, kv_head, first_k, start_n, stride_vn, cols, m, v_dims, DV, BLOCK_DV, BLOCK_N, TMA, BOUND
    )
    j = (start_n + cols)[None, :]
    dots = tl.dot(q, tl.trans(k), input_precision="ieee")
    p, capped = probabilities(
        dots, lse2[:, None], i, j, start_m, start_n, bits, bits_id, geometry, extras,
        LEFT, RIGHT, SCORE, BOUND, BITS, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        seed, threshold, keep_scale, h, b = random
        dp = tl.where(kept(seed, threshold, start_m, start_n, h, b, BLOCK_M, BLOCK_N, False), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if SOFTCAP & SCORE:
        ds *= 1.0 - capped * capped
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=SHARED_INTEGERS, do_not_specialize_on_alignment=MAP_ARRAYS)
def queries_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_gqb: tl.int64,
    stride_gqh: tl.int64,
    stride_gqn: tl.int64,
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
):
    """dq of block_m query rows of one head. stride_o* are dout's here."""
    tile_count = ceil_div(q_len, BLOCK_M)
    program = tl.program_id(0)
    tile_m = program % tile_count
    if RIGHT:
        tile_m = tile_count - 1 - tile_m
    h = (program // tile_count) % heads
    b = program // tile_count // heads
    start_m = tile_m * BLOCK_M
    first_q, n = sequence(cu_q_ptr, b, q_len, PACKED)
    if start_m >= n:
        return
    first_k, m = sequence(cu_k_ptr, b, k_len, PACKED)
    offset = row_offset(offset_ptr, offset, b, n, m, OFFSET)
    batch = b
    if PACKED:
        batch = 0

    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    i = (start_m + rows)[:, None]
    live = start_m + rows < n
    kv_head = h // group
    place = (batch, kv_head, first_k)
    k_source = k_ptr
    v_source = v_ptr
    if not TMA:
        k_source = head_rows(k_ptr, batch, kv_head, first_k, cols, dims, stride_kb, stride_kh, stride_kn, WIDE)
        v_source = head_rows(v_ptr, batch, kv_head, first_k, cols, v_dims, stride_vb, stride_vh, stride_vn, WIDE)
    q_ptrs = head_rows(q_ptr, batch, h, first_q + start_m, rows, dims, stride_qb, stride_qh, stride_qn, True)
    q = tl.load(q_ptrs, mask=(i < n) & (dims < D)[None, :], other=0.0)
    dout_ptrs = head_rows(dout_ptr, batch, h, first_q + start_m, rows, v_dims, stride_ob, stride_oh, stride_on, True)
    dout = tl.load(dout_ptrs, mask=(i < n) & (v_dims < DV)[None, :], other=0.0)
    statistics = (batch * heads + h).to(tl.int64) * q_rows + first_q + start_m
    lse2 = tl.load(lse2_ptr + statistics + rows, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + statistics + rows, mask=live, other=0.0)

    slope = 0.0
    if ALIBI & SCORE:
        slope = tl.load(alibi_ptr + b * alibi_stride_b + h)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    if BIAS & SCORE:
        bias_ptr += b * bias_stride_b + h * bias_stride_h
    if RELATIVE & SCORE:
        relative_ptr += h * (2 * radius + 1)
    geometry = (n, m, offset, left, right, scale * LOG2E)
    extras = (scale, softcap, bias_ptr, bias_stride_n, bias_stride_m, relative_ptr, radius, slope)
    random = (seed, threshold, keep_scale, h, b)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MAP:
        row = map_row(b, h, start_m // BASE_TILE, map_batch, map_heads, map_tiles)
        count, entry, tile, stop, last_run = first_run(run_begin, run_end, run_start, run_stop, row, BLOCK_N)
        for _ in range(0, count):
            dq = _fold_keys(
                dq, q, dout, lse2, delta, k_source, v_source, stride_kn, stride_vn, i, cols, dims, v_dims,
                start_m, tile * BLOCK_N, bits_ptr, 0, geometry, extras, random, place,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE, DROPOUT, False, False, TMA,
            )  # fmt: skip
            entry, tile, stop = next_in_run(run_start, run_stop, entry, tile, stop, last_run, BLOCK_N)
        part_first = tl.load(part_begin + row)
        part_count = tl.load(part_end + row) - part_first
        for t in range(0, part_count * (BASE_TILE // BLOCK_N)):
            step = t // (BASE_TILE // BLOCK_N)
            part = part_first + step
            start_n = tl.load(part_col + part) * BASE_TILE + (t - step * (BASE_TILE // BLOCK_N)) * BLOCK_N
            dq = _fold_keys(
                dq, q, dout, lse2, delta, k_source, v_source, stride_kn, stride_vn, i, cols, dims, v_dims,
                start_m, start_n, bits_ptr, tl.load(part_id + part), geometry, extras, random, place,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE, DROPOUT, True, True, TMA,
            )  # fmt: skip
    else:
        first, full_from, full_to, last = visible_tiles(
            start_m, tl.minimum(start_m + BLOCK_M, n), offset, left, right, m, LEFT, RIGHT, True, BLOCK_N
        )
        for tile in range(full_from, full_to):
            dq = _fold_keys(
                dq, q, dout, lse2, delta, k_source, v_source, stride_kn, stride_vn, i, cols, dims, v_dims,
                start_m, tile * BLOCK_N, bits_ptr, 0, geometry, extras, random, place,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, False, SCORE, DROPOUT, False, False, TMA,
            )  # fmt: skip
        for t in range(first, last - (full_to - full_from)):
            tile = tl.where(t < full_from, t, t + full_to - full_from)
            dq = _fold_keys(
                dq, q, dout, lse2, delta, k_source, v_source, stride_kn, stride_vn, i, cols, dims, v_dims,
                start_m, tile * BLOCK_N, bits_ptr, 0, geometry, extras, random, place,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE, DROPOUT, True, False, TMA,
            )  # fmt: skip
    dq_ptrs = head_rows(dq_ptr, batch, h, first_q + start_m, rows, dims, stride_gqb, stride_gqh, stride_gqn, True)
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(i < n) & (dims < D)[None, :])
