"""Gradients of the score biases, portable: dense (dbias) and by distance (drelative), and of the sink.

Both biases take dS before the soft cap's factor: dbias is the sum of dS over the dimensions that the bias broadcasts,
drelative the sum over the diagonals p − j. A separate kernel recomputes dS for each, because their sums run across the
tiles that the other gradients own; only a call that asks for such a gradient pays for it. Each output has one owner
that adds in a fixed order, or a few owners whose partial sums are added afterwards: no atomics.

- `bias_gradient`: one program owns block_m × block_n elements of the bias and walks the (b, h, row tile, key tile)
  combinations that broadcast onto them, or one of `splits` equal parts of them.
- `diagonal_gradient`: one program owns the tiles of one head whose row tile minus key tile is one number, so that their
  diagonals coincide, and sums along them. It serves the distances below R; tiles beyond, all of whose elements fall on
  the first or last entry, go to `far_gradient`, one program a row of tiles.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false
# ruff: noqa: ARG001  (all kernels of a call take the same arguments in the same order)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.base import Operands
from tilewise.backends.triton.features import (
    ALIBI,
    BASE_TILE,
    BIAS,
    LOG2E,
    MAP_ARRAYS,
    RELATIVE,
    SHARED_INTEGERS,
    bit_tile,
    ceil_div,
    find_tile,
    floor_div,
    head_rows,
    kept,
    map_row,
    probabilities,
    row_offset,
    sequence,
    visible_tiles,
    within,
)
from tilewise.backends.triton.launch import TritonPlan, number_arguments, tensor_arguments
from tilewise.masks.tensors import TileTensors


@triton.jit
def _score_gradient(
    pointers,
    strides,
    arrays,
    numbers,
    b,
    h,
    start_m,
    start_n,
    first_q,
    first_k,
    n,
    m,
    offset,
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
    PRECISION: tl.constexpr,
):
    """dS of one tile, before the soft cap's factor; 0 outside the sequence and where the mask forbids."""
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, bias_ptr, relative_ptr, alibi_ptr, seed_ptr = pointers
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn = strides[:6]
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on = strides[6:12]
    bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m, alibi_stride_b = strides[12:]
    run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, bits_ptr = arrays
    (
        heads,
        group,
        q_rows,
        left,
        right,
        radius,
        threshold,
        scale,
        softcap,
        keep_scale,
        map_batch,
        map_heads,
        map_tiles,
    ) = numbers
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    visible = True
    state = -2
    if MAP:
        row = map_row(b, h, start_m // BASE_TILE, map_batch, map_heads, map_tiles)
        state = find_tile(
            run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, row, start_n // BASE_TILE
        )
        visible = state != -1
    if LEFT:
        visible = visible & (start_n + BLOCK_N - 1 >= start_m + offset - left)
    if RIGHT:
        visible = visible & (start_n <= start_m + BLOCK_M - 1 + offset + right)
    if visible:
        batch = b
        if PACKED:
            batch = 0
        kv_head = h // group
        dims = tl.arange(0, BLOCK_D)
        v_dims = tl.arange(0, BLOCK_DV)
        i = (start_m + rows)[:, None]
        j = (start_n + cols)[None, :]
        live = start_m + rows < n
        near = (start_n + cols < m)[:, None]
        q_ptrs = head_rows(q_ptr, batch, h, first_q + start_m, rows, dims, stride_qb, stride_qh, stride_qn, True)
        k_ptrs = head_rows(k_ptr, batch, kv_head, first_k + start_n, cols, dims, stride_kb, stride_kh, stride_kn, True)
        v_ptrs = head_rows(
            v_ptr, batch, kv_head, first_k + start_n, cols, v_dims, stride_vb, stride_vh, stride_vn, True
        )
        dout_ptrs = head_rows(
            dout_ptr, batch, h, first_q + start_m, rows, v_dims, stride_ob, stride_oh, stride_on, True
        )
        q = tl.load(q_ptrs, mask=(i < n) & (dims < D)[None, :], other=0.0)
        k = tl.load(k_ptrs, mask=near & (dims < D)[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=near & (v_dims < DV)[None, :], other=0.0)
        dout = tl.load(dout_ptrs, mask=(i < n) & (v_dims < DV)[None, :], other=0.0)
        at = (batch * heads + h).to(tl.int64) * q_rows + first_q + start_m + rows
        lse2 = tl.load(lse2_ptr + at, mask=live, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=live, other=0.0)
        slope = 0.0
        if ALIBI & SCORE:
            slope = tl.load(alibi_ptr + b * alibi_stride_b + h)
        bias_at = 0
        if BIAS & SCORE:
            bias_at = bias_ptr + b * bias_stride_b + h * bias_stride_h
        relative_at = 0
        if RELATIVE & SCORE:
            relative_at = relative_ptr + h * (2 * radius + 1)
        geometry = (n, m, offset, left, right, scale * LOG2E)
        extras = (scale, softcap, bias_at, bias_stride_n, bias_stride_m, relative_at, radius, slope)
        dots = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p, _ = probabilities(
            dots, lse2[:, None], i, j, start_m, start_n, bits_ptr, tl.maximum(state, 0), geometry, extras,
            LEFT, RIGHT, SCORE, True, False, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if MAP:
            seen = bit_tile(bits_ptr, tl.maximum(state, 0), within(start_m), within(start_n), BLOCK_M, BLOCK_N)
            p = tl.where(seen | (state == -2), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(tl.load(seed_ptr), threshold, start_m, start_n, h, b, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
    return ds


@triton.jit(do_not_specialize=[*SHARED_INTEGERS, "batch", "splits"], do_not_specialize_on_alignment=MAP_ARRAYS)
def bias_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    grad_ptr,
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
    batch: tl.int32,
    splits: tl.int32,
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
    PRECISION: tl.constexpr,
    BY_BATCH: tl.constexpr,
    BY_HEAD: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """grad [splits, B or 1, H or 1, N or 1, M or 1], contiguous: dS summed over what the bias broadcasts."""
    row_tiles = ceil_div(q_len, BLOCK_M)
    key_tiles = ceil_div(k_len, BLOCK_N)
    own_b, sum_b = 1, batch
    if BY_BATCH:
        own_b, sum_b = batch, 1
    own_h, sum_h = 1, heads
    if BY_HEAD:
        own_h, sum_h = heads, 1
    own_m, sum_m, row_size = 1, row_tiles, 1
    if BY_ROW:
        own_m, sum_m, row_size = row_tiles, 1, q_len
    own_n, sum_n, key_size = 1, key_tiles, 1
    if BY_KEY:
        own_n, sum_n, key_size = key_tiles, 1, k_len
    program = tl.program_id(0)
    tile_n = program % own_n
    tile_m = program // own_n % own_m
    own_head = program // own_n // own_m % own_h
    own_batch = program // own_n // own_m // own_h % own_b
    split = program // own_n // own_m // own_h // own_b
    pointers = (q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, bias_ptr, relative_ptr, alibi_ptr, seed_ptr)
    strides = (
        stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on, bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m, alibi_stride_b,
    )  # fmt: skip
    arrays = (run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, bits_ptr)
    numbers = (
        heads, group, q_rows, left, right, radius, threshold, scale, softcap, keep_scale, map_batch, map_heads,
        map_tiles,
    )  # fmt: skip
    count = sum_b * sum_h * sum_m * sum_n
    share = (count + splits - 1) // splits
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * share, tl.minimum(split * share + share, count)):
        key_tile = tile_n + step % sum_n
        row_tile = tile_m + step // sum_n % sum_m
        h = own_head + step // sum_n // sum_m % sum_h
        b = own_batch + step // sum_n // sum_m // sum_h
        offset_b = row_offset(offset_ptr, offset, b, q_len, k_len, OFFSET)
        acc += _score_gradient(
            pointers, strides, arrays, numbers, b, h, row_tile * BLOCK_M, key_tile * BLOCK_N, 0, 0, q_len, k_len,
            offset_b, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, OFFSET, PACKED, MAP, SCORE, DROPOUT,
            PRECISION,
        )  # fmt: skip
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = ((split * own_b + own_batch) * own_h + own_head).to(tl.int64) * row_size * key_size
    if BY_ROW and BY_KEY:
        at = grad_ptr + plane + rows.to(tl.int64)[:, None] * key_size + cols[None, :]
        tl.store(at, acc.to(grad_ptr.dtype.element_ty), mask=(rows < q_len)[:, None] & (cols < k_len)[None, :])
    elif BY_ROW:
        tl.store(grad_ptr + plane + rows, tl.sum(acc, 1).to(grad_ptr.dtype.element_ty), mask=rows < q_len)
    elif BY_KEY:
        tl.store(grad_ptr + plane + cols, tl.sum(acc, 0).to(grad_ptr.dtype.element_ty), mask=cols < k_len)
    else:
        tl.store(grad_ptr + plane, tl.sum(tl.sum(acc, 1), 0).to(grad_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=[*SHARED_INTEGERS, "batch", "splits", "nearest", "diagonals"],
    do_not_specialize_on_alignment=MAP_ARRAYS,
)
def diagonal_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    grad_ptr,
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
    batch: tl.int32,
    splits: tl.int32,
    nearest: tl.int32,
    diagonals: tl.int32,
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
    PRECISION: tl.constexpr,
):
    """grad [splits, H, diagonals, 4·BLOCK]: dS summed along p − j = (nearest + d − 1)·BLOCK + 1 + w, with BLOCK =
    BLOCK_M = BLOCK_N, for diagonal of tiles d and w below 4·BLOCK."""
    program = tl.program_id(0)
    diagonal = program % diagonals
    h = program // diagonals % heads
    split = program // diagonals // heads
    WIDTH: tl.constexpr = 4 * BLOCK_M
    pointers = (q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, bias_ptr, relative_ptr, alibi_ptr, seed_ptr)
    strides = (
        stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on, bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m, alibi_stride_b,
    )  # fmt: skip
    arrays = (run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, bits_ptr)
    numbers = (
        heads, group, q_rows, left, right, radius, threshold, scale, softcap, keep_scale, map_batch, map_heads,
        map_tiles,
    )  # fmt: skip
    row_tiles = ceil_div(q_len, BLOCK_M)
    count = batch * row_tiles
    share = (count + splits - 1) // splits
    rows = tl.arange(0, BLOCK_M)
    wide = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], tl.float32)
    for step in range(split * share, tl.minimum(split * share + share, count)):
        row_tile = step % row_tiles
        b = step // row_tiles
        first_q, n = sequence(cu_q_ptr, b, q_len, PACKED)
        first_k, m = sequence(cu_k_ptr, b, k_len, PACKED)
        offset_b = row_offset(offset_ptr, offset, b, n, m, OFFSET)
        whole = floor_div(offset_b, BLOCK_M)
        key_tile = row_tile + whole - (nearest + diagonal)
        if (row_tile * BLOCK_M < n) & (key_tile >= 0) & (key_tile * BLOCK_N < m):
            ds = _score_gradient(
                pointers, strides, arrays, numbers, b, h, row_tile * BLOCK_M, key_tile * BLOCK_N, first_q, first_k, n,
                m, offset_b, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, OFFSET, PACKED, MAP, SCORE,
                DROPOUT, PRECISION,
            )  # fmt: skip
            # Element (r, c) lies at distance (nearest + d)·BLOCK + shift + r − c.
            shift = offset_b - whole * BLOCK_M
            column = rows[:, None] + shift + BLOCK_M - 1 - wide[None, :]
            inside = (column >= 0) & (column < BLOCK_N)
            skewed = tl.gather(ds, tl.where(inside, column, 0), 1)
            acc += tl.sum(tl.where(inside, skewed, 0.0), 0)
    at = grad_ptr + ((split * heads + h) * diagonals + diagonal).to(tl.int64) * WIDTH
    tl.store(at + wide, acc)


@triton.jit(
    do_not_specialize=[*SHARED_INTEGERS, "batch", "nearest", "diagonals"], do_not_specialize_on_alignment=MAP_ARRAYS
)
def far_gradient(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse2_ptr,
    delta_ptr,
    grad_ptr,
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
    batch: tl.int32,
    nearest: tl.int32,
    diagonals: tl.int32,
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
    PRECISION: tl.constexpr,
):
    """grad [2, H, B, row tiles]: dS summed over the tiles of a row that `diagonal_gradient` leaves out, of keys that
    lie ahead (0) and behind (1)."""
    row_tiles = ceil_div(q_len, BLOCK_M)
    program = tl.program_id(0)
    row_tile = program % row_tiles
    b = program // row_tiles % batch
    h = program // row_tiles // batch
    pointers = (q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, bias_ptr, relative_ptr, alibi_ptr, seed_ptr)
    strides = (
        stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
        stride_ob, stride_oh, stride_on, bias_stride_b, bias_stride_h, bias_stride_n, bias_stride_m, alibi_stride_b,
    )  # fmt: skip
    arrays = (run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, bits_ptr)
    numbers = (
        heads, group, q_rows, left, right, radius, threshold, scale, softcap, keep_scale, map_batch, map_heads,
        map_tiles,
    )  # fmt: skip
    first_q, n = sequence(cu_q_ptr, b, q_len, PACKED)
    first_k, m = sequence(cu_k_ptr, b, k_len, PACKED)
    offset_b = row_offset(offset_ptr, offset, b, n, m, OFFSET)
    start_m = row_tile * BLOCK_M
    first, _, _, last = visible_tiles(
        start_m, tl.minimum(start_m + BLOCK_M, n), offset_b, left, right, m, LEFT, RIGHT, True, BLOCK_N
    )
    if start_m >= n:
        last = first
    centre = row_tile + floor_div(offset_b, BLOCK_M) - nearest
    behind = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for key_tile in range(first, tl.minimum(last, centre - diagonals + 1)):
        behind += _score_gradient(
            pointers, strides, arrays, numbers, b, h, start_m, key_tile * BLOCK_N, first_q, first_k, n, m, offset_b,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, OFFSET, PACKED, MAP, SCORE, DROPOUT, PRECISION,
        )  # fmt: skip
    ahead = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for key_tile in range(tl.maximum(first, centre + 1), last):
        ahead += _score_gradient(
            pointers, strides, arrays, numbers, b, h, start_m, key_tile * BLOCK_N, first_q, first_k, n, m, offset_b,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, OFFSET, PACKED, MAP, SCORE, DROPOUT, PRECISION,
        )  # fmt: skip
    tl.store(grad_ptr + program, tl.sum(tl.sum(ahead, 1), 0))
    tl.store(grad_ptr + heads * batch * row_tiles + program, tl.sum(tl.sum(behind, 1), 0))


PROGRAMS = 1024
"""About as many programs as fill a large device; fewer owners than that share their sums among several."""


def _arguments(
    operands: Operands,
    dout: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad: Tensor,
    prepared: TritonPlan,
    tiles: TileTensors | None,
) -> tuple:
    q, k, v = operands.q, operands.k, operands.v
    return (
        q,
        k,
        v,
        dout,
        lse2,
        delta,
        grad,
        *tensor_arguments(operands, tiles),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *dout.stride()[:3],
        *number_arguments(operands, prepared, tiles),
    )


def _launch(prepared: TritonPlan) -> dict:
    tile = prepared.tiles.bias
    return {
        **prepared.flags,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def dense_gradient(
    operands: Operands, dout: Tensor, lse2: Tensor, delta: Tensor, prepared: TritonPlan, tiles: TileTensors | None
) -> Tensor:
    """dbias in the bias's shape and dtype. The operands have contiguous last dims; no packed sequences."""
    bias = operands.bias
    assert bias is not None
    by_batch, by_head, by_row, by_key = (size > 1 for size in bias.shape)
    block_m, block_n = prepared.tiles.bias.block_m, prepared.tiles.bias.block_n
    row_tiles, key_tiles = -(-prepared.q_len // block_m), -(-prepared.k_len // block_n)
    sides = (
        (by_batch, prepared.batch),
        (by_head, prepared.heads),
        (by_row, row_tiles),
        (by_key, key_tiles),
    )
    owners = shared = 1
    for owned, size in sides:
        owners, shared = (owners * size, shared) if owned else (owners, shared * size)
    splits = max(1, min(shared, PROGRAMS // owners))
    dtype = bias.dtype if splits == 1 else torch.float32
    grad = torch.empty((splits, *bias.shape), dtype=dtype, device=bias.device)
    bias_gradient[(owners * splits,)](
        *_arguments(operands, dout, lse2, delta, grad, prepared, tiles),
        prepared.batch,
        splits,
        BY_BATCH=by_batch,
        BY_HEAD=by_head,
        BY_ROW=by_row,
        BY_KEY=by_key,
        **_launch(prepared),
    )
    return grad[0] if splits == 1 else grad.sum(0).to(bias.dtype)


def relative_gradient(
    operands: Operands, dout: Tensor, lse2: Tensor, delta: Tensor, prepared: TritonPlan, tiles: TileTensors | None
) -> Tensor:
    """drelative [H, 2R + 1]. The operands have contiguous last dims."""
    relative = operands.relative
    assert relative is not None
    heads, radius = relative.shape[0], relative.shape[1] // 2
    block = prepared.tiles.bias.block_m
    # Distances inside (−R, R) lie on these diagonals of tiles; no tile lies further out than the longest sequences.
    reach = min(radius, max(prepared.q_len, prepared.k_len) + abs(prepared.offset)) // block + 2
    nearest, diagonals = -reach, 2 * reach + 1
    row_tiles = -(-prepared.q_len // block)
    splits = max(1, min(prepared.batch * row_tiles, PROGRAMS // (heads * diagonals)))
    near = torch.empty((splits, heads, diagonals, 4, block), dtype=torch.float32, device=relative.device)
    far = torch.empty((2, heads, prepared.batch * row_tiles), dtype=torch.float32, device=relative.device)
    diagonal_gradient[(splits * heads * diagonals,)](
        *_arguments(operands, dout, lse2, delta, near, prepared, tiles),
        prepared.batch,
        splits,
        nearest,
        diagonals,
        **_launch(prepared),
    )
    far_gradient[(heads * prepared.batch * row_tiles,)](
        *_arguments(operands, dout, lse2, delta, far, prepared, tiles),
        prepared.batch,
        nearest,
        diagonals,
        **_launch(prepared),
    )
    return _fold_diagonals(near.sum(0), far.sum(-1), nearest, radius).to(relative.dtype)


def _fold_diagonals(near: Tensor, far: Tensor, nearest: int, radius: int) -> Tensor:
    """[H, 2R + 1] from overlapping stretches of diagonals near [H, diagonals, 4, block] and the sums beyond, far [2,
    H]."""
    heads, diagonals, parts, block = near.shape
    line = near.new_zeros(heads, diagonals + parts - 1, block)
    for part in range(parts):
        line[:, part : part + diagonals] += near[:, :, part]
    line = line.flatten(1)
    # Entry x of the line is the distance first + x; entries up to −R and from R on fold into the ends.
    first = (nearest - 1) * block + 1
    lowest, highest = max(-radius - first + 1, 0), max(radius - first, 0)
    grad = near.new_zeros(heads, 2 * radius + 1)
    grad[:, 0] = line[:, :lowest].sum(1) + far[0]
    grad[:, 2 * radius] += line[:, highest:].sum(1) + far[1]
    inner = line[:, lowest:highest]
    start = first + lowest + radius
    grad[:, start : start + inner.shape[1]] += inner
    return grad


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dsink = Σ P_sink∘(dLSE − Δ), [H]; `delta` holds Δ − dLSE. Rows without a softmax add nothing."""
    p = torch.exp(sink.float()[None, :, None] - lse).masked_fill_(lse == float("-inf"), 0.0)
    return p.mul_(delta).sum((0, 2)).neg_().to(sink.dtype)
