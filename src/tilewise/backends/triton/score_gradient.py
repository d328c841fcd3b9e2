"""dS of one tile, recomputed: what the gradients of biases add up.

Both biases take dS before the soft cap's factor. Their sums run across the tiles that the other gradients own, so
`bias_gradient.py` and `relative_gradient.py` have kernels of their own, and only a call that asks for such a gradient
pays for it. Each output has one owner that adds in a fixed order, or a few owners whose partial sums are added
afterwards: no atomics.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.base import Operands
from tilewise.backends.triton.features import (
    ALIBI,
    BASE_TILE,
    BIAS,
    LOG2E,
    RELATIVE,
    bit_tile,
    find_tile,
    head_rows,
    kept,
    map_row,
    probabilities,
    within,
)
from tilewise.backends.triton.launch import TritonPlan, number_arguments, tensor_arguments
from tilewise.masks.tensors import TileTensors


@triton.jit
def score_gradient(
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
    PACKED: tl.constexpr,
    MAP: tl.constexpr,
    SCORE: tl.constexpr,
    DROPOUT: tl.constexpr,
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
        dots = tl.dot(q, tl.trans(k), input_precision="ieee")
        p, _ = probabilities(
            dots, lse2[:, None], i, j, start_m, start_n, bits_ptr, tl.maximum(state, 0), geometry, extras,
            LEFT, RIGHT, SCORE, True, False, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if MAP:
            seen = bit_tile(bits_ptr, tl.maximum(state, 0), within(start_m), within(start_n), BLOCK_M, BLOCK_N)
            p = tl.where(seen | (state == -2), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = kept(tl.load(seed_ptr), threshold, start_m, start_n, h, b, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
    return ds


PROGRAMS = 1024
"""About as many programs as fill a large device; fewer owners than that share their sums among several."""


def bias_arguments(
    operands: Operands,
    dout: Tensor,
    lse2: Tensor,
    delta: Tensor,
    grad: Tensor,
    prepared: TritonPlan,
    tiles: TileTensors | None,
) -> tuple[Any, ...]:
    """The arguments that the kernels here begin theirs with."""
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


def bias_launch(prepared: TritonPlan) -> dict[str, Any]:
    """Their compile-time flags and launch shape."""
    tile = prepared.tiles.bias
    return {
        **prepared.flags,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
