"""Gradient of a bias by distance, portable: drelative is the sum of dS over the diagonals p − j.

Tiles are square here, so the tiles along one diagonal of tiles hold the same 2·BLOCK − 1 distances, shifted by what the
sequence's offset leaves modulo BLOCK. The stretches of neighbouring diagonals overlap; `_fold_diagonals` adds them into
one line, and folds what lies beyond ±R into its ends.

- `diagonal_gradient`: one program owns the tiles of one head whose row tile minus key tile is one number, so that their
  diagonals coincide, and sums along them. It serves the distances below R.
- `far_gradient`: tiles beyond, all of whose elements fall on the first or last entry; one program a row of tiles.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.base import Operands
from tilewise.backends.triton.features import (
    MAP_ARRAYS,
    SHARED_INTEGERS,
    ceil_div,
    floor_div,
    row_offset,
    sequence,
    visible_tiles,
)
from tilewise.backends.triton.launch import TritonPlan
from tilewise.backends.triton.score_gradient import PROGRAMS, bias_arguments, bias_launch, score_gradient
from tilewise.masks.tensors import TileTensors


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
            ds = score_gradient(
                pointers, strides, arrays, numbers, b, h, row_tile * BLOCK_M, key_tile * BLOCK_N, first_q, first_k, n,
                m, offset_b, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PACKED, MAP, SCORE,
                DROPOUT,
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
        behind += score_gradient(
            pointers, strides, arrays, numbers, b, h, start_m, key_tile * BLOCK_N, first_q, first_k, n, m, offset_b,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PACKED, MAP, SCORE, DROPOUT,
        )  # fmt: skip
    ahead = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for key_tile in range(tl.maximum(first, centre + 1), last):
        ahead += score_gradient(
            pointers, strides, arrays, numbers, b, h, start_m, key_tile * BLOCK_N, first_q, first_k, n, m, offset_b,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PACKED, MAP, SCORE, DROPOUT,
        )  # fmt: skip
    tl.store(grad_ptr + program, tl.sum(tl.sum(ahead, 1), 0))
    tl.store(grad_ptr + heads * batch * row_tiles + program, tl.sum(tl.sum(behind, 1), 0))


def relative_gradient(
    operands: Operands, dout: Tensor, lse2: Tensor, delta: Tensor, prepared: TritonPlan, tiles: TileTensors | None
) -> Tensor:
    """drelative [H, 2R + 1]. The operands have contiguous last dims."""
    relative = operands.relative
    assert relative is not None
    heads, radius = relative.shape[0], relative.shape[1] // 2
    block = prepared.tiles.bias.block_m
    # Distances inside (−R, R) lie on these diagonals of tiles; no tile lies further out than the longest sequences and
    # the offset, where the host knows that.
    furthest = max(prepared.q_len, prepared.k_len) + abs(prepared.offset) if operands.q_offset is None else radius
    reach = min(radius, furthest) // block + 2
    nearest, diagonals = -reach, 2 * reach + 1
    row_tiles = -(-prepared.q_len // block)
    splits = max(1, min(prepared.batch * row_tiles, PROGRAMS // (heads * diagonals)))
    near = torch.empty((splits, heads, diagonals, 4, block), dtype=torch.float32, device=relative.device)
    far = torch.empty((2, heads, prepared.batch * row_tiles), dtype=torch.float32, device=relative.device)
    diagonal_gradient[(splits * heads * diagonals,)](
        *bias_arguments(operands, dout, lse2, delta, near, prepared, tiles),
        prepared.batch,
        splits,
        nearest,
        diagonals,
        **bias_launch(prepared),
    )
    far_gradient[(heads * prepared.batch * row_tiles,)](
        *bias_arguments(operands, dout, lse2, delta, far, prepared, tiles),
        prepared.batch,
        nearest,
        diagonals,
        **bias_launch(prepared),
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
    # Entry x of the line is the distance first + x; entries up to −R and from R on fold into the ends, which are one
    # where R = 0.
    first = (nearest - 1) * block + 1
    lowest = max(-radius - first + 1, 0)
    highest = max(radius - first, lowest)
    grad = near.new_zeros(heads, 2 * radius + 1)
    grad[:, 0] = line[:, :lowest].sum(1) + far[0]
    grad[:, 2 * radius] += line[:, highest:].sum(1) + far[1]
    inner = line[:, lowest:highest]
    start = first + lowest + radius
    grad[:, start : start + inner.shape[1]] += inner
    return grad
