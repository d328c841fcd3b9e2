"""From a decoding call to kernel arguments: the split kernel, and the merge where there is more than one split."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.backends.decoding import DecodeOperands, empty_decoded
from tilewise.backends.triton.decode_configs import DecodeTile, choose_splits, rows_of_tile, tile_for
from tilewise.backends.triton.launch import ALIBI, NO_LIMIT, SOFTCAP, block_dims, launch
from tilewise.spec import DecodeSpec

DENSE, RING, PAGED_TILES, PAGED_TOKENS = range(4)
"""Ways in which a token's place is found, as decode.py defines them."""

MERGE_COLUMNS = 128
"""Columns of the output that one program of the merge has."""

MERGE = DecodeTile(0, 4, 1, 1)
"""Its launch shape; only warps and stages count."""


class DecodePlan(NamedTuple):
    """What a spec decides before any tensor is seen."""

    tile: DecodeTile
    block_m: int
    tiles: int
    """Row tiles a K/V head and sequence."""
    splits: int
    constants: tuple[Any, ...]
    """Compile-time arguments of the split kernel."""
    merge_constants: tuple[Any, ...]
    left: int
    right: int
    scale: float
    softcap: float
    v_dim: int
    plain: bool
    compiled: dict[Any, Any]

    def __str__(self) -> str:
        return f"{self.block_m}×{self.tile}, {self.splits} splits"


def _columns(size: int, least: int) -> int:
    """Columns of a tile that holds `size`: a power of two, and what the matrix unit takes at least."""
    return max(least, 1 << (size - 1).bit_length())


def plan(spec: DecodeSpec) -> DecodePlan:
    """The plan of a spec, cached with the dispatcher's plan."""
    import triton.language as tl

    tile, block_m = tile_for(spec), rows_of_tile(spec)
    tiles = -(-spec.group * spec.q_len // block_m)
    multiprocessors = 132
    if spec.device != "cpu" and torch.cuda.is_available():
        multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    splits = choose_splits(spec, tile, tiles, multiprocessors)
    left, right = spec.limits
    if spec.ring:
        layout = RING
    elif spec.page_size is None:
        layout = DENSE
    else:
        layout = PAGED_TILES if spec.page_size % tile.block_n == 0 else PAGED_TOKENS
    score = (SOFTCAP if spec.softcap is not None else 0) | (ALIBI if spec.alibi else 0)
    dim, v_dim = spec.head_dim, spec.v_head_dim
    if spec.latent:
        block_d, block_dv = _columns(max(dim - v_dim, 1), 16), _columns(v_dim, 16)
    elif spec.int8:
        block_d, block_dv = _columns(dim, 32), _columns(v_dim, 32)
    else:
        block_d, block_dv = block_dims(dim, v_dim, 4 if spec.dtype == "float32" else 2)
    early = spec.device.startswith("sm_") and int(spec.device[3:]) >= 90
    compute = tl.float32 if spec.dtype == "float32" else tl.float16
    constants = (
        spec.group,
        dim,
        v_dim,
        block_d,
        block_dv,
        block_m,
        tile.block_n,
        tile.num_stages,
        layout,
        spec.page_size or 1,
        spec.latent,
        spec.int8,
        left is not None,
        right is not None and spec.q_len > 1,
        spec.q_len > 1,
        spec.tree,
        score,
        spec.padded,
        spec.packed,
        spec.sink and splits == 1,
        splits > 1,
        splits > 1 and early,
        spec.device != "cpu" and spec.dtype != "float32",
        compute,
        "tf32x3" if spec.dtype == "float32" and max(block_d, block_dv) <= 64 else "ieee",
    )
    block_columns = min(MERGE_COLUMNS, block_dv)
    merge_constants = (v_dim, block_columns, max(2, 1 << (splits - 1).bit_length()), spec.sink, early)
    return DecodePlan(
        tile,
        block_m,
        tiles,
        splits,
        constants,
        merge_constants,
        min(left or 0, NO_LIMIT),
        min(right or 0, NO_LIMIT),
        spec.scale,
        spec.softcap or 1.0,
        v_dim,
        not (score or spec.sink or spec.tree or spec.packed),
        {},
    )


def _plain(x: Tensor | None) -> Tensor | None:
    """A vector that the kernel steps through without a stride: a slice or an expanded value is copied."""
    return x if x is None else x.contiguous()


def _scales(k_scale: Tensor | None, v_scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both with the same strides, and tokens one after another; copied where a cache keeps them otherwise."""
    if k_scale is None or v_scale is None or (k_scale.stride() == v_scale.stride() and k_scale.stride(2) == 1):
        return k_scale, v_scale
    return k_scale.contiguous(), v_scale.contiguous()


def forward(operands: DecodeOperands, prepared: DecodePlan, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    """out [B, H, T, Dv] and lse [B, H, T], or packed with a batch of one."""
    from tilewise.backends.triton.decode import attention_decode
    from tilewise.backends.triton.decode_merge import merge_splits

    q, k, v = operands.q, operands.k, operands.v
    if spec.int8:
        k, v = k.view(torch.int16), None if v is None else v.view(torch.int16)
    out, lse = empty_decoded(q, prepared.v_dim)
    programs = prepared.tiles * prepared.splits * spec.kv_heads * spec.batch
    if programs == 0 or lse.numel() == 0:
        return out, lse
    rows, splits = lse.numel(), prepared.splits
    found, statistic = out, lse
    if splits > 1:
        found = torch.empty(splits, rows, prepared.v_dim, dtype=torch.float32, device=q.device)
        statistic = torch.empty(splits, rows, dtype=torch.float32, device=q.device)
    table, tree = operands.page_table, operands.tree
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    k_scale, v_scale = _scales(operands.k_scale, operands.v_scale)
    lengths, sink, alibi = operands.lengths.contiguous(), _plain(operands.sink), _plain(operands.alibi)
    arguments = (
        q,
        k,
        k if v is None else v,
        found,
        statistic,
        lengths,
        table,
        k_scale,
        v_scale,
        _plain(operands.start),
        sink,
        alibi,
        None if tree is None else tree.contiguous().view(torch.uint8),
        _plain(operands.cu_seqlens_q),
        *q.stride()[:3],
        *k.stride()[:3],
        *(k if v is None else v).stride()[:3],
        0 if table is None else table.stride(0),
        *((0, 0) if k_scale is None else k_scale.stride()[:2]),
        0 if alibi is None or alibi.shape[0] == 1 else alibi.stride(0),
        0 if tree is None or tree.shape[0] == 1 else tree.shape[1] * tree.shape[2],
        rows,
        spec.heads,
        spec.kv_heads,
        spec.q_len,
        q.shape[2],
        prepared.tiles,
        splits,
        spec.capacity,
        k.shape[0],
        prepared.left,
        prepared.right,
        0 if tree is None else tree.shape[2],
        prepared.scale,
        prepared.softcap,
    )
    tensors = (q, k, k if v is None else v, found, statistic, lengths)
    tile = prepared.tile
    launch(
        attention_decode, programs, prepared, tensors, arguments, prepared.constants, tile, registers=tile.registers
    )  # fmt: skip
    if splits > 1:
        columns = -(-prepared.v_dim // prepared.merge_constants[1])
        arguments = (found, statistic, out, lse, sink, rows, splits, spec.heads, q.shape[2], columns)
        tensors = (found, statistic, out, lse)
        constants = prepared.merge_constants
        launch(merge_splits, rows * columns, prepared, tensors, arguments, constants, MERGE, early=constants[-1])
    return out, lse
