"""Decoding, portable: the queries at the end of each sequence against a cache, in one Triton kernel and a merge.

Computes, for query t of a sequence of `length` tokens at position p = length − T + t, softmax(scores)·V over the tokens
it may see. Memory-bound: each key and value is read once for all query heads that share it, so the heads of a group and
the T queries are the rows of one tile (row = t·group + head), padded to what the matrix unit takes.

One program owns block_m such rows of one K/V head and one *split* of the tokens that they can see (Flash-Decoding, Dao
et al. 2023). Q, the accumulator, the running maximum (`peak`, in log2 units) and sum stay in registers; K and V tiles
of block_n tokens stream through a software pipeline of num_stages. With more than one split the normalised partial
result and its LSE go to memory in float32, and decode_merge.py joins them: the merge of SPEC 1.2.

Where token j lies is decided tile by tile: `slot = j` (dense), `j mod capacity` (ring), or looked up in the page table,
once a tile where pages hold whole tiles, else once a token. A page outside the pool is not read: its tokens count as
absent. int8 rows (INT8) are read as pairs, since matrix units take their operands 16 bits at a time: even and odd
columns are two products each, in float16, and the scales multiply a column of S and of P. In a
latent cache (LATENT, DeepSeek-V2) the values are the first Dv columns of the keys: one tile, read once, serves both
products, and the remaining D − Dv columns are a tile of their own.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from tilewise.backends.triton.features import ALIBI, LN2, LOG2E, SOFTCAP, ceil_div, sequence, tanh

DENSE = tl.constexpr(0)
RING = tl.constexpr(1)
PAGED_TILES = tl.constexpr(2)
PAGED_TOKENS = tl.constexpr(3)
"""How a token's place is found: as it is, modulo the capacity, by one page of a tile, or by one page a token."""

INTEGERS = [
    "heads",
    "kv_heads",
    "q_len",
    "q_rows",
    "tile_count",
    "splits",
    "capacity",
    "pages",
    "left",
    "right",
    "tree_stride",
    "stride_table",
    "scale_stride_p",
    "scale_stride_h",
    "alibi_stride_b",
    "tree_stride_b",
    "stride_split",
]
"""Sizes on which no kernel specialises, so that a new shape compiles nothing."""


SMALLEST = tl.constexpr(1e-30)
"""What a scale of int8 values counts as at least, since its logarithm is taken; that of zeros is 0."""


@triton.jit
def places(j, j_first, inside, b, table_ptr, stride_table, capacity, pages, LAYOUT: tl.constexpr, PAGE: tl.constexpr):
    """(page, slot) of tokens j [block_n] and which of them are there; 64 bits, because pools are large."""
    if LAYOUT == DENSE:
        page = b.to(tl.int64)
        slot = j
    elif LAYOUT == RING:
        page = b.to(tl.int64)
        slot = j - j // capacity * capacity
    elif LAYOUT == PAGED_TILES:
        # The tile's first token is in reach of the table, because a tile without visible tokens is not visited.
        index = tl.load(table_ptr + b * stride_table + j_first // PAGE)
        there = (index >= 0) & (index < pages)
        page = tl.where(there, index, 0).to(tl.int64)
        # No token of an absent page is there.
        inside = inside & (j < tl.where(there, j_first + PAGE, 0))
        slot = j - j_first // PAGE * PAGE
    else:
        index = tl.load(table_ptr + b * stride_table + j // PAGE, mask=inside, other=-1)
        inside = inside & (index >= 0) & (index < pages)
        page = tl.where(inside, index, 0).to(tl.int64)
        slot = j - j // PAGE * PAGE
    return page, slot.to(tl.int64), inside


@triton.jit
def rows_of(pointer, row, inside, dims, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows at element offsets `row` [rows], [rows, BLOCK_DIM]; 0 where a row is not there or a column not in it."""
    mask = inside[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (dims < DIM)[None, :]
    return tl.load(pointer + row[:, None] + dims[None, :], mask=mask, other=0.0)


UNPACK = tl.constexpr("""
{ .reg .b32 upper;
lop3.b32 $0, $2, 0x00ff00ff, 0x64806480, 0x6a;
shr.u32 upper, $2, 8;
lop3.b32 $1, upper, 0x00ff00ff, 0x64806480, 0x6a;
sub.f16x2 $0, $0, $3;
sub.f16x2 $1, $1, $3; }
""")


@triton.jit
def bytes_of(pairs, ASSEMBLY: tl.constexpr):
    """The lower and the upper int8 of each int16, exactly, as float16.

    0x6400 is 1024 in float16, whose last place is 1 there: a byte offset by 128 in the lowest bits adds itself, and
    1152 is too much. In assembly two pairs cost five instructions, half of what the compiler makes of the expression.
    """
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            UNPACK, "=r,=r,r,r", [pairs, tl.full(pairs.shape, 1152.0, tl.float16)], dtype=(tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        low = ((pairs & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        high = (((pairs >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    return low, high


@triton.jit(do_not_specialize=INTEGERS)
def attention_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lengths_ptr,
    table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    start_ptr,
    sink_ptr,
    alibi_ptr,
    tree_ptr,
    cu_q_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qn: tl.int64,
    stride_kp: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_vp: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_table: tl.int64,
    scale_stride_p: tl.int64,
    scale_stride_h: tl.int64,
    alibi_stride_b: tl.int64,
    tree_stride_b: tl.int64,
    stride_split: tl.int64,
    heads: tl.int32,
    kv_heads: tl.int32,
    q_len: tl.int32,
    q_rows: tl.int32,
    tile_count: tl.int32,
    splits: tl.int32,
    capacity: tl.int32,
    pages: tl.int32,
    left: tl.int32,
    right: tl.int32,
    tree_stride: tl.int32,
    scale: tl.float32,
    softcap: tl.float32,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    LAYOUT: tl.constexpr,
    PAGE: tl.constexpr,
    LATENT: tl.constexpr,
    INT8: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BAND: tl.constexpr,
    TREE: tl.constexpr,
    SCORE: tl.constexpr,
    PADDED: tl.constexpr,
    PACKED: tl.constexpr,
    SINK: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [tokens, H, Dv] and lse [·, H, ·], or with SPLIT the same in float32 for each split, with the LSE in log2
    units and as [splits, tokens, H]. BAND: test left and right element by element (more than one query)."""
    if EARLY:
        # The merge may take its places now; it waits for what this kernel writes.
        gdc_launch_dependents()
    program = tl.program_id(0)
    tile_m = program % tile_count
    split = program // tile_count % splits
    kv_head = program // tile_count // splits % kv_heads
    b = program // tile_count // splits // kv_heads
    first_q, n = sequence(cu_q_ptr, b, q_len, PACKED)
    if tile_m * BLOCK_M >= n * GROUP:
        return
    length = tl.load(lengths_ptr + b)
    first = length - n

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    t = row // GROUP
    h = kv_head * GROUP + row - t * GROUP
    exists = t < n
    p = (first + t)[:, None]
    first_tile = first + tile_m * BLOCK_M // GROUP
    last_tile = first + tl.minimum(tile_m * BLOCK_M + BLOCK_M - 1, n * GROUP - 1) // GROUP
    lo = 0
    if PADDED:
        lo = tl.load(start_ptr + b)
    if LAYOUT == RING:
        lo = tl.maximum(lo, length - capacity)
    if LEFT:
        lo = tl.maximum(lo, first_tile - left)
    hi = length
    if LAYOUT != RING:
        hi = tl.minimum(hi, capacity)
    if RIGHT:
        hi = tl.minimum(hi, last_tile + right + 1)
    tile_lo = lo // BLOCK_N
    tiles = tl.maximum(ceil_div(hi, BLOCK_N) - tile_lo, 0)
    share = (tiles + splits - 1) // splits
    tile_from = tile_lo + split * share
    tile_to = tl.minimum(tile_from + share, tile_lo + tiles)

    batch = b
    if PACKED:
        batch = 0
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    cols = tl.arange(0, BLOCK_N)
    q_row = batch * stride_qb + h * stride_qh + (first_q + t) * stride_qn
    if INT8:
        half_dims = tl.arange(0, BLOCK_D // 2)
        half_v_dims = tl.arange(0, BLOCK_DV // 2)
        q = rows_of(q_ptr, q_row, exists, 2 * half_dims, D, BLOCK_D).to(tl.float32)
        q_odd = rows_of(q_ptr + 1, q_row, exists, 2 * half_dims, D, BLOCK_D).to(tl.float32)
        # float16 reaches less far than bfloat16 does, so each row of Q is brought to 1.
        size = tl.maximum(tl.max(tl.abs(q), 1), tl.max(tl.abs(q_odd), 1))[:, None]
        size = tl.where(size > 0.0, size, 1.0)
        q = (q / size).to(COMPUTE)
        q_odd = (q_odd / size).to(COMPUTE)
    elif LATENT:
        q = rows_of(q_ptr, q_row, exists, v_dims, DV, BLOCK_DV)
        if D > DV:
            q_rest = rows_of(q_ptr + DV, q_row, exists, dims, D - DV, BLOCK_D)
    else:
        q = rows_of(q_ptr, q_row, exists, dims, D, BLOCK_D)
    slope = 0.0
    if ALIBI & SCORE:
        slope = tl.load(alibi_ptr + b * alibi_stride_b + h, mask=exists, other=0.0)[:, None]
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    scale_log2 = scale * LOG2E

    if INT8:
        acc = tl.zeros([BLOCK_M, BLOCK_DV // 2], tl.float32)
        acc_odd = tl.zeros([BLOCK_M, BLOCK_DV // 2], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(tile_from, tile_to, num_stages=STAGES):
        j = tile * BLOCK_N + cols
        inside = (j >= lo) & (j < hi)
        page, slot, inside = places(
            j, tile * BLOCK_N, inside, b, table_ptr, stride_table, capacity, pages, LAYOUT, PAGE
        )  # fmt: skip
        k_row = page * stride_kp + slot * stride_kn
        if INT8:
            k, k_odd = bytes_of(rows_of(k_ptr, k_row, inside, half_dims, D // 2, BLOCK_D // 2), ASSEMBLY)
            s = tl.dot(q, tl.trans(k.to(COMPUTE)), input_precision=PRECISION)
            s = tl.dot(q_odd, tl.trans(k_odd.to(COMPUTE)), s, input_precision=PRECISION)
            at = page * scale_stride_p + kv_head * scale_stride_h + slot
            s *= tl.load(k_scale_ptr + at, mask=inside, other=0.0)[None, :] * size
        elif LATENT:
            k = rows_of(k_ptr, k_row, inside, v_dims, DV, BLOCK_DV)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if D > DV:
                k_rest = rows_of(k_ptr + DV, k_row, inside, dims, D - DV, BLOCK_D)
                s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
        else:
            k = rows_of(k_ptr, k_row, inside, dims, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SCORE:
            s *= scale
            if SOFTCAP & SCORE:
                s = tanh(s / softcap) * softcap
            if ALIBI & SCORE:
                s -= slope * tl.abs(p - j[None, :]).to(tl.float32)
            s *= LOG2E
        else:
            s *= scale_log2
        seen = inside[None, :]
        if LEFT and BAND:
            seen = seen & (j[None, :] >= p - left)
        if RIGHT and BAND:
            seen = seen & (j[None, :] <= p + right)
        if TREE:
            node = j - first
            bits = tl.load(
                tree_ptr + b * tree_stride_b + t[:, None] * tree_stride + node[None, :],
                mask=exists[:, None] & inside[None, :] & (node >= 0)[None, :],
                other=1,
            )  # fmt: skip
            seen = seen & (bits != 0)
        s = tl.where(seen, s, float("-inf"))
        if INT8:
            v_scale = tl.load(v_scale_ptr + at, mask=inside, other=1.0)
            if tl.float16 == COMPUTE:
                # In the exponent the values' scale is part of the weight, and the largest weight is 1 whatever the
                # scales: they may lie outside float16. It costs a rounding of the sum, which float32 would show.
                plain = s
                s += tl.log2(tl.maximum(v_scale, SMALLEST))[None, :]
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # A row that has seen nothing yet has a peak of −∞, and −∞ − (−∞) must not be formed.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(s - base[:, None])
        decay = tl.exp2(peak - base)
        if INT8 and tl.float16 == COMPUTE:
            total = total * decay + tl.sum(tl.exp2(plain - base[:, None]), 1)
        else:
            total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        peak = new_peak
        if INT8:
            v_row = page * stride_vp + slot * stride_vn
            v, v_odd = bytes_of(rows_of(v_ptr, v_row, inside, half_v_dims, DV // 2, BLOCK_DV // 2), ASSEMBLY)
            if tl.float32 == COMPUTE:
                weights *= v_scale[None, :]
            weights = weights.to(COMPUTE)
            acc = tl.dot(weights, v.to(COMPUTE), acc, input_precision=PRECISION)
            acc_odd = acc_odd * decay[:, None]
            acc_odd = tl.dot(weights, v_odd.to(COMPUTE), acc_odd, input_precision=PRECISION)
        elif LATENT:
            acc = tl.dot(weights.to(k.dtype), k, acc, input_precision=PRECISION)
        else:
            v = rows_of(v_ptr, page * stride_vp + slot * stride_vn, inside, v_dims, DV, BLOCK_DV)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    if INT8:
        acc = tl.reshape(tl.join(acc, acc_odd), (BLOCK_M, BLOCK_DV))
    if SINK:
        logit = tl.load(sink_ptr + h, mask=exists, other=0.0).to(tl.float32) * LOG2E
        new_peak = tl.maximum(peak, logit)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - base)
        total = total * decay + tl.exp2(logit - base)
        acc = acc * decay[:, None]
        peak = new_peak
    # A row that saw nothing has an accumulator of 0 and a peak of −∞, which are its results.
    total = tl.where(total > 0.0, total, 1.0)
    out = acc * (1.0 / total)[:, None]
    lse = peak + tl.log2(total)
    token = batch * q_len + first_q + t
    at = token.to(tl.int64) * heads + h
    out_ptrs = out_ptr + split * stride_split * DV + at[:, None] * DV + v_dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (v_dims < DV)[None, :])
    if SPLIT:
        tl.store(lse_ptr + split * stride_split + at, lse, mask=exists)
    else:
        tl.store(lse_ptr + (batch * heads + h).to(tl.int64) * q_rows + first_q + t, lse * LN2, mask=exists)
