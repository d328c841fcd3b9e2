"""dQ at head dims up to 256, of one tile of 128 rows in one pass over the keys they see.

A producer (TMA) and two consumer warpgroups of 64 rows each. Q and dO stay in shared memory, dQ in registers; K has two
buffers, V one. A consumer's scores are [rows, keys], so that dS leaves the registers as the left operand of dQ += dS·K.
Per block j the tensor cores get

    dQ_{j−1} | S_j | dP_j        exp runs under dP, dS under the other consumer's products.

K of block j − 1 is handed back as soon as its dQ is done and has a block's time to be filled again; V of block j, after
dP, has two thirds of one. Three products for 64 × 64 pairs are 1536 cycles of the tensor cores, and as many of shared
memory.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportIndexIssue=false

from __future__ import annotations

from tilewise.backends.hopper.backward_parts import (
    block_place,
    new_barrier,
    position_offset,
    sequence,
    visible_blocks,
    weights_of,
    wide_slot,
)
from tilewise.backends.hopper.primitives import (
    barrier_arrive,
    barrier_sync,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    store_wait,
    tile_place,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(128)
"""Rows of a CTA; 64 a warpgroup."""
KEYS = gl.constexpr(64)
"""Keys of a block."""

K_FREE = gl.constexpr(6)
V_FREE = gl.constexpr(8)
"""Hardware barriers, two of K's buffers and one of V's: the consumers no longer need what is in it."""

Q_AT = gl.constexpr(0)
DOUT_AT = gl.constexpr(2)
K_AT = gl.constexpr(4)
V_AT = gl.constexpr(6)
SLOTS = gl.constexpr(7)
"""Slots of 64 rows in the pool: the warpgroups' halves of Q and dO, two buffers of K, one of V."""


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, dout_desc, shared, row, b, h, kv_head, rows, keys, blocks, PACKED: gl.constexpr,
):  # fmt: skip
    """Load Q and dO, then K and V block by block: K one block ahead, as it has two buffers."""
    pool, q_full, k_full, v_full = shared
    D: gl.constexpr = pool.type.shape[-1]
    first_q, n = rows
    first_k, m = keys
    edges, fulls = blocks[:2]
    batch = b
    if PACKED:
        batch = 0
    count = edges + fulls
    mbarrier.expect(q_full, 2 * ROWS * D * 2)
    for w in gl.static_range(2):
        place = tile_place(batch, h, row + 64 * w, first_q, n, PACKED)
        tma_load(q_desc, place, q_full, pool.index(Q_AT + w))
        tma_load(dout_desc, place, q_full, pool.index(DOUT_AT + w))
    for t in range(0, count + 1):
        if t < count:
            stage = t & 1
            key = block_place(t, 1, blocks)[1]
            if t >= 2:
                barrier_sync(K_FREE + stage, 384)
            mbarrier.expect(k_full.index(stage), KEYS * D * 2)
            place = tile_place(batch, kv_head, key, first_k, m, PACKED)
            tma_load(k_desc, place, k_full.index(stage), pool.index(K_AT + stage))
        if t >= 1:
            key = block_place(t - 1, 1, blocks)[1]
            if t >= 2:
                barrier_sync(V_FREE, 384)
            mbarrier.expect(v_full, KEYS * D * 2)
            tma_load(v_desc, tile_place(batch, kv_head, key, first_k, m, PACKED), v_full, pool.index(V_AT))
    for t in range(gl.maximum(count, 2), count + 2):
        barrier_sync(K_FREE + (t & 1), 384)
    if count > 0:
        barrier_sync(V_FREE, 384)


@gluon.jit
def _score_gradients(
    s, pool, v_full, t, statistics, behind, band, scores, W: gl.constexpr,
    MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """dS of block t as an operand, given its scores s [64 rows, 64 keys], which may be under way.

    `behind`: how far the block's first key lies behind the first row's position.
    """
    D: gl.constexpr = pool.type.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    lse, delta = statistics
    nothing = gl.zeros([64, KEYS], gl.float32, S_LAYOUT)
    mbarrier.wait(v_full, t & 1)
    v = wide_slot(pool, V_AT)
    dp = warpgroup_mma(wide_slot(pool, DOUT_AT + W), v.permute([1, 0]), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, S_LAYOUT))[None, :]
    position = (gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT)) - behind)[:, None]
    p, slope = weights_of(s, lse[:, None], key, position, band, scores, MASK, LEFT, RIGHT, CUT, SOFTCAP)
    p *= slope
    dp = warpgroup_mma_wait(0, deps=[dp])
    barrier_arrive(V_FREE, 384)
    ds = p * (dp - delta[:, None])
    return gl.convert_layout(ds.to(pool.dtype), gl.DotOperandLayout(0, ACC_LAYOUT, 2))


@gluon.jit
def _step(
    ds, dq, shared, t, statistics, behind, band, scores, W: gl.constexpr,
    MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """dQ += dS·K of the block before, whose dS is `ds`, then dS of block t."""
    pool, _, k_full, v_full = shared
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    nothing = gl.zeros([64, KEYS], gl.float32, S_LAYOUT)
    stage = t & 1
    before = stage ^ 1
    dq = warpgroup_mma(ds, wide_slot(pool, K_AT + before), dq, is_async=True)
    mbarrier.wait(k_full.index(stage), t >> 1 & 1)
    k = wide_slot(pool, K_AT + stage)
    s = warpgroup_mma(wide_slot(pool, Q_AT + W), k.permute([1, 0]), nothing, use_acc=False, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    barrier_arrive(K_FREE + before, 384)
    ds = _score_gradients(s, pool, v_full, t, statistics, behind, band, scores, W, MASK, LEFT, RIGHT, CUT, SOFTCAP)
    return ds, dq


@gluon.jit
def _consumer(
    dq_desc, statistics_ptr, shared, row, at, b, h, rows, blocks, offset, band, scale, scores,
    PACKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr, SOFTCAP: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """dQ of rows 64·W … 64·W + 63 of the tile from row `row` on; `at` is its first row in the statistics."""
    pool, q_full, k_full, v_full = shared
    D: gl.constexpr = pool.type.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    BAND: gl.constexpr = LEFT or RIGHT
    first_q, n = rows
    edges, fulls = blocks[:2]
    count = edges + fulls
    lines = statistics_ptr + (at + 64 * W).to(gl.int64) * 2 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    statistics = (gl.load(lines), gl.load(lines + 64))
    position = row + 64 * W + offset
    dq = gl.zeros([64, D], gl.float32, ACC_LAYOUT)
    mbarrier.wait(q_full, 0)
    if count > 0:
        nothing = gl.zeros([64, KEYS], gl.float32, S_LAYOUT)
        mbarrier.wait(k_full.index(0), 0)
        k = wide_slot(pool, K_AT)
        s = warpgroup_mma(wide_slot(pool, Q_AT + W), k.permute([1, 0]), nothing, use_acc=False, is_async=True)
        key = block_place(0, 1, blocks)[1]
        ds = _score_gradients(s, pool, v_full, 0, statistics, key - position, band, scores,
                              W, BAND, LEFT, RIGHT, CUT, SOFTCAP)  # fmt: skip
        unmasked = 1
        if BAND:
            unmasked = gl.maximum(edges, 1)
            for t in range(1, unmasked):
                key = block_place(t, 1, blocks)[1]
                ds, dq = _step(ds, dq, shared, t, statistics, key - position, band, scores,
                               W, True, LEFT, RIGHT, CUT, SOFTCAP)  # fmt: skip
        for t in range(unmasked, count):
            ds, dq = _step(ds, dq, shared, t, statistics, 0, band, scores, W, False, False, False, CUT, SOFTCAP)
        last = (count - 1) & 1
        dq = warpgroup_mma(ds, wide_slot(pool, K_AT + last), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        barrier_arrive(K_FREE + last, 384)
    batch = b
    if PACKED:
        batch = 0
    # Through this warpgroup's half of Q, which nobody else reads.
    wide_slot(pool, Q_AT + W).store((dq * scale).to(pool.dtype))
    fence_async_shared()
    tma_store(dq_desc, tile_place(batch, h, row + 64 * W, first_q, n, PACKED), pool.index(Q_AT + W))
    store_wait(0)


@gluon.jit(
    do_not_specialize=["heads", "kv_heads", "q_len", "k_len", "head_rows", "left", "right"],
    do_not_specialize_on_alignment=["q_offset_ptr", "cu_q_ptr", "cu_k_ptr"],
)
def attention_dq(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, statistics_ptr, q_offset_ptr, cu_q_ptr, cu_k_ptr,
    heads, kv_heads, q_len, k_len, head_rows, left, right, scale, scale_log2, soft_scale, soft_log2,
    PACKED: gl.constexpr, OFFSET: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """dQ of 128 rows of one head. Grid: (row tiles, batch · heads). CUT: the last block of keys may hold fewer."""
    # Rows that see the most keys under a causal rule go first.
    row = (gl.num_programs(0) - 1 - gl.program_id(0)) * ROWS
    h = gl.program_id(1) % heads
    b = gl.program_id(1) // heads
    first_q, n, padded = sequence(cu_q_ptr, b, q_len, PACKED)
    first_k, m, _ = sequence(cu_k_ptr, b, k_len, PACKED)
    if row >= n:
        return
    batch = b
    if PACKED:
        batch = 0
    offset = position_offset(q_offset_ptr, b, n, m, OFFSET)
    stop = gl.minimum(row + ROWS, n)
    blocks = visible_blocks(row + offset, stop + offset, left, right, m, LEFT, RIGHT)
    at = (batch * heads + h) * head_rows + padded + row
    pool = gl.allocate_shared_memory(q_desc.dtype, [SLOTS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    q_full = new_barrier()
    v_full = new_barrier()
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(k_full.index(stage), count=1)
    shared = (pool, q_full, k_full, v_full)
    fence_async_shared()
    rows = (first_q, n)
    scores = (scale_log2, soft_scale, soft_log2)
    gl.warp_specialize([
        (_producer, (q_desc, k_desc, v_desc, dout_desc, shared, row, b, h, h // (heads // kv_heads), rows,
                     (first_k, m), blocks, PACKED)),
        (_consumer, (dq_desc, statistics_ptr, shared, row, at, b, h, rows, blocks, offset, (left, right), scale, scores,
                     PACKED, LEFT, RIGHT, CUT, SOFTCAP, gl.constexpr(0))),
        (_consumer, (dq_desc, statistics_ptr, shared, row, at, b, h, rows, blocks, offset, (left, right), scale, scores,
                     PACKED, LEFT, RIGHT, CUT, SOFTCAP, gl.constexpr(1))),
    ], [4, 4], [240, 240])  # fmt: skip
