"""Attention backward, portable: Δ, then dK and dV, then dQ, each recomputing P from the saved LSE (FlashAttention-2).

Deterministic by construction: every gradient element has one owner that adds its terms in a fixed order, so there are
no atomics. With P = 2^(S − LSE) and dP = Z∘(dO·Vᵀ)/(1 − p): dS = P∘(dP − Δ), which the biases receive; the soft cap
then multiplies it by 1 − tanh², and dQ = dS·K·scale, dK = dSᵀ·Q·scale, dV = (Z∘P/(1 − p))ᵀ·dO.

This file holds the launcher and `row_statistics`, which prepares what a row needs besides its scores: LSE in log2
units, with +∞ where a row saw nothing so that its P is exactly 0, and Δ = rowsum(dO∘O) − dLSE.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.base import Gradients, Needs, Operands
from tilewise.backends.scores import sink_gradient
from tilewise.backends.triton.bias_gradient import dense_gradient
from tilewise.backends.triton.dkdv import keys_gradient
from tilewise.backends.triton.dq import queries_gradient
from tilewise.backends.triton.features import LOG2E, ceil_div, head_rows, sequence
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
from tilewise.backends.triton.relative_gradient import relative_gradient
from tilewise.masks.tensors import TileTensors


@triton.jit(do_not_specialize=["heads", "q_len", "q_rows"])
def row_statistics(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    cu_q_ptr,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_on: tl.int64,
    stride_db: tl.int64,
    stride_dh: tl.int64,
    stride_dn: tl.int64,
    heads: tl.int32,
    q_len: tl.int32,
    q_rows: tl.int32,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PACKED: tl.constexpr,
    DLSE: tl.constexpr,
):
    """lse2 = LSE·log2 e (+∞ for −∞) and delta = rowsum(dO∘O) − dLSE, both [B, H, N] float32."""
    tile_count = ceil_div(q_len, BLOCK_M)
    program = tl.program_id(0)
    h = (program // tile_count) % heads
    b = program // tile_count // heads
    start_m = program % tile_count * BLOCK_M
    first_q, n = sequence(cu_q_ptr, b, q_len, PACKED)
    if start_m >= n:
        return
    batch = b
    if PACKED:
        batch = 0
    rows = tl.arange(0, BLOCK_M)
    v_dims = tl.arange(0, BLOCK_DV)
    live = start_m + rows < n
    mask = live[:, None] & (v_dims < DV)[None, :]
    out_ptrs = head_rows(out_ptr, batch, h, first_q + start_m, rows, v_dims, stride_ob, stride_oh, stride_on, True)
    out = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    dout_ptrs = head_rows(dout_ptr, batch, h, first_q + start_m, rows, v_dims, stride_db, stride_dh, stride_dn, True)
    dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
    at = (batch * heads + h).to(tl.int64) * q_rows + first_q + start_m + rows
    lse = tl.load(lse_ptr + at, mask=live, other=float("-inf"))
    delta = tl.sum(out * dout, 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + at, mask=live, other=0.0)
    tl.store(lse2_ptr + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=live)
    tl.store(delta_ptr + at, delta, mask=live)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    prepared: TritonPlan,
    tiles: TileTensors | None,
    transposed: TileTensors | None,
    needs: Needs,
) -> Gradients:
    """The gradients that `needs` names; `tiles` and `transposed` are the tile map, by query and by key tile."""
    q, k, v = unit_last(operands.q), unit_last(operands.k), unit_last(operands.v)
    dout, out = unit_last(dout), unit_last(out)
    strided = operands._replace(q=q, k=k, v=v)
    dq = torch.empty_like(q) if needs.q else None
    dk = torch.empty_like(k) if needs.k else None
    dv = torch.empty_like(v) if needs.v else None
    if prepared.batch * prepared.q_len == 0 or prepared.batch * prepared.k_len == 0:
        return _nothing(operands, dlse, needs)
    # Two tensors, as half of one is aligned for some lengths and not for others, and each way is compiled.
    lse2, delta = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in range(2))
    rows = 32 if prepared.flags["BLOCK_DV"] <= 256 else 16
    row_statistics[(-(-prepared.q_len // rows) * prepared.heads * prepared.batch,)](
        out,
        dout,
        lse,
        dlse if dlse is None else dlse.contiguous(),
        lse2,
        delta,
        operands.cu_seqlens_q,
        *out.stride()[:3],
        *dout.stride()[:3],
        prepared.heads,
        prepared.q_len,
        q.shape[2],
        DV=prepared.flags["DV"],
        BLOCK_DV=prepared.flags["BLOCK_DV"],
        BLOCK_M=rows,
        PACKED=prepared.flags["PACKED"],
        DLSE=dlse is not None,
        enable_fp_fusion=True,
    )
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    if dk is not None or dv is not None:
        tile = prepared.tiles.dkdv
        tma = tile.tma and prepared.tma and copy_engine_takes(q) and copy_engine_takes(dout)
        arguments = (
            descriptor(q, tile.block_m, prepared.flags["BLOCK_D"]) if tma else q,
            k,
            v,
            descriptor(dout, tile.block_m, prepared.flags["BLOCK_DV"]) if tma else dout,
            lse2,
            delta,
            dk,
            dv,
            *tensor_arguments(operands, transposed),
            *strides,
            *((0, 0, 0) if dk is None else dk.stride()[:3]),
            *((0, 0, 0) if dv is None else dv.stride()[:3]),
            *number_arguments(operands, prepared, transposed),
        )
        compile_time = (
            *constants(prepared, tile, wide(q.stride(2), dout.stride(2)), tma),
            dk is not None,
            dv is not None,
        )
        owners = -(-prepared.k_len // tile.block_n) * (prepared.heads // prepared.group) * prepared.batch
        written = tuple(x for x in (dk, dv) if x is not None)
        tensors = (q, k, v, dout, lse2, delta, *written)
        launch(keys_gradient, owners, prepared, tensors, arguments, compile_time, tile)
    if dq is not None:
        tile = prepared.tiles.dq
        tma = tile.tma and prepared.tma and copy_engine_takes(k) and copy_engine_takes(v)
        arguments = (
            q,
            descriptor(k, tile.block_n, prepared.flags["BLOCK_D"]) if tma else k,
            descriptor(v, tile.block_n, prepared.flags["BLOCK_DV"]) if tma else v,
            dout,
            lse2,
            delta,
            dq,
            *tensor_arguments(operands, tiles),
            *strides,
            *dq.stride()[:3],
            *number_arguments(operands, prepared, tiles),
        )
        compile_time = constants(prepared, tile, wide(k.stride(2), v.stride(2)), tma)
        owners = -(-prepared.q_len // tile.block_m) * prepared.heads * prepared.batch
        launch(queries_gradient, owners, prepared, (q, k, v, dout, lse2, delta, dq), arguments, compile_time, tile)
    sink = None
    if needs.sink and operands.sink is not None:
        sink = sink_gradient(operands.sink.float(), lse, delta[..., None]).to(operands.sink.dtype)
    return Gradients(
        dq,
        dk,
        dv,
        dense_gradient(strided, dout, lse2, delta, prepared, tiles) if needs.bias else None,
        relative_gradient(strided, dout, lse2, delta, prepared, tiles) if needs.relative else None,
        sink,
    )


def _nothing(operands: Operands, dlse: Tensor | None, needs: Needs) -> Gradients:
    """The gradients of a call without rows or without keys: of rows without keys the LSE is the sink."""
    differentiable = (operands.q, operands.k, operands.v, operands.bias, operands.relative, operands.sink)
    found = Gradients(
        *(
            torch.zeros_like(x) if wanted and x is not None else None
            for x, wanted in zip(differentiable, needs, strict=True)
        )
    )
    if found.sink is None or dlse is None:
        return found
    return found._replace(sink=dlse.sum((0, 2)).to(found.sink.dtype))
