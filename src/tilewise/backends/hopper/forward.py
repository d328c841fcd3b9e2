"""Attention forward for Hopper: FlashAttention-3's structure, written in Gluon for Triton's own compiler.

Computes out = softmax(scores)·V and the natural log of the softmax denominator. One CTA a multiprocessor, persistent:
a producer warpgroup moves K, V and Q tiles into shared memory by the copy engine (TMA), and 2 to 4 consumer
warpgroups of 64 query rows each multiply (wgmma) and do the softmax.

Tile ownership: a consumer owns 64 query rows of one head from first key to last; the consumers of a CTA own
neighbouring rows and share every K and V tile. In registers: S (64 × block_n, float32), P as the left operand of P·V,
the output accumulator (64 × Dv, float32), row maxima and thread-local row sums. In shared memory: one Q buffer a
consumer or two, STAGES K and V tiles each, and an output buffer (Q's own where head dims are wide).

Order of a consumer's pipeline, the heart of it: S_{j+1} = Q·K_{j+1}ᵀ is issued, then O += P_j·V_j, then it waits for
S_{j+1} alone and does its exponentials while the tensor cores still work on P_j·V_j (FlashAttention-3, Shah et al.
2024). K tiles are handed back as soon as S is there, V tiles one step later, through hardware barriers.

Blocks that need no element test (all keys visible to all rows of the tile) come last, in a loop without any; those on
the causal diagonal, a window's edges or M, and the partial tiles of a tile map come first, in a loop that masks.
walk.py says which tile a CTA takes next and which blocks it visits.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

from tilewise.backends.hopper.primitives import (
    barrier_arrive,
    barrier_sync,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    record,
    store_wait,
    tensor_descriptor,
    tile_place,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tilewise.backends.hopper.walk import (
    BASE_TILE,
    END_ONLY,
    FACTS,
    LIMITED,
    SLOTS,
    await_tile,
    block_at,
    claim_tile,
    draw_ticket,
    is_told,
    next_stage,
    tile_facts,
    visited_blocks,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

K_FREE = gl.constexpr(6)
"""Hardware barrier of K stage 0: the consumers arrive when they have read it, the producer waits."""
V_FREE = gl.constexpr(9)
"""The same of V stage 0; so there are at most three stages."""

INTEGERS = [
    "heads", "group", "q_len", "k_len", "q_rows", "row_tiles", "tiles", "programs", "key_blocks", "full_blocks",
    "left", "right", "map_batch", "map_heads", "map_tiles",
]  # fmt: skip
"""Sizes on which the kernel does not specialise, so that a new shape compiles nothing."""

POINTERS = [
    "sched_ptr", "queue_ptr", "sink_ptr", "offset_ptr", "cu_q_ptr", "cu_k_ptr", "counts_ptr", "run_begin",
    "run_start", "run_stop", "part_begin", "part_col", "part_id", "bits_ptr",
]  # fmt: skip
"""Arrays whose alignment differs from call to call."""


@record
class Call:
    """What producer and consumers know of the call.

    Memory: descriptors of the tensors; the schedule and queue (walk.py); then the arrays of a tile map, as TileTensors
    names them. Sizes: `q_rows` is the rows of one head in `lse`, of all sequences if packed; `row_tiles` the tiles of
    one head, `tiles` those of all; `key_blocks` and `full_blocks` the blocks of K with and without a cut last one; row
    i sees keys i + left … i + right, and the `map_…` are the map's batch, heads and row tiles.

    Shared memory: buffers of Q and one of the output for each consumer, the rings of K and V. `…_full` is an mbarrier
    on which the copy engine counts its bytes, `…_free` one on which consumers say that they are done; `tile_s` is what
    the consumers are told of tiles. Compile-time options are in capitals.
    """

    q_desc: tensor_descriptor
    k_desc: tensor_descriptor
    v_desc: tensor_descriptor
    out_desc: tensor_descriptor
    lse_ptr: gl.tensor
    sched_ptr: gl.tensor
    queue_ptr: gl.tensor
    sink_ptr: gl.tensor
    offset_ptr: gl.tensor
    cu_q_ptr: gl.tensor
    cu_k_ptr: gl.tensor
    counts_ptr: gl.tensor
    run_begin: gl.tensor
    run_start: gl.tensor
    run_stop: gl.tensor
    part_begin: gl.tensor
    part_col: gl.tensor
    part_id: gl.tensor
    bits_ptr: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    q_len: gl.tensor
    k_len: gl.tensor
    q_rows: gl.tensor
    row_tiles: gl.tensor
    tiles: gl.tensor
    programs: gl.tensor
    key_blocks: gl.tensor
    full_blocks: gl.tensor
    left: gl.tensor
    right: gl.tensor
    map_batch: gl.tensor
    map_heads: gl.tensor
    map_tiles: gl.tensor
    scale_log2: gl.tensor
    softcap_in: gl.tensor
    q_s: gl.shared_memory_descriptor
    k_s: gl.shared_memory_descriptor
    v_s: gl.shared_memory_descriptor
    out_s: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    tile_s: gl.shared_memory_descriptor
    tile_full: gl.shared_memory_descriptor
    LINE: gl.constexpr
    WARPGROUPS: gl.constexpr
    BLOCK_N: gl.constexpr
    D: gl.constexpr
    DV: gl.constexpr
    STAGES: gl.constexpr
    ORDER: gl.constexpr
    LEFT: gl.constexpr
    RIGHT: gl.constexpr
    ALIGNED: gl.constexpr
    OFFSET: gl.constexpr
    PACKED: gl.constexpr
    MAP: gl.constexpr
    SOFTCAP: gl.constexpr
    SINK: gl.constexpr
    Q_IN_REGISTERS: gl.constexpr
    Q_BUFFERS: gl.constexpr
    OUT_OVER_Q: gl.constexpr
    CHAINS: gl.constexpr


@gluon.jit
def _load_keys(call, of_keys, key, stage, loaded):
    """Move the K tile that begins at key `key`; `of_keys` says of whose.

    `loaded` counts blocks: the first of each stage finds its buffer free.
    """
    batch, kv_head, first_k, m = of_keys
    if loaded >= call.STAGES:
        barrier_sync(K_FREE + stage, 128 * (call.WARPGROUPS + 1))
    mbarrier.expect(call.k_full.index(stage), call.BLOCK_N * call.D * 2)
    place = tile_place(batch, kv_head, key, first_k, m, call.PACKED)
    tma_load(call.k_desc, place, call.k_full.index(stage), call.k_s.index(stage))


@gluon.jit
def _load_values(call, of_keys, key, stage, loaded):
    """The same of V."""
    batch, kv_head, first_k, m = of_keys
    if loaded >= call.STAGES:
        barrier_sync(V_FREE + stage, 128 * (call.WARPGROUPS + 1))
    mbarrier.expect(call.v_full.index(stage), call.BLOCK_N * call.DV * 2)
    place = tile_place(batch, kv_head, key, first_k, m, call.PACKED)
    tma_load(call.v_desc, place, call.v_full.index(stage), call.v_s.index(stage))


@gluon.jit
def _row_buffer(call, count, w: gl.constexpr):
    """Which buffer of Q holds the rows of warpgroup w of a CTA's tile `count`."""
    return count % call.Q_BUFFERS * call.WARPGROUPS + w


@gluon.jit
def _load_rows(call, of_rows, row, count):
    """Move the Q tiles of a CTA's tile `count`, which begins at row `row`."""
    batch, head, first_q, n = of_rows
    for w in gl.static_range(call.WARPGROUPS):
        at = _row_buffer(call, count, w)
        mbarrier.wait(call.q_free.index(at), (count // call.Q_BUFFERS & 1) ^ 1)
        mbarrier.expect(call.q_full.index(at), 64 * call.D * 2)
        place = tile_place(batch, head, row + 64 * w, first_q, n, call.PACKED)
        tma_load(call.q_desc, place, call.q_full.index(at), call.q_s.index(at))


@gluon.jit
def _producer(call):
    """Ask for the blocks of one tile after another, in the order in which the consumers take them.

    K goes first, so that the next tile's first K is on its way while the consumers finish this one's last block.
    """
    RATIO: gl.constexpr = BASE_TILE // call.BLOCK_N
    stage = 0
    phase = 0
    loaded = 0
    count = 0
    tile = claim_tile(call, 0, gl.program_id(0))
    while tile >= 0:
        h, start, where, of_map = tile_facts(call, count)
        batch, first_q, n, first_k, m, left, right = where
        part, parts, fulls, run = of_map
        of_keys = (batch, h // call.group, first_k, m)
        first, full_from, full_to, last = 0, 0, 0, 0
        block = 0
        stop = 0
        if call.MAP:
            # Partial tiles, then the runs of full ones; block 0 if there are none, as a tile visits at least one.
            block = gl.load(call.run_start + run, mask=fulls > 0, other=0) * RATIO
            stop = gl.load(call.run_stop + run, mask=fulls > 0, other=0) * RATIO
            blocks = gl.maximum(parts + fulls, 1)
        else:
            first, full_from, full_to, last = visited_blocks(call, start, start + 64 * call.WARPGROUPS, left, right, m)
            blocks = last - first
        ticket = 0
        for i in range(0, blocks):
            if call.MAP:
                base = gl.load(call.part_col + part + i // RATIO, mask=i < parts, other=0)
                key = gl.where(i < parts, base * BASE_TILE + (i % RATIO) * call.BLOCK_N, block * call.BLOCK_N)
                block += (i >= parts).to(gl.int32)
                next_run = (block >= stop) & (i >= parts) & (i + 1 < blocks)
                run += next_run.to(gl.int32)
                block = gl.where(next_run, gl.load(call.run_start + run, mask=next_run, other=0) * RATIO, block)
                stop = gl.where(next_run, gl.load(call.run_stop + run, mask=next_run, other=0) * RATIO, stop)
            else:
                key = block_at(call, i, first, full_from, full_to, last) * call.BLOCK_N
            _load_keys(call, of_keys, key, stage, loaded)
            if i == 0:  # before the claim, which relies on the rows having been asked for
                ticket = draw_ticket(call)
                _load_rows(call, (batch, h, first_q, n), start, count)
            if i == gl.minimum(1, blocks - 1):
                # Before V's buffer is free there is time to look up what comes next.
                tile = claim_tile(call, count + 1, ticket)
            _load_values(call, of_keys, key, stage, loaded)
            stage, phase = next_stage(stage, phase, call.STAGES)
            loaded += 1
        count += 1


@gluon.jit
def _row_sums(p, BLOCK_N: gl.constexpr):
    """[64, 4]: each thread adds up its own part of a row; the four of a quad are put together once a tile."""
    return gl.sum(gl.sum(p.reshape([64, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def _row_max(s, BLOCK_N: gl.constexpr, CHAINS: gl.constexpr):
    """Row maxima [64]; as 4·CHAINS independent chains of comparisons a thread instead of two serial ones."""
    if CHAINS == 0:
        peak = gl.max(s, 1)
    else:
        peak = gl.max(gl.max(gl.max(s.reshape([64, CHAINS, BLOCK_N // 8 // CHAINS, 8]), 2), 1), 1)
        peak = gl.convert_layout(peak, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
    return peak


@gluon.jit
def _hide(call, s, rows, key, left, right, m, bits, other):
    """−∞ where a row may not see a key. `key` is the block's first key; `bits` its bit tile, or `other` for all."""
    S_LAYOUT: gl.constexpr = s.type.layout
    if call.MAP:
        WORDS: gl.constexpr = call.BLOCK_N // 32
        s = s.reshape([64, WORDS, 32])
        WORD_LAYOUT: gl.constexpr = gl.SliceLayout(2, s.type.layout)
        row = gl.convert_layout(rows, gl.SliceLayout(1, WORD_LAYOUT))
        word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, WORD_LAYOUT))
        at = call.bits_ptr + bits.to(gl.int64) * (BASE_TILE * BASE_TILE // 32)
        at += (row % BASE_TILE)[:, None] * (BASE_TILE // 32) + (key % BASE_TILE // 32 + word)[None, :]
        # Without a bit tile (−1) all keys of the block are alike.
        words = gl.load(at, mask=(bits >= 0) & (row >= 0)[:, None], other=other)
        lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, s.type.layout)))
        visible = (words[:, :, None] >> lane[None, None, :]) & 1
        s = gl.where(visible != 0, s, -float("inf"))
        s = gl.convert_layout(s.reshape([64, call.BLOCK_N]), S_LAYOUT, assert_trivial=True)
    else:
        # Columns as 8·i + 2·q + e, where q is a thread's place in its quad: what is compared with are constants.
        s = s.reshape([64, call.BLOCK_N // 8, 4, 2])
        ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, s.type.layout)))
        I: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, s.type.layout)))
        Q: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, s.type.layout)))
        E: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, s.type.layout)))
        row = gl.convert_layout(rows, ROW)[:, None, None, None]
        column = 8 * gl.arange(0, call.BLOCK_N // 8, layout=I)[None, :, None, None]
        column += gl.arange(0, 2, layout=E)[None, None, None, :]
        before = key + 2 * gl.arange(0, 4, layout=Q)[None, None, :, None]
        if call.RIGHT == END_ONLY:
            # The same for all rows: worked out once a column and added, at twice the rate of a selection.
            s += gl.where(column < m - before, 0.0, -float("inf"))
        if call.RIGHT == LIMITED:
            s = gl.where(column <= gl.minimum(row + right, m - 1) - before, s, -float("inf"))
        if call.LEFT:
            s = gl.where(column >= row + left - before, s, -float("inf"))
        s = gl.convert_layout(s.reshape([64, call.BLOCK_N]), S_LAYOUT, assert_trivial=True)
    return s


@gluon.jit
def _hides(call, start, key, left, right, m):
    """Whether any of the 64 rows from `start` on may not see all of the block that begins at `key`."""
    hides = key + call.BLOCK_N > m
    if call.RIGHT == LIMITED:
        hides |= key + call.BLOCK_N > start + 1 + right
    if call.LEFT:
        hides |= key < start + 63 + left
    return hides


@gluon.jit
def _capped(call, s):
    """tanh(s·scale / c), to 2·10⁻⁷ absolute: what the exponent needs. Its unit is then c, which `scale_log2` holds."""
    if call.SOFTCAP:
        s = 1.0 - 2.0 / (1.0 + gl.exp2(s * call.softcap_in))
    return s


@gluon.jit
def _scores(call, q, stage):
    """Issue S = Q·Kᵀ of a stage."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.BLOCK_N, 16])
    k = call.k_s.index(stage).reshape([call.BLOCK_N, call.D]).permute([1, 0])
    zero = gl.zeros([64, call.BLOCK_N], gl.float32, S_LAYOUT)
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _step(call, q, p, acc, peak, total, stage, phase, rows, key, left, right, m, bits, masked, MASK: gl.constexpr):
    """One block: S of the next stage, and O += P·V of `stage`, which overlaps with the new block's softmax.

    `p` are the weights of the block before as wgmma's left operand, `acc` the output that lacks them; `peak` and
    `total` the rows' maxima (in log2 units) and sums so far. MASK compiles the hiding in, `masked` does it.
    """
    THREADS: gl.constexpr = 128 * (call.WARPGROUPS + 1)
    v_stage = stage
    v_phase = phase
    stage, phase = next_stage(stage, phase, call.STAGES)
    mbarrier.wait(call.k_full.index(stage), phase)
    s_issued = _scores(call, q, stage)
    mbarrier.wait(call.v_full.index(v_stage), v_phase)
    v = call.v_s.index(v_stage).reshape([call.BLOCK_N, call.DV])
    acc_issued = warpgroup_mma(p, v, acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_issued])
    barrier_arrive(K_FREE + stage, THREADS)

    s = _capped(call, s)
    if MASK:  # noqa: SIM102  (one is a compile-time constant, the other is not)
        if masked:
            s = _hide(call, s, rows, key, left, right, m, bits, 0)
    new_peak = gl.maximum(peak, _row_max(s, call.BLOCK_N, call.CHAINS) * call.scale_log2)
    base = new_peak
    if MASK:
        # A row that has seen nothing yet has a peak of −∞, and −∞ − (−∞) must not be formed.
        base = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    decay = gl.exp2(peak - base)
    weights = gl.exp2(s * call.scale_log2 - base[:, None])
    sums = _row_sums(weights, call.BLOCK_N)
    total = total * gl.convert_layout(decay, gl.SliceLayout(1, sums.type.layout), assert_trivial=True)[:, None] + sums

    acc, weights = warpgroup_mma_wait(0, deps=[acc_issued, weights])
    barrier_arrive(V_FREE + v_stage, THREADS)
    p = gl.convert_layout(weights.to(call.out_desc.dtype), p.type.layout)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return p, acc, new_peak, total, stage, phase


@gluon.jit
def _consumer(call, W: gl.constexpr):
    """Warpgroup W: rows 64·W … 64·W + 63 of every tile.

    For each tile: where it lies and which blocks it visits; the first block's scores; the loop; the last P·V, LSE and
    output.
    """
    BLOCK_N: gl.constexpr = call.BLOCK_N
    THREADS: gl.constexpr = 128 * (call.WARPGROUPS + 1)
    ROWS: gl.constexpr = 64 * call.WARPGROUPS
    RATIO: gl.constexpr = BASE_TILE // BLOCK_N
    dtype: gl.constexpr = call.out_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, call.DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)

    stage = 0
    phase = 0
    count = 0
    while await_tile(call, count) >= 0:
        h, tile_start, where, of_map = tile_facts(call, count)
        batch, first_q, n, _first_k, m, left, right = where
        part, parts, fulls, _run = of_map
        start = tile_start + 64 * W
        # Of `blocks`, this warpgroup skips the first `skipped` and hides elements in the next `masked`.
        rows = start + gl.arange(0, 64, layout=S_ROWS)
        first, full_from, full_to, last = 0, 0, 0, 0
        skipped, bits, everything = 0, 0, 0
        if call.MAP:
            blocks = gl.maximum(parts + fulls, 1)
            masked = gl.maximum(parts, 1)
            bits = gl.load(call.part_id + part, mask=parts > 0, other=-1)
            everything = gl.where(fulls > 0, -1, 0)
            key = 0
        else:
            first, full_from, full_to, last = visited_blocks(call, tile_start, tile_start + ROWS, left, right, m)
            blocks = last - first
            masked = 1
            if call.RIGHT == LIMITED:
                # Blocks that only warpgroups further down see: their buffers are handed back unread.
                _, _, my_full_to, my_last = visited_blocks(call, start, start + 64, left, right, m)
                skipped = gl.minimum(gl.maximum(last - my_last, 0), gl.minimum(last - full_to, blocks - 1))
                if not call.ALIGNED:
                    masked = gl.maximum(gl.minimum(last - skipped - my_full_to, blocks - skipped), 1)
            if call.LEFT:
                masked = gl.maximum(last - full_to + full_from - first - skipped, 1)
            if call.PACKED:
                # Rows that all lie behind the sequence need nothing, but one block takes the pipeline to its end.
                skipped = gl.where(start < n, skipped, blocks - 1)
                masked = gl.where(start < n, masked, 1)
            if call.PACKED or call.RIGHT == LIMITED:
                for _ in range(0, skipped):
                    mbarrier.wait(call.k_full.index(stage), phase)
                    barrier_arrive(K_FREE + stage, THREADS)
                    mbarrier.wait(call.v_full.index(stage), phase)
                    barrier_arrive(V_FREE + stage, THREADS)
                    stage, phase = next_stage(stage, phase, call.STAGES)
            key = block_at(call, skipped, first, full_from, full_to, last) * BLOCK_N

        q_at = _row_buffer(call, count, W)
        mbarrier.wait(call.q_full.index(q_at), count // call.Q_BUFFERS & 1)
        q = call.q_s.index(q_at).reshape([64, call.D])
        if call.Q_IN_REGISTERS:
            q = q.load(gl.DotOperandLayout(0, S_LAYOUT, 2))
            # An arrival does not wait for loads, and the next tile's copy may overtake them: past the end it is of
            # zeros, which nobody has to fetch.
            fence_async_shared()
            mbarrier.arrive(call.q_free.index(q_at), count=1)

        # The first block has no P·V to go with.
        mbarrier.wait(call.k_full.index(stage), phase)
        s = warpgroup_mma_wait(0, deps=[_scores(call, q, stage)])
        barrier_arrive(K_FREE + stage, THREADS)
        s = _capped(call, s)
        if call.PACKED:
            if _hides(call, start, key, left, right, m):
                s = _hide(call, s, rows, key, left, right, m, bits, everything)
        else:
            s = _hide(call, s, rows, key, left, right, m, bits, everything)
        peak = _row_max(s, BLOCK_N, call.CHAINS) * call.scale_log2
        base = gl.where(peak == -float("inf"), 0.0, peak)
        weights = gl.exp2(s * call.scale_log2 - base[:, None])
        total = _row_sums(weights, BLOCK_N)
        p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        acc = gl.zeros([64, call.DV], gl.float32, O_LAYOUT)

        if call.MAP:
            # One loop with a branch: in two, LLVM would carry P from one to the other as halves of registers.
            for i in range(1, blocks):
                bits = gl.load(call.part_id + part + i // RATIO, mask=i < masked, other=0)
                key = (i % RATIO) * BLOCK_N
                p, acc, peak, total, stage, phase = _step(
                    call, q, p, acc, peak, total, stage, phase, rows, key, left, right, m, bits, i < masked, True
                )
        else:
            if call.LEFT or (call.RIGHT == LIMITED and not call.ALIGNED):
                for i in range(1, masked):
                    key = block_at(call, skipped + i, first, full_from, full_to, last) * BLOCK_N
                    p, acc, peak, total, stage, phase = _step(
                        call, q, p, acc, peak, total, stage, phase, rows, key, left, right, m, bits, True, True
                    )
            for _ in range(skipped + masked, blocks):
                p, acc, peak, total, stage, phase = _step(
                    call, q, p, acc, peak, total, stage, phase, rows, 0, left, right, m, bits, False, False
                )

        if call.WARPGROUPS == 4 and is_told(call.ORDER, call.D):
            # Read anew: kept in registers meanwhile, of which there are few, they would be spilled.
            h, tile_start, where, of_map = tile_facts(call, count)
            batch, first_q, n, _first_k, m, left, right = where
            start = tile_start + 64 * W
            rows = start + gl.arange(0, 64, layout=S_ROWS)
        if not call.OUT_OVER_Q and not call.Q_IN_REGISTERS:
            mbarrier.arrive(call.q_free.index(q_at), count=1)
        mbarrier.wait(call.v_full.index(stage), phase)
        acc_issued = warpgroup_mma(p, call.v_s.index(stage).reshape([BLOCK_N, call.DV]), acc, is_async=True)
        total_row = gl.convert_layout(gl.sum(total, 1), S_ROWS)
        decay = gl.full([64], 1.0, gl.float32, S_ROWS)
        if call.SINK:
            # One more logit whose value row is zero, merged once.
            logit = gl.load(call.sink_ptr + h).to(gl.float32) * LOG2E
            new_peak = gl.maximum(peak, logit)
            base = gl.where(new_peak == -float("inf"), 0.0, new_peak)
            decay = gl.exp2(peak - base)
            total_row = total_row * decay + gl.exp2(logit - base)
            peak = new_peak
        inverse = gl.where(total_row > 0.0, decay / total_row, 0.0)
        lse = (peak + gl.log2(total_row)) * LN2
        lse_at = call.lse_ptr + (batch * call.heads + h).to(gl.int64) * call.q_rows + first_q
        gl.store(lse_at + rows, lse, mask=rows < n)
        acc = warpgroup_mma_wait(0, deps=[acc_issued])
        barrier_arrive(V_FREE + stage, THREADS)
        stage, phase = next_stage(stage, phase, call.STAGES)

        out = (acc * gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT))[:, None]).to(dtype)
        out_s = call.out_s.index(W)
        if not call.OUT_OVER_Q:
            # The store of the tile before has left the buffer.
            store_wait(0)
        out_s.reshape([64, call.DV]).store(out)
        fence_async_shared()
        tma_store(call.out_desc, tile_place(batch, h, start, first_q, n, call.PACKED), out_s)
        if call.OUT_OVER_Q:
            store_wait(0)
            mbarrier.arrive(call.q_free.index(q_at), count=1)
        count += 1
    store_wait(0)


@gluon.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def attention_forward(
    q_desc, k_desc, v_desc, out_desc, lse_ptr,
    sched_ptr, queue_ptr, sink_ptr, offset_ptr, cu_q_ptr, cu_k_ptr,
    counts_ptr, run_begin, run_start, run_stop, part_begin, part_col, part_id, bits_ptr,
    heads: gl.int32, group: gl.int32, q_len: gl.int32, k_len: gl.int32, q_rows: gl.int64,
    row_tiles: gl.int32, tiles: gl.int32, programs: gl.int32, key_blocks: gl.int32, full_blocks: gl.int32,
    left: gl.int32, right: gl.int32, map_batch: gl.int32, map_heads: gl.int32, map_tiles: gl.int32,
    scale_log2: gl.float32, softcap_in: gl.float32,
    WARPGROUPS: gl.constexpr, REGISTERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ORDER: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, ALIGNED: gl.constexpr, OFFSET: gl.constexpr,
    PACKED: gl.constexpr, MAP: gl.constexpr, SOFTCAP: gl.constexpr, SINK: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, Q_BUFFERS: gl.constexpr, OUT_OVER_Q: gl.constexpr,
    CHAINS: gl.constexpr,
):  # fmt: skip
    """out [B, H, N, Dv] and lse [B, H, N]; launch.py says what each argument is."""
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = q_desc.block_type.shape[-1]
    DV: gl.constexpr = v_desc.block_type.shape[-1]
    q_s = gl.allocate_shared_memory(dtype, [Q_BUFFERS * WARPGROUPS] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    k_s = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    v_s = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
    if OUT_OVER_Q:
        out_s = q_s
    else:
        out_s = gl.allocate_shared_memory(dtype, [WARPGROUPS] + out_desc.block_type.shape, out_desc.layout)  # noqa: RUF005
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS * WARPGROUPS, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS * WARPGROUPS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    tile_s = gl.allocate_shared_memory(gl.int32, [SLOTS * FACTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for s in gl.static_range(SLOTS):
        mbarrier.init(tile_full.index(s), count=1)
    for w in gl.static_range(Q_BUFFERS * WARPGROUPS):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_free.index(w), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
    fence_async_shared()
    call = Call(
        q_desc, k_desc, v_desc, out_desc, lse_ptr, sched_ptr, queue_ptr, sink_ptr, offset_ptr, cu_q_ptr, cu_k_ptr,
        counts_ptr, run_begin, run_start, run_stop, part_begin, part_col, part_id, bits_ptr, heads, group, q_len,
        k_len, q_rows, row_tiles, tiles, programs, key_blocks, full_blocks, left, right, map_batch, map_heads,
        map_tiles, scale_log2, softcap_in, q_s, k_s, v_s, out_s, q_full, q_free, k_full, v_full, tile_s, tile_full,
        LINE, WARPGROUPS, BLOCK_N, D, DV, STAGES, ORDER, LEFT, RIGHT, ALIGNED, OFFSET, PACKED, MAP,
        SOFTCAP, SINK, Q_IN_REGISTERS, Q_BUFFERS, OUT_OVER_Q, CHAINS,
    )  # fmt: skip
    # Partitions are written out because a list of them must be a literal.
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_producer, (call,)), (_consumer, (call, gl.constexpr(0))), (_consumer, (call, gl.constexpr(1))),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    elif WARPGROUPS == 3:
        gl.warp_specialize([
            (_producer, (call,)), (_consumer, (call, gl.constexpr(0))), (_consumer, (call, gl.constexpr(1))),
            (_consumer, (call, gl.constexpr(2))),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_producer, (call,)), (_consumer, (call, gl.constexpr(0))), (_consumer, (call, gl.constexpr(1))),
            (_consumer, (call, gl.constexpr(2))), (_consumer, (call, gl.constexpr(3))),
        ], [4, 4, 4, 4], [REGISTERS, REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
