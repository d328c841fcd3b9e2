"""Gradient of a dense bias, portable: dbias is the sum of dS over the dimensions that the bias broadcasts.

One program owns block_m × block_n elements of the bias (one row, column or element where it broadcasts rows or keys)
and walks the (b, h, row tile, key tile) combinations that broadcast onto them, recomputing dS of each and adding it in
registers. Where that makes few programs with long walks, each walk is cut into `splits` equal parts, whose sums are
written in float32 and added afterwards in a fixed order.
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
    MAP_ARRAYS,
    SHARED_INTEGERS,
    ceil_div,
    row_offset,
)
from tilewise.backends.triton.launch import TritonPlan
from tilewise.backends.triton.score_gradient import PROGRAMS, bias_arguments, bias_launch, score_gradient
from tilewise.masks.tensors import TileTensors


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
        acc += score_gradient(
            pointers, strides, arrays, numbers, b, h, row_tile * BLOCK_M, key_tile * BLOCK_N, 0, 0, q_len, k_len,
            offset_b, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, LEFT, RIGHT, PACKED, MAP, SCORE, DROPOUT,
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
        *bias_arguments(operands, dout, lse2, delta, grad, prepared, tiles),
        prepared.batch,
        splits,
        BY_BATCH=by_batch,
        BY_HEAD=by_head,
        BY_ROW=by_row,
        BY_KEY=by_key,
        **bias_launch(prepared),
    )
    return grad[0] if splits == 1 else grad.sum(0).to(bias.dtype)
