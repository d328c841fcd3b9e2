"""Decoding against a latent cache (DeepSeek-V2's absorbed form) on Hopper: keys of 512 + 64 columns whose first 512 are
the values too, one for all heads.

One CTA owns 64 rows (row = query token · heads + head) of a sequence and one split of its tokens. A producer (TMA)
brings 64 tokens at a time into one of two buffers, from which both products read them. The accumulator, 64 × 512 in
float32, is what two consumer warpgroups hold, half of the columns each:

    scores    S = Q·Kᵀ and the softmax, P to shared memory, then  acc += P·V  of columns 0 … 255
    values    the other columns, with that P

Per block the tensor cores get P_j·V_j of both and then S_{j+1}: so the buffer of block j is handed back before S_{j+1}
begins, and has the time of that product, a softmax and the next P·V to be filled again. A block is 2176 cycles of
products and a softmax of some 450 under which nothing else runs; S before P·V would hide the softmax, but not the copy.

The cache's end, and a page that is not there, are the end of a virtual sequence (`tile_descriptor`): what lies behind
is never read and counts as 0.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportIndexIssue=false

from __future__ import annotations

from tilewise.backends.hopper.backward_parts import sequence
from tilewise.backends.hopper.primitives import (
    RAGGED,
    barrier_arrive,
    barrier_sync,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)
TOKENS = gl.constexpr(64)
DV = gl.constexpr(512)
"""Columns that are keys and values."""
REST = gl.constexpr(64)
"""Columns that are keys only: the rotary part."""
HALF = gl.constexpr(256)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

K_FREE = gl.constexpr(6)
"""Hardware barrier of each of the two buffers: both consumers no longer need it."""
P_READY = gl.constexpr(8)
P_FREE = gl.constexpr(9)
"""The weights are in shared memory; and have been read."""
DECAY_READY = gl.constexpr(10)
"""By how much what was summed so far shrinks is in shared memory; behind the last block 1 / the rows' sums."""
Q_READY = gl.constexpr(11)
"""Both warpgroups have put their columns of Q there."""


@gluon.jit
def _token_place(table_ptr, b, tile, hi, token_stride, pages, page_tokens, PAGED: gl.constexpr):
    """First token in the pool of block `tile` of sequence b, and how many of its tokens are there."""
    j = tile * TOKENS
    length = gl.minimum(gl.maximum(hi - j, 0), TOKENS)
    if PAGED:
        index = gl.load(table_ptr + j // page_tokens)
        there = (index >= 0) & (index < pages)
        length = gl.where(there, length, 0)
        first = gl.where(there, index, 0).to(gl.int64) * token_stride + j % page_tokens
    else:
        first = b.to(gl.int64) * token_stride + j
    return first.to(gl.int32), length


@gluon.jit
def _producer(k_desc, rest_desc, shared, table_ptr, b, blocks, pool, PAGED: gl.constexpr):
    """Load blocks of tokens, each into the buffer that was handed back last."""
    _, _, k_s, rest_s, _, _, k_full = shared
    first_block, count, hi = blocks
    token_stride, pages, page_tokens = pool
    for t in range(0, count):
        stage = t & 1
        first, length = _token_place(
            table_ptr, b, first_block + t, hi, token_stride, pages, page_tokens, PAGED
        )  # fmt: skip
        if t >= 2:
            barrier_sync(K_FREE + stage, 384)
        mbarrier.expect(k_full.index(stage), TOKENS * (DV + REST) * 2)
        tma_load(k_desc, (RAGGED, first + length, 0, RAGGED - length, 0), k_full.index(stage), k_s.index(stage))
        tma_load(
            rest_desc, (RAGGED, first + length, 0, RAGGED - length, DV), k_full.index(stage), rest_s.index(stage)
        )  # fmt: skip
    for t in range(gl.maximum(count, 2), count + 2):
        barrier_sync(K_FREE + (t & 1), 384)


@gluon.jit
def _load_queries(q_ptr, q_strides, tile, target, first_column, rows, GROUP: gl.constexpr, COLUMNS: gl.constexpr):
    """Columns from `first_column` on of the tile's query rows into shared memory; 0 where a row is not there."""
    THREADS: gl.constexpr = COLUMNS // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
    row = tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    column = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    stride_h, stride_n = q_strides
    t = row // GROUP
    at = (row - t * GROUP) * stride_h + t * stride_n
    q = gl.load(q_ptr + at[:, None] + column[None, :], mask=(row < rows)[:, None], other=0.0)
    target.store(q)


@gluon.jit
def _store_rows(out_ptr, acc, inverse, at, row, rows, W: gl.constexpr):
    """Half of the output's columns; `at` is the tile's first row in out."""
    LAYOUT: gl.constexpr = acc.type.layout
    column = HALF * W + gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    row = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))
    out = acc * gl.convert_layout(inverse, gl.SliceLayout(1, LAYOUT))[:, None]
    pointers = out_ptr + (at + row.to(gl.int64))[:, None] * DV + column[None, :]
    gl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])


@gluon.jit
def _products(q_s, q_rest_s, k_s, rest_s, stage):
    """Issue S = Q·Kᵀ of a buffer."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    k = k_s.index(stage).reshape([TOKENS, DV])
    rest = rest_s.index(stage).reshape([TOKENS, REST])
    zero = gl.zeros([ROWS, TOKENS], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q_s, k.permute([1, 0]), zero, use_acc=False, is_async=True)
    return warpgroup_mma(q_rest_s, rest.permute([1, 0]), s, is_async=True)


@gluon.jit
def _times_values(p, k_s, stage, acc, W: gl.constexpr):
    """Issue acc += P·V of warpgroup W's half of the columns."""
    v = k_s.index(stage).reshape([TOKENS, DV]).slice(HALF * W, HALF, 1)
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _scores(
    q_ptr, out_ptr, lse_ptr, table_ptr, shared, q_strides, tile, b, first, blocks, rows, pool, at, lse_at, lse_stride,
    scale_log2, GROUP: gl.constexpr, CAUSAL: gl.constexpr, PAGED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The weights of every block, and the left half of the output. `first`: the first query's position."""
    q_s, q_rest_s, k_s, rest_s, p_s, decay_s, k_full = shared
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    first_block, count, hi = blocks
    token_stride, pages, page_tokens = pool
    _load_queries(q_ptr, q_strides, tile, q_s.slice(0, HALF, 1), 0, rows, GROUP, HALF)
    _load_queries(q_ptr, q_strides, tile, q_rest_s, DV, rows, GROUP, REST)
    fence_async_shared()
    barrier_sync(Q_READY, 256)

    row = tile * ROWS + gl.arange(0, ROWS, layout=ROW)
    limit = gl.full([ROWS], 0, gl.int32, ROW) + hi
    # The fewest tokens that a row of the tile sees.
    lowest = hi
    if CAUSAL:
        limit = gl.minimum(limit, first + row // GROUP + 1)
        lowest = gl.minimum(hi, first + tile * ROWS // GROUP + 1)
    peak = gl.full([ROWS], -float("inf"), gl.float32, ROW)
    total = gl.zeros([ROWS], gl.float32, ROW)
    acc = gl.zeros([ROWS, HALF], gl.float32, ACC_LAYOUT)
    if count > 0:
        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma_wait(0, deps=[_products(q_s, q_rest_s, k_s, rest_s, 0)])
        _, length = _token_place(table_ptr, b, first_block, hi, token_stride, pages, page_tokens, PAGED)
        for t in range(0, count):
            stage = t & 1
            after = stage ^ 1
            j = (first_block + t) * TOKENS
            if (j + TOKENS > lowest) | (length < TOKENS):
                column = j + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, S_LAYOUT))
                s = gl.where(column[None, :] < gl.minimum(limit, j + length)[:, None], s, -float("inf"))
            new_peak = gl.maximum(peak, gl.max(s, 1) * scale_log2)
            # A row that has seen nothing yet has a peak of −∞, and −∞ − (−∞) must not be formed.
            base = gl.where(new_peak == -float("inf"), 0.0, new_peak)
            decay = gl.exp2(peak - base)
            peak = new_peak
            if t > 0:
                barrier_sync(P_FREE, 256)
            decay_s.store(decay)
            barrier_arrive(DECAY_READY, 256)
            weights = gl.exp2(s * scale_log2 - base[:, None])
            total = total * decay + gl.sum(weights, 1)
            p = weights.to(p_s.dtype)
            p_s.store(p)
            fence_async_shared()
            barrier_arrive(P_READY, 256)
            # While the other warpgroup's product runs.
            acc *= gl.convert_layout(decay, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
            acc = _times_values(gl.convert_layout(p, gl.DotOperandLayout(0, ACC_LAYOUT, 2)), k_s, stage, acc, 0)
            # Behind the last block the scores of a buffer that holds an older one, which nobody looks at.
            if t + 1 < count:
                _, length = _token_place(table_ptr, b, first_block + t + 1, hi, token_stride, pages, page_tokens, PAGED)
                mbarrier.wait(k_full.index(after), t + 1 >> 1 & 1)
            s = _products(q_s, q_rest_s, k_s, rest_s, after)
            acc = warpgroup_mma_wait(2, deps=[acc])
            barrier_arrive(K_FREE + stage, 384)
            s = warpgroup_mma_wait(0, deps=[s])
        barrier_sync(P_FREE, 256)
    known = gl.where(total > 0.0, total, 1.0)
    inverse = 1.0 / known
    decay_s.store(inverse)
    barrier_arrive(DECAY_READY, 256)
    _store_rows(out_ptr, acc, inverse, at, row, rows, 0)
    lse = peak + gl.log2(known)
    if SPLIT:
        gl.store(lse_ptr + lse_at + row, lse, mask=row < rows)
    else:
        t = row // GROUP
        gl.store(lse_ptr + lse_at + (row - t * GROUP) * lse_stride + t, lse * LN2, mask=row < rows)


@gluon.jit
def _values(q_ptr, out_ptr, shared, q_strides, tile, blocks, rows, at, GROUP: gl.constexpr):
    """The right half of the output."""
    q_s, _, k_s, _, p_s, decay_s, k_full = shared
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)
    _, count, _ = blocks
    _load_queries(q_ptr, q_strides, tile, q_s.slice(HALF, HALF, 1), HALF, rows, GROUP, HALF)
    fence_async_shared()
    barrier_arrive(Q_READY, 256)
    acc = gl.zeros([ROWS, HALF], gl.float32, ACC_LAYOUT)
    for t in range(0, count):
        stage = t & 1
        barrier_sync(DECAY_READY, 256)
        acc *= decay_s.load(ROW)[:, None]
        mbarrier.wait(k_full.index(stage), t >> 1 & 1)
        barrier_sync(P_READY, 256)
        acc = _times_values(p_s, k_s, stage, acc, 1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier_arrive(P_FREE, 256)
        barrier_arrive(K_FREE + stage, 384)
    barrier_sync(DECAY_READY, 256)
    row = tile * ROWS + gl.arange(0, ROWS, layout=ROW)
    _store_rows(out_ptr, acc, decay_s.load(ROW), at, row, rows, 1)


@gluon.jit(
    do_not_specialize=["stride_table", "token_stride", "heads", "q_len", "q_rows", "tile_count", "splits", "capacity",
                       "pages", "page_tokens", "stride_split"],
    do_not_specialize_on_alignment=["lengths_ptr", "table_ptr", "cu_q_ptr"],
)  # fmt: skip
def latent_decode(
    k_desc, rest_desc, q_ptr, out_ptr, lse_ptr, lengths_ptr, table_ptr, cu_q_ptr,
    stride_qb: gl.int64, stride_qh: gl.int64, stride_qn: gl.int64, stride_table: gl.int64, token_stride: gl.int64,
    stride_split: gl.int64, heads, q_len, q_rows, tile_count, splits, capacity, pages, page_tokens, scale_log2,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, PAGED: gl.constexpr, PACKED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """out [tokens, H, 512] and lse, as `triton.decode.attention_decode` writes them. Grid: batch · splits · row tiles.

    `token_stride`: tokens from one page, or one dense sequence, to the next.
    """
    program = gl.program_id(0)
    tile = program % tile_count
    split = program // tile_count % splits
    b = program // tile_count // splits
    first_q, n, _ = sequence(cu_q_ptr, b, q_len, PACKED)
    rows = n * GROUP
    if tile * ROWS >= rows:
        return
    length = gl.load(lengths_ptr + b)
    first = length - n
    hi = gl.minimum(length, capacity)
    visible = hi
    if CAUSAL:
        last = gl.minimum(tile * ROWS + ROWS - 1, rows - 1) // GROUP
        visible = gl.minimum(hi, first + last + 1)
    count = gl.cdiv(gl.maximum(visible, 0), TOKENS)
    share = gl.cdiv(count, splits)
    first_block = split * share
    count = gl.maximum(gl.minimum(count - first_block, share), 0)
    blocks = (first_block, count, hi)
    batch = b
    if PACKED:
        batch = 0
    q_strides = (stride_qh, stride_qn)
    q_ptr += batch * stride_qb + first_q * stride_qn
    if PAGED:
        table_ptr += b * stride_table
    token = (batch * q_len + first_q).to(gl.int64)
    at = split * stride_split + token * heads
    lse_at = at
    if not SPLIT:
        lse_at = (batch * heads).to(gl.int64) * q_rows + first_q
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = k_desc.dtype
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DV], dtype)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, REST], dtype)
    q_s = gl.allocate_shared_memory(dtype, [ROWS, DV], WIDE)
    q_rest_s = gl.allocate_shared_memory(dtype, [ROWS, REST], NARROW)
    k_s = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    rest_s = gl.allocate_shared_memory(dtype, [2] + rest_desc.block_type.shape, rest_desc.layout)  # noqa: RUF005
    p_s = gl.allocate_shared_memory(dtype, [ROWS, TOKENS], NARROW)
    decay_s = gl.allocate_shared_memory(gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for stage in gl.static_range(2):
        mbarrier.init(k_full.index(stage), count=1)
    shared = (q_s, q_rest_s, k_s, rest_s, p_s, decay_s, k_full)
    pool = (token_stride, pages, page_tokens)
    fence_async_shared()
    gl.warp_specialize([
        (_producer, (k_desc, rest_desc, shared, table_ptr, b, blocks, pool, PAGED)),
        (_scores, (q_ptr, out_ptr, lse_ptr, table_ptr, shared, q_strides, tile, b, first, blocks, rows, pool, at,
                   lse_at, q_rows, scale_log2, GROUP, CAUSAL, PAGED, SPLIT)),
        (_values, (q_ptr, out_ptr, shared, q_strides, tile, blocks, rows, at, GROUP)),
    ], [4, 4], [240, 240])  # fmt: skip
