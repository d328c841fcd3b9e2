"""`DecodeBackend` on the Hopper kernel for latent caches: multi-head latent attention in its absorbed form."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.backends.decoding import DecodeOperands, empty_decoded
from tilewise.backends.hopper import gluon_obstacle
from tilewise.backends.hopper.launch import multiprocessors as multiprocessors_of
from tilewise.backends.triton import made_current
from tilewise.backends.triton.decode_configs import DecodeTile, choose_splits
from tilewise.backends.triton.decode_launch import MERGE, MERGE_COLUMNS, DecodePlan
from tilewise.backends.triton.decoding import TRITON_DECODE
from tilewise.backends.triton.launch import SMALLEST_SCALE, launch
from tilewise.spec import DecodeSpec

COLUMNS = 512
"""Latent columns, which are keys and values."""
REST = 64
"""Rotary columns beside them."""
TILE = DecodeTile(64, 4, 2, 1)
"""64 tokens a block, four warps of a producer (the consumers come on top), two buffers; one CTA a multiprocessor."""


class LatentPlan(NamedTuple):
    """What a spec decides before any tensor is seen."""

    tiles: int
    """Row tiles a sequence."""
    splits: int
    constants: tuple[Any, ...]
    merge_constants: tuple[Any, ...]
    scale_log2: float
    compiled: dict[Any, Any]
    plain: bool = True
    """What Triton answered may be remembered by strides alone."""

    def __str__(self) -> str:
        return f"64×{TILE.block_n}, two consumers, {self.splits} splits"


def fits_copy_engine(k: Tensor) -> bool:
    """Whether the copy engine takes tokens of this pool: each begins at a multiple of 16 bytes, and of a token's own.

    `tile_descriptor` counts places in tokens, so pages or sequences must lie a whole number of tokens apart.
    """
    page, token = k.stride(0), k.stride(2)
    lies_right = k.stride(3) == 1 and token > 0 and page % token == 0 and not (k.data_ptr() | 2 * token) & 15
    return lies_right and k.numel() > 0


def plan(spec: DecodeSpec, multiprocessors: int | None = None) -> LatentPlan:
    """The plan of a spec, cached with the dispatcher's plan."""
    tiles = -(-spec.heads * spec.q_len // 64)
    splits = choose_splits(spec, TILE, tiles, multiprocessors or multiprocessors_of(torch.cuda.current_device()))
    causal = spec.limits[1] == 0 and spec.q_len > 1
    constants = spec.group, causal, spec.page_size is not None, spec.packed, splits > 1
    merge_constants = COLUMNS, MERGE_COLUMNS, max(2, 1 << (splits - 1).bit_length()), False, False
    return LatentPlan(tiles, splits, constants, merge_constants, spec.scale * math.log2(math.e), {})


def forward(operands: DecodeOperands, prepared: LatentPlan, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    """out [B, H, T, 512] and lse [B, H, T], or packed with a batch of one."""
    from tilewise.backends.hopper.latent_decode import latent_decode
    from tilewise.backends.hopper.primitives import tile_descriptor
    from tilewise.backends.triton.decode_merge import merge_splits

    q, k = operands.q, operands.k
    q = q if q.stride(3) == 1 else q.contiguous()
    out, lse = empty_decoded(q, COLUMNS)
    splits, rows = prepared.splits, lse.numel()
    programs = prepared.tiles * splits * spec.batch
    if programs == 0 or rows == 0:
        return out, lse
    found, statistic = out, lse
    if splits > 1:
        found = torch.empty(splits, rows, COLUMNS, dtype=torch.float32, device=q.device)
        statistic = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    table = operands.page_table
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    lengths = operands.lengths.contiguous()
    token = k.stride(2)
    # There is one head, whose stride is never used but must be a valid one.
    strides = [k.stride(0), token, token, 1]
    arguments = (
        *(tile_descriptor(k, strides, TILE.block_n, columns, packed=True) for columns in (COLUMNS, REST)),
        *(q, found, statistic, lengths, table),
        None if operands.cu_seqlens_q is None else operands.cu_seqlens_q.contiguous(),
        *q.stride()[:3],
        0 if table is None else table.stride(0),
        k.stride(0) // token,
        rows,
        *(spec.heads, spec.q_len, q.shape[2], prepared.tiles, splits, spec.capacity, k.shape[0]),
        spec.page_size or 1,
        prepared.scale_log2,
    )
    launch(latent_decode, programs, prepared, (q, found, statistic), arguments, prepared.constants, TILE)
    if splits > 1:
        columns = COLUMNS // MERGE_COLUMNS
        merged = (found, statistic, out, lse, None, rows, splits, spec.heads, q.shape[2], columns)
        tensors = (found, statistic, out, lse)
        launch(merge_splits, rows * columns, prepared, tensors, merged, prepared.merge_constants, MERGE, early=False)
    return out, lse


@cache
def _portable(spec: DecodeSpec) -> DecodePlan:
    return TRITON_DECODE.configure(spec)


class HopperDecode:
    """Decoding against latent caches. A pool that the copy engine cannot take is read by the Triton kernel."""

    name = "hopper"

    def why_not(self, spec: DecodeSpec) -> str | None:
        if spec.device != "sm_90":
            return f"its kernels use wgmma and TMA as sm_90 has them, not {spec.device}"
        if not spec.latent:
            return "it decodes against latent caches only; the others are read at the memory's speed by triton"
        if spec.kv_heads != 1:
            return f"its rows are all heads of one latent vector, not of {spec.kv_heads}"
        if (spec.head_dim, spec.v_head_dim) != (COLUMNS + REST, COLUMNS):
            return f"its tiles are {COLUMNS} latent columns and {REST} rotary ones"
        if spec.dtype not in ("float16", "bfloat16"):
            return f"its matrix products take float16 and bfloat16, not {spec.dtype}"
        if spec.page_size is not None and spec.page_size % TILE.block_n:
            return f"its blocks of {TILE.block_n} tokens do not fit into pages of {spec.page_size}"
        features = {
            "a window": spec.limits[0] is not None or (spec.q_len > 1 and spec.limits[1] not in (None, 0)),
            "a ring": spec.ring,
            "int8": spec.int8,
            "left padding": spec.padded,
            "trees": spec.tree,
            "ALiBi": spec.alibi,
            "soft caps": spec.softcap is not None,
            "sinks": spec.sink,
        }
        wanted = [name for name, there in features.items() if there]
        if wanted:
            return f"it does not know {' and '.join(wanted)}"
        if spec.scale < SMALLEST_SCALE:
            return "it takes row maxima before it scales, so it needs a scale above zero, and not below float32's"
        return gluon_obstacle()

    def configure(self, spec: DecodeSpec) -> LatentPlan:
        return plan(spec)

    def forward(self, operands: DecodeOperands, spec: DecodeSpec, config: LatentPlan) -> tuple[Tensor, Tensor]:
        if not fits_copy_engine(operands.k):
            return TRITON_DECODE.forward(operands, spec, _portable(spec))
        with made_current(operands.q):
            return forward(operands, config, spec)


HOPPER_DECODE = HopperDecode()
