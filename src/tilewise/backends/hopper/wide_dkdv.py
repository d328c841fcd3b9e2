"""dK and dV at head dims up to 256, of one tile of 64 keys in one pass over the queries.

dK and dV of 64 keys are all that two warpgroups hold at this width, so they divide the work by product and not by key:

    values    S = K·Qᵀ,   P = 2^(S − LSE),        dV += P·dO
    keys      dP = V·dOᵀ, dS = P∘(dP − Δ),        dK += dS·Q

Both compute transposed scores [keys, rows], so that P and dS leave the registers as the left operands of the second
product. P goes from one to the other through shared memory, in float32 and in the order of the registers. In turn t the
one issues S of block t and dV of block t − 1, and computes P under the latter; the other dK of block t − 1 and dP of
block t. In this order a buffer of Q is handed back half a turn before the next S needs it filled, and so is one of dO
before the next dP. Four products for 64 × 64 pairs read 192 KiB of shared memory, 1536 cycles for 2048 of the tensor
cores; the copy engine and P add 768.

dQ is the other kernel's (wide_dq.py), which multiplies S and dP again: seven products for five, but no sum over CTAs,
so all gradients are the same bits every time. One pass would need 64 KiB more of registers, and add as much to a
float32 accumulator for each 64 KiB that it reads.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportIndexIssue=false

from __future__ import annotations

from tilewise.backends.hopper.backward_parts import (
    ROWS,
    block_place,
    new_barrier,
    position_offset,
    register_order,
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
    reinterpret,
    store_wait,
    tile_place,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)

KEYS = gl.constexpr(64)
"""Keys of a CTA."""

Q_FREE = gl.constexpr(6)
DOUT_FREE = gl.constexpr(8)
WEIGHTS_READY = gl.constexpr(10)
WEIGHTS_FREE = gl.constexpr(12)
"""Hardware barriers, two of each, for blocks of even and of odd number."""

Q_AT = gl.constexpr(0)
DOUT_AT = gl.constexpr(2)
K_AT = gl.constexpr(4)
V_AT = gl.constexpr(5)
SLOTS = gl.constexpr(6)
"""Slots of 64 rows in the pool: two buffers of Q and of dO, K and V."""


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, dout_desc, statistics_desc, shared, tile, b, kv_head, group, queries, keys, blocks,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Load K and V, then Q, dO and their statistics block by block, in the order in which the consumers walk."""
    pool, statistics, _, kv_full, q_full, dout_full = shared
    D: gl.constexpr = pool.type.shape[-1]
    first_q, n, at, head_rows = queries
    first_k, m = keys
    edges, fulls = blocks[:2]
    batch = b
    if PACKED:
        batch = 0
    place = tile_place(batch, kv_head, tile * KEYS, first_k, m, PACKED)
    mbarrier.expect(kv_full[0], KEYS * D * 2)
    tma_load(k_desc, place, kv_full[0], pool.index(K_AT))
    mbarrier.expect(kv_full[1], KEYS * D * 2)
    tma_load(v_desc, place, kv_full[1], pool.index(V_AT))
    count = group * (edges + fulls)
    for t in range(0, count):
        stage = t & 1
        member, row = block_place(t, group, blocks)
        place = tile_place(batch, kv_head * group + member, row, first_q, n, PACKED)
        if t >= 2:
            barrier_sync(Q_FREE + stage, 384)
        mbarrier.expect(q_full.index(stage), ROWS * (2 * D + 8))
        tma_load(q_desc, place, q_full.index(stage), pool.index(Q_AT + stage))
        line = (at + member * head_rows + row) // 32
        tma_load(statistics_desc, [line, 0], q_full.index(stage), statistics.index(stage))
        if t >= 2:
            barrier_sync(DOUT_FREE + stage, 384)
        mbarrier.expect(dout_full.index(stage), ROWS * 2 * D)
        tma_load(dout_desc, place, dout_full.index(stage), pool.index(DOUT_AT + stage))
    for t in range(gl.maximum(count, 2), count + 2):
        barrier_sync(Q_FREE + (t & 1), 384)
        barrier_sync(DOUT_FREE + (t & 1), 384)


@gluon.jit
def _exponentials(
    s, shared, t, behind, band, scores,
    MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """P of block t from its scores s [64 keys, 64 rows], as an operand; leaves it (times the soft cap's slope) for the
    other warpgroup. `behind`: how far the first key lies behind the first row's position."""
    pool, statistics, weights, _, _, _ = shared
    D: gl.constexpr = pool.type.shape[-1]
    S_LAYOUT: gl.constexpr = s.type.layout
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stage = t & 1
    lse = reinterpret(statistics.index(stage), gl.float32, [2, ROWS], FLAT).index(0).load(COLUMN)
    barrier_arrive(Q_FREE + stage, 384)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, S_LAYOUT))[:, None]
    position = (gl.arange(0, ROWS, layout=COLUMN) - behind)[None, :]
    p, slope = weights_of(s, lse[None, :], key, position, band, scores, MASK, LEFT, RIGHT, CUT, SOFTCAP)
    if t >= 2:
        barrier_sync(WEIGHTS_FREE + stage, 256)
    weights.index(stage).store(p * slope)
    barrier_arrive(WEIGHTS_READY + stage, 256)
    return gl.convert_layout(p.to(pool.dtype), gl.DotOperandLayout(0, ACC_LAYOUT, 2))


@gluon.jit
def _value_step(
    p, dv, shared, t, behind, band, scores,
    MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """S of block t, and dV += P·dO of the block before, whose P is `p`; P of block t under the latter."""
    pool, _, _, _, q_full, dout_full = shared
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    stage = t & 1
    before = stage ^ 1
    nothing = gl.zeros([64, ROWS], gl.float32, S_LAYOUT)
    mbarrier.wait(q_full.index(stage), t >> 1 & 1)
    q = wide_slot(pool, Q_AT + stage)
    s = warpgroup_mma(wide_slot(pool, K_AT), q.permute([1, 0]), nothing, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(before), (t - 1) >> 1 & 1)
    dv = warpgroup_mma(p, wide_slot(pool, DOUT_AT + before), dv, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = _exponentials(s, shared, t, behind, band, scores, MASK, LEFT, RIGHT, CUT, SOFTCAP)
    dv, p = warpgroup_mma_wait(0, deps=[dv, p])
    barrier_arrive(DOUT_FREE + before, 384)
    return p, dv


@gluon.jit
def _values(
    dv_desc, shared, tile, b, kv_head, group, keys, blocks, position, band, scores,
    PACKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """dV of the tile. `position`: the first key's."""
    pool, _, _, kv_full, q_full, dout_full = shared
    D: gl.constexpr = pool.type.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    BAND: gl.constexpr = LEFT or RIGHT
    first_k, m = keys
    edges, fulls = blocks[:2]
    count = group * (edges + fulls)
    dv = gl.zeros([64, D], gl.float32, ACC_LAYOUT)
    mbarrier.wait(kv_full[0], 0)
    if count > 0:
        mbarrier.wait(q_full.index(0), 0)
        nothing = gl.zeros([64, ROWS], gl.float32, S_LAYOUT)
        q = wide_slot(pool, Q_AT)
        s = warpgroup_mma(wide_slot(pool, K_AT), q.permute([1, 0]), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        row = block_place(0, group, blocks)[1]
        p = _exponentials(s, shared, 0, position - row, band, scores, BAND, LEFT, RIGHT, CUT, SOFTCAP)
        unmasked = 1
        if BAND:
            unmasked = gl.maximum(group * edges, 1)
            for t in range(1, unmasked):
                row = block_place(t, group, blocks)[1]
                p, dv = _value_step(p, dv, shared, t, position - row, band, scores, True, LEFT, RIGHT, CUT, SOFTCAP)
        for t in range(unmasked, count):
            p, dv = _value_step(p, dv, shared, t, 0, band, scores, False, False, False, CUT, SOFTCAP)
        last = (count - 1) & 1
        mbarrier.wait(dout_full.index(last), (count - 1) >> 1 & 1)
        dv = warpgroup_mma(p, wide_slot(pool, DOUT_AT + last), dv, is_async=True)
        dv = warpgroup_mma_wait(0, deps=[dv])
        barrier_arrive(DOUT_FREE + last, 384)
        for t in range(gl.maximum(count, 2), count + 2):
            barrier_sync(WEIGHTS_FREE + (t & 1), 256)
    batch = b
    if PACKED:
        batch = 0
    # Through K, which nobody else reads.
    wide_slot(pool, K_AT).store(dv.to(pool.dtype))
    fence_async_shared()
    tma_store(dv_desc, tile_place(batch, kv_head, tile * KEYS, first_k, m, PACKED), pool.index(K_AT))
    store_wait(0)


@gluon.jit
def _score_gradients(dp, shared, t):
    """dS of block t from its dP, as an operand."""
    pool, statistics, weights, _, q_full, _ = shared
    D: gl.constexpr = pool.type.shape[-1]
    S_LAYOUT: gl.constexpr = dp.type.layout
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stage = t & 1
    mbarrier.wait(q_full.index(stage), t >> 1 & 1)
    delta = reinterpret(statistics.index(stage), gl.float32, [2, ROWS], FLAT).index(1).load(gl.SliceLayout(0, S_LAYOUT))
    barrier_sync(WEIGHTS_READY + stage, 256)
    p = weights.index(stage).load(S_LAYOUT)
    barrier_arrive(WEIGHTS_FREE + stage, 256)
    ds = p * (dp - delta[None, :])
    return gl.convert_layout(ds.to(pool.dtype), gl.DotOperandLayout(0, ACC_LAYOUT, 2))


@gluon.jit
def _keys(dk_desc, shared, tile, b, kv_head, group, keys, blocks, scale, PACKED: gl.constexpr):
    """dK of the tile. It asks nothing about masks: where a pair is hidden, P is 0."""
    pool, _, _, kv_full, _, dout_full = shared
    D: gl.constexpr = pool.type.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    first_k, m = keys
    edges, fulls = blocks[:2]
    count = group * (edges + fulls)
    dk = gl.zeros([64, D], gl.float32, ACC_LAYOUT)
    nothing = gl.zeros([64, ROWS], gl.float32, S_LAYOUT)
    mbarrier.wait(kv_full[1], 0)
    if count > 0:
        mbarrier.wait(dout_full.index(0), 0)
        dout = wide_slot(pool, DOUT_AT)
        dp = warpgroup_mma(wide_slot(pool, V_AT), dout.permute([1, 0]), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(0, deps=[dp])
        barrier_arrive(DOUT_FREE, 384)
        ds = _score_gradients(dp, shared, 0)
        for t in range(1, count):
            stage = t & 1
            before = stage ^ 1
            dk = warpgroup_mma(ds, wide_slot(pool, Q_AT + before), dk, is_async=True)
            mbarrier.wait(dout_full.index(stage), t >> 1 & 1)
            dout = wide_slot(pool, DOUT_AT + stage)
            dp = warpgroup_mma(wide_slot(pool, V_AT), dout.permute([1, 0]), nothing, use_acc=False, is_async=True)
            dk = warpgroup_mma_wait(1, deps=[dk])
            barrier_arrive(Q_FREE + before, 384)
            dp = warpgroup_mma_wait(0, deps=[dp])
            barrier_arrive(DOUT_FREE + stage, 384)
            ds = _score_gradients(dp, shared, t)
        last = (count - 1) & 1
        dk = warpgroup_mma(ds, wide_slot(pool, Q_AT + last), dk, is_async=True)
        dk = warpgroup_mma_wait(0, deps=[dk])
        barrier_arrive(Q_FREE + last, 384)
    batch = b
    if PACKED:
        batch = 0
    # Through V, which nobody else reads.
    wide_slot(pool, V_AT).store((dk * scale).to(pool.dtype))
    fence_async_shared()
    tma_store(dk_desc, tile_place(batch, kv_head, tile * KEYS, first_k, m, PACKED), pool.index(V_AT))
    store_wait(0)


@gluon.jit(
    do_not_specialize=["heads", "kv_heads", "q_len", "k_len", "head_rows", "left", "right"],
    do_not_specialize_on_alignment=["q_offset_ptr", "cu_q_ptr", "cu_k_ptr"],
)
def attention_dkdv(
    q_desc, k_desc, v_desc, dout_desc, statistics_desc, dk_desc, dv_desc, q_offset_ptr, cu_q_ptr, cu_k_ptr,
    heads, kv_heads, q_len, k_len, head_rows, left, right, scale, scale_log2, soft_scale, soft_log2,
    PACKED: gl.constexpr, OFFSET: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys of one KV head. Grid: (key tiles, batch · KV heads). CUT: the last tile may hold fewer."""
    tile = gl.program_id(0)
    kv_head = gl.program_id(1) % kv_heads
    b = gl.program_id(1) // kv_heads
    group = heads // kv_heads
    first_q, n, padded = sequence(cu_q_ptr, b, q_len, PACKED)
    first_k, m, _ = sequence(cu_k_ptr, b, k_len, PACKED)
    if tile * KEYS >= m:
        return
    batch = b
    if PACKED:
        batch = 0
    offset = position_offset(q_offset_ptr, b, n, m, OFFSET)
    queries = (first_q, n, (batch * heads + kv_head * group) * head_rows + padded, head_rows)
    keys = (first_k, m)
    stop = gl.minimum((tile + 1) * KEYS, m)
    # Row i sees the keys from i + offset − left to i + offset + right, so key j the rows from j − offset − right on.
    blocks = visible_blocks(tile * KEYS - offset, stop - offset, right, left, n, RIGHT, LEFT)
    pool = gl.allocate_shared_memory(q_desc.dtype, [SLOTS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    statistics = gl.allocate_shared_memory(gl.float32, [2, 2, ROWS], statistics_desc.layout)
    # Not in the pool: the compiler would take what is stored for operands of products, and fence.
    weights = gl.allocate_shared_memory(gl.float32, [2, KEYS, ROWS], register_order())
    kv_full = (new_barrier(), new_barrier())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(dout_full.index(stage), count=1)
    shared = (pool, statistics, weights, kv_full, q_full, dout_full)
    fence_async_shared()
    gl.warp_specialize([
        (_producer, (q_desc, k_desc, v_desc, dout_desc, statistics_desc, shared, tile, b, kv_head, group, queries,
                     keys, blocks, PACKED)),
        (_values, (dv_desc, shared, tile, b, kv_head, group, keys, blocks, tile * KEYS - offset, (left, right),
                   (scale_log2, soft_scale, soft_log2), PACKED, LEFT, RIGHT, CUT, SOFTCAP)),
        (_keys, (dk_desc, shared, tile, b, kv_head, group, keys, blocks, scale, PACKED)),
    ], [4, 4], [240, 240])  # fmt: skip
