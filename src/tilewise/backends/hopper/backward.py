"""The launcher of the Hopper backward: row statistics, then the main kernel and dQ's conversion, or, at head dims above
128, one kernel for dK and dV and one for dQ.

Nothing here reads the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.backends.base import Gradients, Needs, Operands
from tilewise.backends.hopper.launch import LOG2E, clamp, for_copy_engine
from tilewise.backends.triton.launch import tile_tensors
from tilewise.masks.tensors import TileTensors
from tilewise.spec import AttentionSpec

PAIR = 128
"""Query rows that the main kernel walks at a time; the float32 accumulator of dQ is padded to them."""
KEYS = 128
"""Keys of one CTA."""
GRID_ROWS = 65535
"""The largest second dim of a launch grid."""


def backward_obstacle(spec: AttentionSpec) -> str | None:
    """One true sentence on why this backward cannot serve `spec`, or None if it can."""
    dims = spec.head_dim, spec.v_head_dim
    if max(dims) > 128 and spec.mask is not None:
        return "its kernels for head dims above 128 do not walk tile maps"
    if any(dim % 8 for dim in dims):
        return "the copy engine writes gradients in rows of multiples of 16 bytes, so head dims must be multiples of 8"
    if spec.deterministic and max(dims) <= 128:
        return "dQ is added up by the copy engine, in an order that differs from run to run"
    if spec.batch * spec.heads > GRID_ROWS:
        return f"its launch grids hold {GRID_ROWS} heads of sequences at most"
    return None


class BackwardPlan(NamedTuple):
    """What a spec decides before any tensor is seen."""

    block_d: int
    """Columns of every tile: 64, 128 or 256, whichever holds D and Dv."""
    left: int
    right: int
    """Row i sees keys i − left … i + right, beyond an offset that only the device knows."""
    numbers: tuple[float, float, float, float]
    """scale; then scale·log2 e; with a soft cap c, scale/c and c·log2 e."""
    constants: tuple[int, ...]
    """The main kernels' compile-time arguments, in their order."""
    compiled: dict[Any, Any]
    """Compiled kernels by what Triton would look them up by."""


@cache
def plan(spec: AttentionSpec) -> BackwardPlan:
    """The plan of a spec that has no obstacle."""
    left, right = (None, None) if spec.mask is not None else spec.reach
    soft = (spec.scale / spec.softcap, spec.softcap * LOG2E) if spec.softcap is not None else (0.0, 0.0)
    offset = spec.offset or 0
    offset_kind = 1 if spec.q_offset == "tensor" else 2 if spec.packed and spec.q_offset is None else 0
    widest = max(spec.head_dim, spec.v_head_dim)
    assert widest <= 128 or spec.mask is None
    block_d = 64 if widest <= 64 else 128 if widest <= 128 else 256
    keys = KEYS if block_d <= 128 else 64
    return BackwardPlan(
        block_d=block_d,
        left=0 if left is None else clamp(left - offset),
        right=0 if right is None else clamp(right + offset),
        numbers=(spec.scale, spec.scale * LOG2E, *soft),
        constants=(
            *(spec.packed, offset_kind, left is not None, right is not None),
            *((spec.mask is not None,) if block_d <= 128 else ()),
            spec.packed or spec.k_len % keys != 0,
            spec.softcap is not None,
        ),
        compiled={},
    )


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    prepared: BackwardPlan,
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    num_warps: int,
) -> None:
    """Run `kernel`; as in the Triton backend's `launch`, what Triton answered for aligned `tensors` is remembered."""
    key = None
    if not any(x.data_ptr() & 15 for x in tensors):
        key = (kernel, tensors[0].device.index, *((x.dtype, x.stride()) for x in tensors))
        compiled = prepared.compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1)](*arguments)
            return
    compiled = kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True)
    if key is not None and compiled is not None:
        prepared.compiled[key] = compiled


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    config: Any,  # noqa: ARG001  (the forward's plan; this one follows from the spec alone)
    needs: Needs,
) -> Gradients:
    """The gradients that `needs` names, of a spec that has no obstacle."""
    if min(operands.q.numel(), operands.k.numel(), operands.v.numel()) == 0:
        return _of_nothing(dlse, operands, lse, needs)
    return run(dout, dlse, operands, out, lse, spec, plan(spec), needs)


def run(
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    prepared: BackwardPlan,
    needs: Needs,
) -> Gradients:
    """Launch the three kernels."""
    from tilewise.backends.hopper.primitives import FLAT, box_descriptor, tile_descriptor

    q, k, v = operands.q, operands.k, operands.v
    block_d, packed = prepared.block_d, spec.packed
    # Kept until the kernels are launched: descriptors know addresses only.
    inputs = [for_copy_engine(x) for x in (q, k, v, dout)]
    q, k, v, dout = (x for x, _ in inputs)
    dq = torch.empty_like(q) if needs.q else None
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    pairs = -(-spec.q_len // PAIR)
    head_rows = -(-(q.shape[2] + PAIR * spec.batch) // PAIR) * PAIR if packed else pairs * PAIR
    total = (1 if packed else spec.batch) * spec.heads * head_rows
    statistics = torch.empty(total * 2, dtype=torch.float32, device=q.device)
    accumulator = None
    if block_d <= 128:
        accumulator = torch.empty(total * block_d, dtype=torch.float32, device=q.device)

    def tiles_of(x: Tensor, strides: list[int]) -> Any:
        return tile_descriptor(x, strides, 64, block_d, packed)

    # Before the first launch: the device would wait for the descriptors between the kernels.
    tiles = [tiles_of(*x) for x in inputs]
    rows = box_descriptor(statistics, [total // 32, 64], [64, 1], [2, 64], FLAT)
    dk_tiles, dv_tiles = tiles_of(*for_copy_engine(dk)), tiles_of(*for_copy_engine(dv))
    lengths = (operands.q_offset, operands.cu_seqlens_q, operands.cu_seqlens_k)
    sizes = (spec.heads, spec.kv_heads, spec.q_len, spec.k_len, head_rows, prepared.left, prepared.right)
    numbers = (*prepared.numbers, *prepared.constants)
    if accumulator is None:
        from tilewise.backends.hopper.wide_dkdv import attention_dkdv
        from tilewise.backends.hopper.wide_dq import attention_dq

        dq_tiles = None if dq is None else tiles_of(*for_copy_engine(dq))
        dsink = _statistics(dout, dlse, operands, out, lse, spec, prepared, needs, statistics, None)
        grid = (-(-spec.k_len // 64), spec.batch * spec.kv_heads)
        arguments = (*tiles, rows, dk_tiles, dv_tiles, *lengths, *sizes, *numbers)
        _launch(attention_dkdv, grid, prepared, (statistics,), arguments, num_warps=4)
        if dq is not None:
            grid = (pairs, spec.batch * spec.heads)
            arguments = (*tiles, dq_tiles, statistics, *lengths, *sizes, *numbers)
            _launch(attention_dq, grid, prepared, (statistics,), arguments, num_warps=4)
    else:
        from tilewise.backends.hopper.backward_kernel import attention_backward
        from tilewise.backends.hopper.conversion import convert_dq

        dq_boxes = box_descriptor(accumulator, [total * block_d // 256, 256], [256, 1], [16, 256], FLAT)
        tile_map = _map_arguments(tile_tensors(operands, spec, transposed=True))
        dsink = _statistics(dout, dlse, operands, out, lse, spec, prepared, needs, statistics, accumulator)
        grid = (-(-spec.k_len // KEYS), spec.batch * spec.kv_heads)
        arguments = (*tiles, rows, dq_boxes, dk_tiles, dv_tiles, *lengths, *tile_map, *sizes, *numbers)
        _launch(attention_backward, grid, prepared, (accumulator,), arguments, num_warps=4)
        if dq is not None:
            grid = (pairs * (PAIR // 64) * (block_d // 64), spec.batch * spec.heads)
            arguments = (
                *(accumulator, dq, operands.cu_seqlens_q, *dq.stride()[:3], spec.heads, spec.q_len, head_rows),
                *(spec.scale, q.shape[3], block_d, packed),
            )
            read = (dq,) if operands.cu_seqlens_q is None else (dq, operands.cu_seqlens_q)
            _launch(convert_dq, grid, prepared, read, arguments, num_warps=4)
    sink = operands.sink
    return Gradients(
        dq,
        dk if needs.k else None,
        dv if needs.v else None,
        sink=None if dsink is None or sink is None else dsink.sum((0, 2)).to(sink.dtype),
    )


def _statistics(
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    prepared: BackwardPlan,
    needs: Needs,
    statistics: Tensor,
    accumulator: Tensor | None,
) -> Tensor | None:
    """Fill `statistics`, and `accumulator` with zeros; the sink's gradient in parts [B, H, tiles], if it is wanted."""
    from tilewise.backends.hopper.preprocess import row_statistics

    out = out if out.stride(3) == 1 else out.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    block_d, packed = prepared.block_d, spec.packed
    rows = 128 if block_d == 64 else 64
    grid = (-(-spec.q_len // PAIR) * (PAIR // rows), spec.batch * spec.heads)
    dsink = None
    if needs.sink and operands.sink is not None:
        dsink = torch.empty((spec.batch, spec.heads, grid[0]), dtype=torch.float32, device=out.device)
    sink = None if dsink is None else operands.sink
    cu_q = operands.cu_seqlens_q
    head_rows = statistics.numel() // 2 // (spec.heads * (1 if packed else spec.batch))
    arguments = (
        *(out, dout, lse, dlse, sink, cu_q, statistics, accumulator, dsink),
        *(*out.stride()[:3], *dout.stride()[:3]),
        *(spec.heads, spec.q_len, operands.q.shape[2], head_rows, operands.v.shape[3], block_d, rows, packed),
        *(dlse is not None, dsink is not None),
    )
    read = (out, dout, *(x for x in (lse, dlse, sink, cu_q) if x is not None))
    _launch(row_statistics, grid, prepared, read, arguments, num_warps=8)
    return dsink


def _map_arguments(tiles: TileTensors | None) -> tuple[Any, ...]:
    if tiles is None:
        return (*(None,) * 9, 1, 1, 1)
    # A transposed map's "query tiles" are tiles of keys.
    return (*tiles[4:], tiles.batch, tiles.heads, tiles.q_tiles)


def _of_nothing(dlse: Tensor | None, operands: Operands, lse: Tensor, needs: Needs) -> Gradients:
    """Without rows or keys nothing is attended; only a sink still receives what the LSE's gradient brings."""
    grads = [
        torch.zeros_like(x) if wanted else None
        for x, wanted in zip((operands.q, operands.k, operands.v), (needs.q, needs.k, needs.v), strict=True)
    ]
    sink = None
    if needs.sink and operands.sink is not None:
        sink = torch.zeros_like(operands.sink)
        if dlse is not None and lse.numel():
            share = torch.exp(operands.sink.float()[None, :, None] - lse) * dlse
            sink = share.masked_fill(lse == -math.inf, 0.0).sum((0, 2)).to(sink.dtype)
    return Gradients(*grads, sink=sink)
