"""Attention backward for Hopper: dK, dV and dQ of one key tile in one pass over the queries.

One CTA owns 128 keys of one KV head: a producer (TMA) and two consumer warpgroups of 64 keys each. A consumer keeps dK
and dV in registers (for D = 64 also K and V, as left operands) and walks the query blocks that see its keys, 64 rows at
a time, for every head of the group. Scores are computed transposed, S = K·Qᵀ, so that Pᵀ and dSᵀ leave the registers as
the left operands of dV += Pᵀ·dO and dK += dSᵀ·Q. Per block j the tensor cores get

    dP_j | dV_j | dQ_j | S_{j+1} | dK_j        exp runs under dP, dS under dV, the dQ store under S and dK.

dQ_j = dS·K needs both warpgroups' halves of dS, which meet in shared memory. At D = 128 each warpgroup computes half of
its columns; at D = 64 they take turns, so that the other one only arrives at the barrier and runs on. dQ is added to a
float32 accumulator by the copy engine, in the order of the tensor core's registers (conversion.py undoes that). The
copy engine is told in the next block: until the stores have reached shared memory, which the products keep busy, the
fence before that would wait.

Two blocks ("a pair", 128 rows, one tile of a tile map) make one turn of the loop, so that shared-memory addresses are
constants (but Q's at D = 64, which has buffers for two pairs). All of shared memory is one pool, and `opaque` is a zero
that the compiler cannot see through: without these two, descriptors of every buffer become loop invariants in registers
and are spilled.

P and dS recomputed from the LSE: Dao 2023 (FlashAttention-2). Producer and consumers, dQ added by the copy engine: Shah
et al. 2024 (FlashAttention-3).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

from tilewise.backends.hopper.backward_parts import (
    PAIR,
    ROWS,
    new_barrier,
    new_barriers,
    opaque,
    position_offset,
    register_order,
    sequence,
    tanh,
)
from tilewise.backends.hopper.primitives import (
    at_most_zero,
    barrier_arrive,
    barrier_sync,
    constexpr_function,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    store_wait,
    tile_place,
    tma_load,
    tma_reduce_add,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)

KEYS = gl.constexpr(128)
"""Keys of a CTA; 64 a warpgroup."""

Q_FREE = gl.constexpr(6)
DOUT_FREE = gl.constexpr(10)
DS_READY = gl.constexpr(12)
"""Hardware barriers, one for each buffer: the consumers no longer need a block of Q or dO; dS is in shared memory."""

DOUT_AT = gl.constexpr(0)
K_AT = gl.constexpr(2)
V_AT = gl.constexpr(4)
DS_AT = gl.constexpr(6)
"""Slots of 64 rows in the pool: two buffers of dO, the warpgroups' halves of K and V, two buffers of dS. Behind them
come the warpgroups' tiles of dQ and, last, the buffers of Q."""

NOWHERE = gl.constexpr(1 << 29)
"""A row behind any accumulator, where the copy engine adds nothing; one before it is an illegal instruction."""

UNMASKED = gl.constexpr(0)
BAND = gl.constexpr(1)
BITS = gl.constexpr(2)
"""What a block's scores are tested for: nothing, causal rule and window, or a bit tile."""


@constexpr_function
def q_pairs(d):
    """For how many pairs of blocks there are buffers of Q.

    Q is needed for longer than dO: from the scores of a block, which the block before computes, to the block's dK. At
    D = 64 a block takes half as long, and a second pair hides the copy engine's latency; at D = 128 it would cost more
    in addresses that are no constants than it saves.
    """
    return 2 if d == 64 else 1


@gluon.jit
def _slot(pool, index, D: gl.constexpr):
    """One slot of the pool as a tile of 64 rows."""
    return pool.index(index).reshape([ROWS, D])


@gluon.jit
def _ds_slot(pool, zero, u: gl.constexpr, w: gl.constexpr, D: gl.constexpr):
    """Where warpgroup w puts its dS, [64 keys, 64 rows], of block u: one slot for D = 64, half a slot for D = 128."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, ROWS], pool.dtype)
    if D == 128:
        tile = reinterpret(pool.index(DS_AT + u + zero), pool.dtype, [2, 64, ROWS], LAYOUT).index(w)
    else:
        tile = reinterpret(pool.index(DS_AT + 2 * u + w + zero), pool.dtype, [64, ROWS], LAYOUT)
    return tile


@gluon.jit
def _dq_slot(pool, zero, w: gl.constexpr):
    """Warpgroup w's 16 KiB for a tile of dQ: one slot for D = 128, two for D = 64."""
    SLOTS: gl.constexpr = pool.type.shape[0]
    D: gl.constexpr = pool.type.shape[-1]
    if D == 128:
        tile = pool.index(DS_AT + 2 + w + zero).reshape([ROWS, D])
    else:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], pool.dtype)
        tile = reinterpret(pool, pool.dtype, [SLOTS // 2, 128, D], LAYOUT).index((DS_AT + 4) // 2 + w + zero)
    return tile


@gluon.jit
def _q_at(pool, turn, u: gl.constexpr):
    """Slot of block u of a pair's Q; `turn` tells the pairs with buffers apart."""
    return pool.type.shape[0] - 2 * q_pairs(pool.type.shape[-1]) + 2 * turn + u


@gluon.jit
def _visible_pairs(start, stop, offset, left, right, length, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Pairs of rows that keys start … stop of a sequence of `length` rows see: (first, full_from, full_to, last).

    Pairs full_from … full_to see all of these keys, the others of first … last some.
    """
    last = gl.cdiv(length, PAIR)
    first = 0
    full_from = 0
    full_to = last
    if RIGHT:
        first = gl.minimum(gl.maximum(start - offset - right, 0) // PAIR, last)
        full_from = gl.cdiv(gl.maximum(stop - 1 - offset - right, 0), PAIR)
    if LEFT:
        last = gl.maximum(gl.minimum(last, gl.cdiv(gl.maximum(stop - offset + left, 0), PAIR)), first)
        full_to = gl.minimum(full_to, gl.maximum(start - offset + left + 1, 0) // PAIR)
    full_from = gl.minimum(gl.maximum(full_from, first), last)
    full_to = gl.minimum(gl.maximum(full_to, full_from), last)
    return first, full_from, full_to, last


@gluon.jit
def _map_row(b, h, tile, sizes):
    """Row of the transposed tile map, which may not tell sequences or heads apart."""
    batch, heads, tiles = sizes
    return ((b % batch) * heads + h % heads) * tiles + tile


@gluon.jit
def _load_q(q_desc, statistics_desc, shared, place, at, count, u: gl.constexpr):
    """Move block u of pair `count` of Q, and its statistics, which begin at row `at` of theirs."""
    pool, statistics, _, q_full, _ = shared
    D: gl.constexpr = pool.type.shape[-1]
    turn = count % q_pairs(D)
    if count >= q_pairs(D):
        barrier_sync(Q_FREE + 2 * turn + u, 384)
    mbarrier.expect(q_full[u].index(turn), ROWS * (2 * D + 8))
    tma_load(q_desc, place, q_full[u].index(turn), pool.index(_q_at(pool, turn, u)))
    tma_load(statistics_desc, [at // 32, 0], q_full[u].index(turn), statistics.index(2 * turn + u))


@gluon.jit
def _load_dout(dout_desc, shared, place, count, u: gl.constexpr):
    """Move block u of pair `count` of dO."""
    pool, _, _, _, dout_full = shared
    D: gl.constexpr = pool.type.shape[-1]
    if count >= 1:
        barrier_sync(DOUT_FREE + u, 384)
    mbarrier.expect(dout_full[u], ROWS * 2 * D)
    tma_load(dout_desc, place, dout_full[u], pool.index(DOUT_AT + u))


@gluon.jit
def _load_pair(
    q_desc, dout_desc, statistics_desc, shared, batch, head, row, before, at, first, length, count,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Move two blocks of Q and the statistics from row `row` on, and of dO; this one's, or where Q has buffers for two
    pairs, that of the pair before, which begins at `before`. In the order in which buffers are handed back.

    Returns what is `before` for the next pair, and its number.
    """
    AHEAD: gl.constexpr = q_pairs(shared[0].type.shape[-1]) - 1
    for u in gl.static_range(2):
        if AHEAD == 0:
            _load_dout(dout_desc, shared, tile_place(batch, head, row + u * ROWS, first, length, PACKED), count, u)
        elif count >= 1:
            place = tile_place(batch, before[0], before[1] + u * ROWS, first, length, PACKED)
            _load_dout(dout_desc, shared, place, count - 1, u)
        place = tile_place(batch, head, row + u * ROWS, first, length, PACKED)
        _load_q(q_desc, statistics_desc, shared, place, at + row + u * ROWS, count, u)
    return (head, row), count + 1


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, dout_desc, statistics_desc, shared, tile, b, kv_head, group,
    queries, keys, pairs, tile_map, PACKED: gl.constexpr, BANDED: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """Load K and V, then Q, dO and their statistics block by block, in the order in which the consumers walk."""
    pool, _, kv_full, q_full, _ = shared
    D: gl.constexpr = pool.type.shape[-1]
    first_q, n, at, head_rows = queries
    first_k, m = keys
    first, full_from, full_to, last = pairs
    batch = b
    if PACKED:
        batch = 0
    mbarrier.expect(kv_full[0], KEYS * D * 2)
    for w in gl.static_range(2):
        place = tile_place(batch, kv_head, tile * KEYS + 64 * w, first_k, m, PACKED)
        tma_load(k_desc, place, kv_full[0], pool.index(K_AT + w))
    mbarrier.expect(kv_full[1], KEYS * D * 2)
    for w in gl.static_range(2):
        place = tile_place(batch, kv_head, tile * KEYS + 64 * w, first_k, m, PACKED)
        tma_load(v_desc, place, kv_full[1], pool.index(V_AT + w))
    count = 0
    before = (kv_head, 0)
    for member in range(group):
        head = kv_head * group + member
        if MAP:
            run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, _id, _bits, sizes = tile_map
            row = _map_row(b, head, tile, sizes)
            for part in range(gl.load(part_begin + row), gl.load(part_end + row)):
                before, count = _load_pair(q_desc, dout_desc, statistics_desc, shared, batch, head,
                                           gl.load(part_col + part) * PAIR, before, at, first_q, n, count,
                                           PACKED)  # fmt: skip
            for run in range(gl.load(run_begin + row), gl.load(run_end + row)):
                for pair in range(gl.load(run_start + run), gl.load(run_stop + run)):
                    before, count = _load_pair(q_desc, dout_desc, statistics_desc, shared, batch, head, pair * PAIR,
                                               before, at, first_q, n, count, PACKED)  # fmt: skip
        else:
            if BANDED:
                for t in range(first, last - (full_to - full_from)):
                    pair = gl.where(t < full_from, t, t + full_to - full_from)
                    before, count = _load_pair(q_desc, dout_desc, statistics_desc, shared, batch, head, pair * PAIR,
                                               before, at, first_q, n, count, PACKED)  # fmt: skip
            for pair in range(full_from, full_to):
                before, count = _load_pair(q_desc, dout_desc, statistics_desc, shared, batch, head, pair * PAIR,
                                           before, at, first_q, n, count, PACKED)  # fmt: skip
        at += head_rows
    PAIRS: gl.constexpr = q_pairs(D)
    if PAIRS == 2:  # noqa: SIM102  (one is a compile-time constant, the other is not)
        if count >= 1:
            for u in gl.static_range(2):
                place = tile_place(batch, before[0], before[1] + u * ROWS, first_q, n, PACKED)
                _load_dout(dout_desc, shared, place, count - 1, u)
    # In each block the consumers compute the scores of the next: in the last those of what lies there, unused.
    turn = count % PAIRS
    if count >= PAIRS:
        barrier_sync(Q_FREE + 2 * turn, 384)
    mbarrier.arrive(q_full[0].index(turn), count=1)
    if count >= PAIRS:
        barrier_sync(Q_FREE + 2 * turn + 1, 384)
    if count >= 1:
        for u in gl.static_range(2):
            barrier_sync(DOUT_FREE + u, 384)
            if PAIRS == 2:
                barrier_sync(Q_FREE + 2 * (1 - turn) + u, 384)


@gluon.jit
def _send_dq(dq_desc, pool, zero, row, WG: gl.constexpr):
    """Have the copy engine add the tile of dQ that lies in shared memory to the accumulator, from row `row` on.

    The compiler puts the warpgroup's barrier between the stores and this, before the fence or behind it: what counts is
    that the thread which asks the copy engine has passed both.
    """
    fence_async_shared()
    tile = reinterpret(_dq_slot(pool, zero, WG), gl.float32, [16, 256], dq_desc.layout)
    tma_reduce_add(dq_desc, [row, 0], tile)


@gluon.jit
def _block(
    s, dk, dv, k, v, dq_desc, shared, count, dq_row, pending, behind, band, bits, scores,
    u: gl.constexpr, WG: gl.constexpr, MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Block u of a pair, given its scores s [64 keys, 64 rows]; returns the next block's scores, dK and dV, and where
    the accumulator has the rows of the dQ that is still to be sent there.

    `dq_row` and `pending` are these rows of this block and of the tile that is stored and not sent, or NOWHERE;
    `behind` is how far the first key lies behind the first row's position, `bits` points to this warpgroup's words.
    """
    pool, statistics, _, q_full, dout_full = shared
    D: gl.constexpr = pool.type.shape[-1]
    dtype: gl.constexpr = pool.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT_OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    KEY: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # At D = 128 both warpgroups compute half of dQ's columns; at D = 64 they take turns.
    BOTH: gl.constexpr = D == 128
    OWNER: gl.constexpr = BOTH or u == WG
    OVERLAP: gl.constexpr = D == 64
    scale_log2, soft_scale, soft_log2 = scores
    zero = opaque()
    PAIRS: gl.constexpr = q_pairs(D)
    turn = count % PAIRS
    q = _slot(pool, _q_at(pool, turn, u) + zero, D)
    dout = _slot(pool, DOUT_AT + u + zero, D)
    nothing = gl.zeros([64, ROWS], gl.float32, S_LAYOUT)

    mbarrier.wait(dout_full[u], count & 1)
    if D == 64:
        dp = warpgroup_mma(v, dout.permute([1, 0]), nothing, use_acc=False, is_async=True)
    else:
        dp = warpgroup_mma(
            _slot(pool, V_AT + WG + zero, D), dout.permute([1, 0]), nothing, use_acc=False, is_async=True
        )
    if not OWNER:
        _send_dq(dq_desc, pool, zero, pending, WG)
        pending = NOWHERE
    if MASK == BITS:
        words = bits + gl.arange(0, 64, layout=KEY) * 4 + 2 * u
        low = gl.load(words)
        high = gl.load(words + 1)
    lse = reinterpret(statistics.index(2 * turn + u), gl.float32, [2, ROWS], FLAT).index(0).load(COLUMN)
    slope = 1.0
    if SOFTCAP:
        capped = tanh(s * soft_scale)
        x = capped * soft_log2 - lse[None, :]
        slope = 1.0 - capped * capped
    else:
        x = s * scale_log2 - lse[None, :]
    if CUT:
        # Keys past the end read as 0, so their weight may be ∞ where all scores are far below 0; and ∞·0 is NaN in dQ.
        x = at_most_zero(x)
    if MASK == BAND:
        left, right = band
        # The limits move with the rows; differences of keys and rows would not, and be kept in 32 registers.
        key = gl.arange(0, 64, layout=KEY)[:, None]
        position = gl.arange(0, ROWS, layout=COLUMN) + (ROWS * u - 64 * WG - behind)
        if RIGHT:
            x = gl.where(key <= (position + right)[None, :], x, -float("inf"))
        if LEFT:
            x = gl.where(key >= (position - left)[None, :], x, -float("inf"))
    if MASK == BITS:
        column = (zero + gl.arange(0, ROWS, layout=COLUMN))[None, :]
        word = gl.where(column < 32, low[:, None], high[:, None])
        x = gl.where((word >> (column & 31)) & 1 != 0, x, -float("inf"))
    delta_s = reinterpret(statistics.index(2 * turn + u), gl.float32, [2, ROWS], FLAT).index(1)
    if not SOFTCAP:  # which has no registers left for it here
        delta = delta_s.load(COLUMN)
    p = gl.exp2(x)
    dv = warpgroup_mma(gl.convert_layout(p.to(dtype), LEFT_OPERAND), dout, dv, is_async=True)
    if BOTH:
        _send_dq(dq_desc, pool, zero, pending, WG)
    if SOFTCAP:
        delta = delta_s.load(COLUMN)
        p *= slope
    if OVERLAP and u == 1:
        dp, dk = warpgroup_mma_wait(1, deps=[dp, dk])
        barrier_arrive(Q_FREE + 2 * turn, 384)
    else:
        dp = warpgroup_mma_wait(1, deps=[dp])
    ds = (p * (dp - delta[None, :])).to(dtype)
    _ds_slot(pool, zero, u, WG, D).store(ds)
    fence_async_shared()
    if OWNER:
        barrier_sync(DS_READY + (0 if BOTH else u), 256)
        for w in gl.static_range(2):
            ds_t = _ds_slot(pool, zero, u, w, D).permute([1, 0])
            keys = _slot(pool, K_AT + w + zero, D)
            if BOTH:
                keys = keys.slice(64 * WG, 64, 1)
            if w == 0:
                dq = warpgroup_mma(ds_t, keys, nothing, use_acc=False, is_async=True)
            else:
                dq = warpgroup_mma(ds_t, keys, dq, is_async=True)
        dv = warpgroup_mma_wait(2, deps=[dv])
    else:
        barrier_arrive(DS_READY + u, 256)
        dv = warpgroup_mma_wait(0, deps=[dv])
    barrier_arrive(DOUT_FREE + u, 384)

    next_turn = (count + u) % PAIRS
    mbarrier.wait(q_full[1 - u].index(next_turn), (count + u) // PAIRS & 1)
    next_q = _slot(pool, _q_at(pool, next_turn, 1 - u) + zero, D).permute([1, 0])
    if D == 64:
        s = warpgroup_mma(k, next_q, nothing, use_acc=False, is_async=True)
    else:
        s = warpgroup_mma(_slot(pool, K_AT + WG + zero, D), next_q, nothing, use_acc=False, is_async=True)
    dk = warpgroup_mma(gl.convert_layout(ds, LEFT_OPERAND), q, dk, is_async=True)
    if OWNER:
        store_wait(0)
        dq = warpgroup_mma_wait(2, deps=[dq])
        reinterpret(_dq_slot(pool, zero, WG), gl.float32, [64, 64], register_order()).store(dq)
        pending = dq_row
    if OVERLAP and u == 0:
        s = warpgroup_mma_wait(1, deps=[s])
    else:
        s, dk = warpgroup_mma_wait(0, deps=[s, dk])
        barrier_arrive(Q_FREE + 2 * turn + u, 384)
    return s, dk, dv, pending


@gluon.jit
def _pair(
    s, dk, dv, k, v, dq_desc, shared, count, row, at, pending, position, band, bits, scores,
    WG: gl.constexpr, MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """The two blocks from row `row` on. `at`: the head's first row in dQ's accumulator; `position`: the first key's."""
    D: gl.constexpr = shared[0].type.shape[-1]
    behind = position - row
    for u in gl.static_range(2):
        # 256 floats a row of the accumulator's descriptor, 4096 a tile of 64 × 64; at D = 128 one a warpgroup.
        dq_row = (at + row + ROWS * u) // (256 // D) + (16 * WG if D == 128 else 0)
        s, dk, dv, pending = _block(s, dk, dv, k, v, dq_desc, shared, count, dq_row, pending, behind, band, bits,
                                    scores, u, WG, MASK, LEFT, RIGHT, CUT, SOFTCAP)  # fmt: skip
    return s, dk, dv, pending


@gluon.jit
def _consumer(
    dq_desc, dk_desc, dv_desc, shared, tile, b, kv_head, group, queries, keys, pairs, tile_map,
    offset, band, scale, scores, PACKED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, MAP: gl.constexpr,
    CUT: gl.constexpr, SOFTCAP: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, and their part of dQ; walks as the producer does.

    `tile`: which 128 keys. `queries`: the sequence's first token, rows, first row in the accumulator (of the group's
    first head), and the accumulator's rows a head. `keys`: first token and number. `pairs`: see `_visible_pairs`.
    """
    pool, _, kv_full, q_full, _ = shared
    D: gl.constexpr = pool.type.shape[-1]
    dtype: gl.constexpr = pool.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    _, _, at, head_rows = queries
    first_k, m = keys
    first, full_from, full_to, last = pairs
    dk = gl.zeros([64, D], gl.float32, ACC_LAYOUT)
    dv = gl.zeros([64, D], gl.float32, ACC_LAYOUT)
    k = 0
    v = 0
    mbarrier.wait(kv_full[0], 0)
    nothing = gl.zeros([64, ROWS], gl.float32, S_LAYOUT)
    first_q = _slot(pool, _q_at(pool, 0, 0), D).permute([1, 0])
    if D == 64:
        k = _slot(pool, K_AT + WG, D).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
        mbarrier.wait(kv_full[1], 0)
        v = _slot(pool, V_AT + WG, D).load(gl.DotOperandLayout(0, S_LAYOUT, 2))
        mbarrier.wait(q_full[0].index(0), 0)
        s = warpgroup_mma(k, first_q, nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
    else:
        mbarrier.wait(q_full[0].index(0), 0)
        s = warpgroup_mma(_slot(pool, K_AT + WG, D), first_q, nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.wait(kv_full[1], 0)
    count = 0
    pending = NOWHERE
    position = tile * KEYS - offset
    for member in range(group):
        if MAP:
            run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, bits_ptr, sizes = tile_map
            row = _map_row(b, kv_head * group + member, tile, sizes)
            for part in range(gl.load(part_begin + row), gl.load(part_end + row)):
                # 128 keys of 4 words; the transposed map's bit tiles have keys as rows.
                bits = bits_ptr + gl.load(part_id + part).to(gl.int64) * 512 + 256 * WG
                s, dk, dv, pending = _pair(s, dk, dv, k, v, dq_desc, shared, count,
                                  gl.load(part_col + part) * PAIR, at, pending, position, band, bits, scores,
                                  WG, BITS, False, False, CUT, SOFTCAP)  # fmt: skip
                count += 1
            for run in range(gl.load(run_begin + row), gl.load(run_end + row)):
                for pair in range(gl.load(run_start + run), gl.load(run_stop + run)):
                    s, dk, dv, pending = _pair(s, dk, dv, k, v, dq_desc, shared, count, pair * PAIR, at, pending,
                                      position, band, 0, scores, WG, UNMASKED, False, False, CUT, SOFTCAP)  # fmt: skip
                    count += 1
        else:
            if LEFT or RIGHT:
                for t in range(first, last - (full_to - full_from)):
                    pair = gl.where(t < full_from, t, t + full_to - full_from)
                    s, dk, dv, pending = _pair(s, dk, dv, k, v, dq_desc, shared, count, pair * PAIR, at, pending,
                                      position, band, 0, scores, WG, BAND, LEFT, RIGHT, CUT, SOFTCAP)  # fmt: skip
                    count += 1
            for pair in range(full_from, full_to):
                s, dk, dv, pending = _pair(s, dk, dv, k, v, dq_desc, shared, count, pair * PAIR, at, pending, position,
                                  band, 0, scores, WG, UNMASKED, False, False, CUT, SOFTCAP)  # fmt: skip
                count += 1
        at += head_rows
    _send_dq(dq_desc, pool, 0, pending, WG)
    batch = b
    if PACKED:
        batch = 0
    place = tile_place(batch, kv_head, tile * KEYS + 64 * WG, first_k, m, PACKED)
    # dV leaves through V, of which only this warpgroup read this half; dK through K, which dQ's products share.
    _slot(pool, V_AT + WG, D).store(dv.to(dtype))
    fence_async_shared()
    tma_store(dv_desc, place, pool.index(V_AT + WG))
    barrier_sync(DS_READY, 256)
    _slot(pool, K_AT + WG, D).store((dk * scale).to(dtype))
    fence_async_shared()
    tma_store(dk_desc, place, pool.index(K_AT + WG))
    store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "heads", "kv_heads", "q_len", "k_len", "head_rows", "left", "right", "map_batch", "map_heads",
        "map_tiles",
    ],
    do_not_specialize_on_alignment=[
        "q_offset_ptr", "cu_q_ptr", "cu_k_ptr", "run_begin", "run_end", "run_start", "run_stop", "part_begin",
        "part_end", "part_col", "part_id", "bits_ptr",
    ],
)  # fmt: skip
def attention_backward(
    q_desc, k_desc, v_desc, dout_desc, statistics_desc, dq_desc, dk_desc, dv_desc,
    q_offset_ptr, cu_q_ptr, cu_k_ptr,
    run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, bits_ptr,
    map_batch, map_heads, map_tiles, heads, kv_heads, q_len, k_len, head_rows, left, right,
    scale, scale_log2, soft_scale, soft_log2,
    PACKED: gl.constexpr, OFFSET: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, MAP: gl.constexpr,
    CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys of one KV head, and their part of dQ. Grid: (key tiles, batch · KV heads).

    CUT: the last tile may hold fewer keys.
    """
    D: gl.constexpr = q_desc.block_type.shape[-1]
    SLOTS: gl.constexpr = DS_AT + (4 if D == 128 else 8) + 2 * q_pairs(D)
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
    pairs = _visible_pairs(tile * KEYS, stop, offset, left, right, n, LEFT, RIGHT)
    tile_map = (run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, bits_ptr,
                (map_batch, map_heads, map_tiles))  # fmt: skip
    band = (left, right)
    scores = (scale_log2, soft_scale, soft_log2)
    pool = gl.allocate_shared_memory(q_desc.dtype, [SLOTS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    statistics = gl.allocate_shared_memory(gl.float32, [2 * q_pairs(D), 2, ROWS], statistics_desc.layout)
    # One allocation each: between two waits on parts of one allocation the compiler puts a barrier of the warpgroup.
    kv_full = (new_barrier(), new_barrier())
    q_full = (new_barriers(q_pairs(D)), new_barriers(q_pairs(D)))
    dout_full = (new_barrier(), new_barrier())
    shared = (pool, statistics, kv_full, q_full, dout_full)
    fence_async_shared()
    gl.warp_specialize([
        (_producer, (q_desc, k_desc, v_desc, dout_desc, statistics_desc, shared, tile, b, kv_head,
                     group, queries, keys, pairs, tile_map, PACKED, LEFT or RIGHT, MAP)),
        (_consumer, (dq_desc, dk_desc, dv_desc, shared, tile, b, kv_head, group, queries, keys, pairs,
                     tile_map, offset, band, scale, scores, PACKED, LEFT, RIGHT, MAP, CUT, SOFTCAP,
                     gl.constexpr(0))),
        (_consumer, (dq_desc, dk_desc, dv_desc, shared, tile, b, kv_head, group, queries, keys, pairs,
                     tile_map, offset, band, scale, scores, PACKED, LEFT, RIGHT, MAP, CUT, SOFTCAP,
                     gl.constexpr(1))),
    ], [4, 4], [240, 240])  # fmt: skip
