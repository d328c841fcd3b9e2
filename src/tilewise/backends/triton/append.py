"""Appending to a cache: one Triton kernel writes new tokens where they belong, quantising them on the way if asked.

One program owns one token of one head of one sequence: it reads the sequence's length, finds the token's slot (dense,
modulo the capacity in a ring, or through the page table) and copies its key and value rows. The host reads nothing, so
the launch can be captured and replayed while the cache grows. A token without a place, or overwritten within the same
append, is not written. int8: scale = max|row| / 127, each element to the nearest step.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.triton import made_current


@triton.jit
def _write(
    pool_ptr,
    scale_ptr,
    x_ptr,
    place,
    scale_place,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INT8: tl.constexpr,
):
    """One row x [D] to element offset `place` of a pool, quantised with its scale beside it if INT8."""
    dims = tl.arange(0, BLOCK_D)
    row = tl.load(x_ptr + dims, mask=dims < D, other=0.0)
    if INT8:
        wide = row.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(wide), 0), 127.0)
        steps = tl.div_rn(wide, tl.where(scale > 0.0, scale, 1.0))
        # 1.5·2²³ has no place for halves: adding it rounds to the nearest step, to the even one half way.
        row = ((steps + 12582912.0) - 12582912.0).to(tl.int8)
        tl.store(scale_ptr + scale_place, scale)
    tl.store(pool_ptr + place + dims, row, mask=dims < D)


@triton.jit(do_not_specialize=["stride_table", "tokens", "heads", "capacity", "page_size", "pages"])
def append_tokens(
    pool_k_ptr,
    pool_v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    lengths_ptr,
    k_ptr,
    v_ptr,
    counts_ptr,
    table_ptr,
    stride_pkp: tl.int64,
    stride_pkh: tl.int64,
    stride_pkn: tl.int64,
    stride_pvp: tl.int64,
    stride_pvh: tl.int64,
    stride_pvn: tl.int64,
    stride_sp: tl.int64,
    stride_sh: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_table: tl.int64,
    tokens: tl.int32,
    heads: tl.int32,
    capacity: tl.int32,
    page_size: tl.int32,
    pages: tl.int32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VALUES: tl.constexpr,
    INT8: tl.constexpr,
    COUNTS: tl.constexpr,
    PAGED: tl.constexpr,
    RING: tl.constexpr,
):
    """Token t of head h of sequence b to where token `lengths[b] + t` lies. Strides: p of pages (or sequences), h of
    heads, n of tokens; those of the two scale tensors are the same. `capacity` is one sequence's."""
    program = tl.program_id(0)
    t = program % tokens
    h = program // tokens % heads
    b = (program // tokens // heads).to(tl.int64)
    count = tokens
    if COUNTS:
        count = tl.minimum(tl.load(counts_ptr + b), tokens)
    if t >= count:
        return
    length = tl.load(lengths_ptr + b)
    token = length + t
    if RING:
        if t < count - capacity:
            return
        token = token - token // capacity * capacity
    else:
        if token >= capacity:
            return
    page = b
    slot = token
    if PAGED:
        page = tl.load(table_ptr + b * stride_table + token // page_size).to(tl.int64)
        if (page < 0) | (page >= pages):
            return
        slot = token - token // page_size * page_size
    scale_place = page * stride_sp + h * stride_sh + slot
    place = page * stride_pkp + h * stride_pkh + slot * stride_pkn
    _write(
        pool_k_ptr, k_scale_ptr, k_ptr + b * stride_kb + h * stride_kh + t * stride_kn, place, scale_place, D, BLOCK_D,
        INT8,
    )  # fmt: skip
    if VALUES:
        place = page * stride_pvp + h * stride_pvh + slot * stride_pvn
        _write(
            pool_v_ptr, v_scale_ptr, v_ptr + b * stride_vb + h * stride_vh + t * stride_vn, place, scale_place, DV,
            BLOCK_DV, INT8,
        )  # fmt: skip


def append(
    pool_k: Tensor,
    pool_v: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    lengths: Tensor,
    k: Tensor,
    v: Tensor | None,
    counts: Tensor | None,
    page_table: Tensor | None,
    ring: bool,
) -> None:
    """Writes k [B, Hkv, T, D] and v [B, Hkv, T, Dv] into the pools; leaves the lengths as they are."""
    batch, heads, tokens, dim = k.shape
    k = k if k.stride(-1) == 1 else k.contiguous()
    values = pool_k if pool_v is None else pool_v
    given = k if v is None else v if v.stride(-1) == 1 else v.contiguous()
    page_size = pool_k.shape[2]
    v_dim = values.shape[3]
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()

    with made_current(k):
        append_tokens[(batch * heads * tokens,)](
            pool_k,
            pool_v,
            k_scale,
            v_scale,
            lengths.contiguous(),
            k,
            v,
            counts if counts is None else counts.contiguous(),
            page_table,
            *pool_k.stride()[:3],
            *values.stride()[:3],
            *((0, 0) if k_scale is None else k_scale.stride()[:2]),
            *k.stride()[:3],
            *given.stride()[:3],
            0 if page_table is None else page_table.stride(0),
            tokens,
            heads,
            page_size if page_table is None else page_table.shape[1] * page_size,
            page_size,
            pool_k.shape[0],
            D=dim,
            DV=v_dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_DV=triton.next_power_of_2(v_dim),
            VALUES=pool_v is not None,
            INT8=k_scale is not None,
            COUNTS=counts is not None,
            PAGED=page_table is not None,
            RING=ring,
            num_warps=1,
            enable_fp_fusion=True,
        )
