"""From operands to the forward kernel's arguments.

What follows from the spec is worked out once, by `plan`; what depends on the tensors of a call is gathered here with as
little Python as possible. Nothing reads the device, so a call that was made before can be captured in a CUDA graph: the
first one fetches schedules and tile maps from the host.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.backends.base import Operands, empty_output
from tilewise.backends.hopper import schedule
from tilewise.backends.hopper.configs import REGISTERS, ForwardConfig, forward_config
from tilewise.backends.triton.launch import tile_tensors
from tilewise.masks.tensors import TileTensors
from tilewise.spec import AttentionSpec

LOG2E = math.log2(math.e)
NO_LIMIT = 1 << 30
"""A window side that reaches further than any sequence; sums with positions stay inside 32 bits."""


class ForwardPlan(NamedTuple):
    """What a spec decides before any tensor is seen."""

    config: ForwardConfig
    constants: tuple[Any, ...]
    """The kernel's compile-time arguments, in its order."""
    left: int
    right: int
    """Row i sees keys i + left … i + right, beyond an offset that only the device knows."""
    scale_log2: float
    softcap_in: float
    listed: bool
    """Tiles differ in length and the host knows how: each CTA has its own list of them."""
    compiled: dict[Any, Any]
    """Compiled kernels by device and by what the pointers point at: the kernel is specialised on nothing else."""

    def __str__(self) -> str:
        return str(self.config)


def plan(spec: AttentionSpec, config: ForwardConfig | None = None) -> ForwardPlan:
    """The plan of a spec; cached with the dispatcher's plan. `config` is for tests and measurements."""
    config = config or forward_config(spec)
    left, right = (None, None) if spec.mask is not None else spec.reach
    from tilewise.backends.hopper import walk

    offset = spec.offset or 0
    offset_kind = walk.OFFSET_FIXED
    if spec.q_offset == "tensor":
        offset_kind = walk.OFFSET_TENSOR
    elif spec.packed and spec.q_offset is None:
        offset_kind = walk.OFFSET_ALIGNED
    fixed = bool(offset_kind == walk.OFFSET_FIXED)
    limited = left is not None or right is not None
    listed = not spec.packed and limited and fixed
    # A last block that M cuts is a limit on the right like any other.
    tail = spec.mask is None and (spec.packed or spec.k_len % config.block_n != 0)
    ends = walk.LIMITED if right is not None or tail else walk.NO_END
    if spec.packed and (left, right) == (None, None):
        ends = walk.END_ONLY
    queued = spec.packed or spec.mask is not None
    order = walk.QUEUED if queued else walk.LISTED if listed else walk.ROW_MAJOR
    scale_log2, softcap_in = spec.scale * LOG2E, 0.0
    if spec.softcap is not None:
        scale_log2, softcap_in = spec.softcap * LOG2E, 2.0 * LOG2E * spec.scale / spec.softcap
    constants = (
        config.warpgroups,
        REGISTERS[config.warpgroups],
        config.block_n,
        config.stages,
        order.value,
        left is not None,
        ends.value,
        # Only one block of any 64 rows is then cut.
        left is None and (right is None or (fixed and (offset + right) % 64 == 0)),
        offset_kind.value,
        spec.packed,
        spec.mask is not None,
        spec.softcap is not None,
        spec.sink,
        config.q_in_registers,
        config.q_buffers,
        config.out_over_q,
        config.chains,
    )
    return ForwardPlan(
        config,
        constants,
        0 if left is None else clamp(offset - left),
        NO_LIMIT if right is None else clamp(offset + right),
        scale_log2,
        softcap_in,
        listed,
        compiled={},
    )


def clamp(limit: int) -> int:
    return max(-NO_LIMIT, min(limit, NO_LIMIT))


def for_copy_engine(x: Tensor) -> tuple[Tensor, list[int]]:
    """x [B, H, N, D] and strides as the copy engine takes them: multiples of 16 bytes, and so the base.

    A tensor that does not lie so is copied once. Strides of dims of size 1 are never used, so any valid one does.
    """
    size = x.element_size()
    strides = [stride if count > 1 else 16 // size for count, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    low_bits = x.data_ptr() | (strides[0] | strides[1] | strides[2]) * size
    if low_bits & 15 or min(strides) <= 0 or (x.stride(3) != 1 and x.shape[3] != 1):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = list(x.stride()[:3])
    return x, [*strides, 1]


@cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def forward(operands: Operands, spec: AttentionSpec, prepared: ForwardPlan) -> tuple[Tensor, Tensor]:
    """out [B, H, N, Dv] and lse [B, H, N]."""
    out, lse = empty_output(operands)
    if spec.batch * spec.heads * spec.q_len == 0 or out.numel() == 0:
        return out, lse
    if operands.k.shape[2] == 0:
        return _nothing_to_see(operands, out, lse)
    tiles = tile_tensors(operands, spec, transposed=False)
    launch(operands, spec, prepared, tiles, out, lse)
    return out, lse


def _nothing_to_see(operands: Operands, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The result without any key: the sink's alone."""
    out.zero_()
    if operands.sink is None:
        lse.fill_(-math.inf)
    else:
        lse.copy_(operands.sink.float()[:, None].expand(lse.shape))
    return out, lse


def launch(
    operands: Operands,
    spec: AttentionSpec,
    prepared: ForwardPlan,
    tiles: TileTensors | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Run the kernel."""
    from tilewise.backends.hopper.forward import attention_forward
    from tilewise.backends.hopper.primitives import tile_descriptor

    config = prepared.config
    q, q_strides = for_copy_engine(operands.q)
    k, k_strides = for_copy_engine(operands.k)
    v, v_strides = for_copy_engine(operands.v)
    _, out_strides = for_copy_engine(out)
    index = q.device.index or 0
    rows = 64 * config.warpgroups
    count = -(-spec.q_len // rows) * spec.heads * spec.batch
    programs = min(count, multiprocessors(index))
    counts = lse
    queue = None
    if spec.packed:
        assert operands.cu_seqlens_q is not None
        order, queue = schedule.of_sequences(operands.cu_seqlens_q, spec, rows)
        programs = multiprocessors(index)
    elif tiles is not None:
        queue = torch.zeros(1, dtype=torch.int32, device=q.device)
        counts, order = schedule.of_tile_map(tiles, spec, rows)
    elif prepared.listed:
        order = schedule.of_band(spec, rows, config.block_n, programs, q.device)
    else:
        order = lse
    pointers = (
        lse,
        order,
        lse if queue is None else queue,
        lse if operands.sink is None else operands.sink,
        order if operands.q_offset is None else operands.q_offset,
        order if operands.cu_seqlens_q is None else operands.cu_seqlens_q,
        order if operands.cu_seqlens_k is None else operands.cu_seqlens_k,
        *((order,) * 8 if tiles is None else _map_arguments(tiles, counts)),
    )
    arguments = (
        tile_descriptor(q, q_strides, 64, config.block_d, spec.packed),
        tile_descriptor(k, k_strides, config.block_n, config.block_d, spec.packed),
        tile_descriptor(v, v_strides, config.block_n, config.block_dv, spec.packed),
        tile_descriptor(out, out_strides, 64, config.block_dv, spec.packed),
        *pointers,
        spec.heads,
        spec.group,
        spec.q_len,
        spec.k_len,
        q.shape[2],
        -(-spec.q_len // rows),
        count,
        programs,
        -(-spec.k_len // config.block_n),
        spec.k_len // config.block_n,
        prepared.left,
        prepared.right,
        *((1, 1, 1) if tiles is None else (tiles.batch, tiles.heads, tiles.q_tiles)),
        prepared.scale_log2,
        prepared.softcap_in,
        *prepared.constants,
    )
    key = (index, *(x.dtype for x in pointers))
    compiled = prepared.compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments)
        return
    compiled = attention_forward[(programs,)](*arguments, num_warps=4, enable_fp_fusion=True)
    if compiled is not None:
        prepared.compiled[key] = compiled


def _map_arguments(tiles: TileTensors, counts: Tensor) -> tuple[Tensor, ...]:
    return (
        counts,
        tiles.run_begin,
        tiles.run_start,
        tiles.run_stop,
        tiles.part_begin,
        tiles.part_col,
        tiles.part_id,
        tiles.bits,
    )
