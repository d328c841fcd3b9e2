"""Attention forward, portable: one Triton kernel for every variant of SPEC 1.5 and every mask of SPEC 1.6.

Computes out = softmax(scores)·V and the natural log of the softmax denominator, tile by tile (FlashAttention-2, Dao
2023; online softmax, Milakov and Gimelshein 2018). The scores are never in memory.

One program owns block_m query rows of one head: Q stays in shared memory, the output accumulator, the running maximum
(`peak`, in log2 units) and the running sum (`total`) in registers. K and V tiles of block_n keys stream through a
software pipeline of num_stages. Each step: S = QKᵀ, what the call asks of the scores, m' = max(m, rowmax S),
P = 2^(S − m'), sum and accumulator rescaled by 2^(m − m'), accumulator += P·V. Division by the sum happens once.

Tiles that the causal rule, the window, the bounds or the tile map leave whole take a loop without any element test; a
second loop takes the few others. A sink is merged once, at the end, as the partial result (0, sink).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false
# ruff: noqa: SIM108  (a branch on a compile-time constant is no expression of two types)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.base import Operands, empty_output
from tilewise.backends.triton.features import (
    ALIBI,
    BASE_TILE,
    BIAS,
    LN2,
    LOG2E,
    MAP_ARRAYS,
    RELATIVE,
    SHARED_INTEGERS,
    bit_tile,
    ceil_div,
    first_run,
    head_rows,
    in_band,
    kept,
    load_tile,
    map_row,
    next_in_run,
    row_offset,
    scores_log2,
    sequence,
    visible_tiles,
    within,
)
from tilewise.backends.triton.launch import (
    TritonPlan,
    constants,
    copy_engine_takes,
    descriptor,
    launch,
    number_arguments,
    tensor_arguments,
    unit_last,
    wide,
)
from tilewise.masks.tensors import TileTensors


@triton.jit
def _fold(
    acc,
    peak,
    total,
    q,
    k_source,
    v_source,
    stride_kn,
    stride_vn,
    start_n,
    bits,
    bits_id,
    i,
    cols,
    dims,
    v_dims,
    geometry,
    extras,
    random,
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
    """Fold the KV tile at start_n into (acc, peak, total). LEFT and RIGHT: test the band; BOUND: test j < M."""
    start_m, n, m, offset, left, right, scale_log2, batch, kv_head, first_k = geometry
    k = load_tile(
        k_source, batch, kv_head, first_k, start_n, stride_kn, cols, m, dims, D, BLOCK_D, BLOCK_N, TMA, BOUND
    )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    j = (start_n + cols)[None, :]
    if SCORE:
        scale, softcap, bias_ptr, bias_stride_n, bias_stride_m, relative_ptr, radius, slope = extras
        s, _ = scores_log2(
            s,
            i,
            j,
            n,
            m,
            offset,
            scale,
            softcap,
            bias_ptr,
            bias_stride_n,
            bias_stride_m,
            relative_ptr,
            radius,
            slope,
            SCORE,
        )
    if BITS:
        s = tl.where(bit_tile(bits, bits_id, within(start_m), within(start_n), BLOCK_M, BLOCK_N), s, float("-inf"))
    if LEFT or RIGHT:
        s = tl.where(in_band(i, j, offset, left, right, LEFT, RIGHT), s, float("-inf"))
    if BOUND:
        s = tl.where(j < m, s, float("-inf"))
    if SCORE:
        new_peak = tl.maximum(peak, tl.max(s, 1))
    else:
        new_peak = tl.maximum(peak, tl.max(s, 1) * scale_log2)
    base = new_peak
    if SCORE or BITS or LEFT or RIGHT:
        # A row that has seen nothing yet has a peak of −∞, and −∞ − (−∞) must not be formed.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    if SCORE:
        p = tl.exp2(s - base[:, None])
    else:
        p = tl.exp2(s * scale_log2 - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(p, 1)
    if DROPOUT:
        seed, threshold, h, b = random
        p = tl.where(kept(seed, threshold, start_m, start_n, h, b, BLOCK_M, BLOCK_N, False), p, 0.0)
    acc = acc * decay[:, None]
    v = load_tile(
        v_source, batch, kv_head, first_k, start_n, stride_vn, cols, m, v_dims, DV, BLOCK_DV, BLOCK_N, TMA, BOUND
    )  # fmt: skip
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=SHARED_INTEGERS, do_not_specialize_on_alignment=MAP_ARRAYS)
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sink_ptr,
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
    SINK: tl.constexpr,
):
    """out [B, H, N, Dv] and lse [B, H, N]; launch.py says what each argument is."""
    tile_count = ceil_div(q_len, BLOCK_M)
    program = tl.program_id(0)
    tile_m = program % tile_count
    if RIGHT:
        # The rows that see most come first, so that the last programs of a head are the short ones.
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
    kv_head = h // group

    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    i = (start_m + rows)[:, None]
    q_ptrs = head_rows(q_ptr, batch, h, first_q + start_m, rows, dims, stride_qb, stride_qh, stride_qn, True)
    k_source = k_ptr
    v_source = v_ptr
    if not TMA:
        k_source = head_rows(k_ptr, batch, kv_head, first_k, cols, dims, stride_kb, stride_kh, stride_kn, WIDE)
        v_source = head_rows(v_ptr, batch, kv_head, first_k, cols, v_dims, stride_vb, stride_vh, stride_vn, WIDE)
    q = tl.load(q_ptrs, mask=(i < n) & (dims < D)[None, :], other=0.0)

    scale_log2 = scale * LOG2E
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
    geometry = (start_m, n, m, offset, left, right, scale_log2, batch, kv_head, first_k)
    extras = (scale, softcap, bias_ptr, bias_stride_n, bias_stride_m, relative_ptr, radius, slope)
    random = (seed, threshold, h, b)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if MAP:
        row = map_row(b, h, start_m // BASE_TILE, map_batch, map_heads, map_tiles)
        count, entry, tile, stop, last_run = first_run(run_begin, run_end, run_start, run_stop, row, BLOCK_N)
        for _ in range(0, count):
            acc, peak, total = _fold(
                acc, peak, total, q, k_source, v_source, stride_kn, stride_vn, tile * BLOCK_N, bits_ptr, 0, i, cols,
                dims, v_dims, geometry, extras, random, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE,
                DROPOUT, False, False, TMA,
            )  # fmt: skip
            entry, tile, stop = next_in_run(run_start, run_stop, entry, tile, stop, last_run, BLOCK_N)
        part_first = tl.load(part_begin + row)
        part_count = tl.load(part_end + row) - part_first
        for t in range(0, part_count * (BASE_TILE // BLOCK_N)):
            step = t // (BASE_TILE // BLOCK_N)
            part = part_first + step
            start_n = tl.load(part_col + part) * BASE_TILE + (t - step * (BASE_TILE // BLOCK_N)) * BLOCK_N
            acc, peak, total = _fold(
                acc, peak, total, q, k_source, v_source, stride_kn, stride_vn, start_n, bits_ptr, tl.load(part_id +
                part), i, cols, dims, v_dims, geometry, extras, random, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                LEFT, RIGHT, SCORE, DROPOUT, True, True, TMA,
            )  # fmt: skip
    else:
        first, full_from, full_to, last = visible_tiles(
            start_m, tl.minimum(start_m + BLOCK_M, n), offset, left, right, m, LEFT, RIGHT, True, BLOCK_N
        )
        for tile in range(full_from, full_to):
            acc, peak, total = _fold(
                acc, peak, total, q, k_source, v_source, stride_kn, stride_vn, tile * BLOCK_N, bits_ptr, 0, i, cols,
                dims, v_dims, geometry, extras, random, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, False, False, SCORE,
                DROPOUT, False, False, TMA,
            )  # fmt: skip
        for t in range(first, last - (full_to - full_from)):
            tile = tl.where(t < full_from, t, t + full_to - full_from)
            acc, peak, total = _fold(
                acc, peak, total, q, k_source, v_source, stride_kn, stride_vn, tile * BLOCK_N, bits_ptr, 0, i, cols,
                dims, v_dims, geometry, extras, random, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, SCORE,
                DROPOUT, True, False, TMA,
            )  # fmt: skip

    if SINK:
        logit = tl.load(sink_ptr + h).to(tl.float32) * LOG2E
        new_peak = tl.maximum(peak, logit)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - base)
        total = total * decay + tl.exp2(logit - base)
        acc = acc * decay[:, None]
        peak = new_peak
    # A row that saw nothing has an accumulator of 0 and a peak of −∞, which are its results.
    total = tl.where(total > 0.0, total, 1.0)
    inverse = 1.0 / total
    if DROPOUT:
        inverse *= keep_scale
    out = acc * inverse[:, None]
    lse = (peak + tl.log2(total)) * LN2
    out_ptrs = head_rows(out_ptr, batch, h, first_q + start_m, rows, v_dims, stride_ob, stride_oh, stride_on, True)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(i < n) & (v_dims < DV)[None, :])
    lse_ptrs = lse_ptr + (batch * heads + h).to(tl.int64) * q_rows + first_q + start_m + rows
    tl.store(lse_ptrs, lse, mask=start_m + rows < n)


def forward(operands: Operands, prepared: TritonPlan, tiles: TileTensors | None) -> tuple[Tensor, Tensor]:
    """out [B, H, N, Dv] and lse [B, H, N]; `tiles` is the tile map of all restrictions if the call has a mask."""
    out, lse = empty_output(operands)
    q, k, v = unit_last(operands.q), unit_last(operands.k), unit_last(operands.v)
    tile = prepared.tiles.forward
    grid = -(-prepared.q_len // tile.block_m) * prepared.heads * prepared.batch
    if grid == 0:
        return out, lse
    tma = tile.tma and prepared.tma and copy_engine_takes(k) and copy_engine_takes(v)
    arguments = (
        q,
        descriptor(k, tile.block_n, prepared.flags["BLOCK_D"]) if tma else k,
        descriptor(v, tile.block_n, prepared.flags["BLOCK_DV"]) if tma else v,
        out,
        lse,
        operands.sink,
        *tensor_arguments(operands, tiles),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *number_arguments(operands, prepared, tiles),
    )
    compile_time = (*constants(prepared, tile, wide(k.stride(2), v.stride(2)), tma), prepared.sink)
    launch(attention_forward, grid, prepared, (q, k, v, out, lse), arguments, compile_time, tile)
    return out, lse
