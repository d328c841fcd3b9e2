"""Which tile a CTA of the forward kernel computes next, which key blocks the tile visits, and in which order.

A tile is 64 rows a consumer of one head. Where all tiles are alike, a CTA finds its own by counting; where their
lengths follow from the geometry, in a list that the host has dealt out (schedule.py); where only the device knows them,
in a queue, longest first, from which whoever is done takes the next. The producer does that, and tells the consumers
(but see `is_told`).

`call` is the kernel's record of arguments (forward.py).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from tilewise.backends.hopper.primitives import constexpr_function, gl, gluon, mbarrier

ROW_MAJOR, LISTED, QUEUED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Where a CTA finds its next tile: by counting, in its own list, or by taking the next one of a list for all."""

OFFSET_FIXED, OFFSET_TENSOR, OFFSET_ALIGNED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Where row 0's position comes from: one integer, a tensor [B], or M − N of the packed sequence."""

NO_END, END_ONLY, LIMITED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""What hides keys on the right: nothing; only the end of a packed sequence; or M, a causal rule or a window."""

FARTHEST = gl.constexpr(1 << 29)
"""An offset beyond any sequence; with a window's side, a row and a key below it, sums still fit into 32 bits."""

BASE_TILE = gl.constexpr(128)
"""Rows and columns of one tile of a tile map."""

FACTS, SLOTS = gl.constexpr(7), gl.constexpr(4)
"""How many numbers the consumers are told of a tile, and of how many tiles they are kept."""


@constexpr_function
def is_told(order, d):
    """Whether consumers are told their tiles or work them out themselves, as they can without a queue.

    Where D is padded to 256 they do: what is told lies in other registers than what is worked out, and the assembler
    then builds the 16 pairs of descriptors of Q·Kᵀ one after the other in the same four (docs/hopper.md).
    """
    return order == QUEUED or d < 256


@gluon.jit
def placed_tile(call, count):
    """Number of this CTA's tile `count`, −1 behind the last: without a queue, it is known from the start."""
    if call.ORDER == LISTED:
        position = gl.load(call.sched_ptr + gl.program_id(0)) + count
        there = position < gl.load(call.sched_ptr + gl.program_id(0) + 1)
        tile = gl.load(call.sched_ptr + position, mask=there, other=-1)
    else:
        tile = gl.program_id(0) + count * call.programs
        tile = gl.where(tile < call.tiles, tile, -1)
    return tile


@gluon.jit
def decode_tile(call, tile):
    """Sequence, head and first row of a tile."""
    if call.PACKED:
        item = gl.load(call.sched_ptr + 1 + tile // call.heads)
        h = tile % call.heads
        b = item // call.row_tiles
        m = item % call.row_tiles
    else:
        if call.ORDER == QUEUED:
            tile = gl.load(call.sched_ptr + 1 + tile)
        m = tile % call.row_tiles
        b = tile // call.row_tiles // call.heads
        h = tile // call.row_tiles % call.heads
    return b, h, m * (64 * call.WARPGROUPS)


@gluon.jit
def geometry(call, b):
    """Batch coordinate, first row, rows, first key and keys of sequence b; row i sees keys i + left … i + right."""
    batch = b
    first_q = 0
    n = call.q_len
    first_k = 0
    m = call.k_len
    if call.PACKED:
        batch = 0
        first_q = gl.load(call.cu_q_ptr + b)
        n = gl.load(call.cu_q_ptr + b + 1) - first_q
        first_k = gl.load(call.cu_k_ptr + b)
        m = gl.load(call.cu_k_ptr + b + 1) - first_k
    left = call.left
    right = call.right
    if call.OFFSET == OFFSET_TENSOR:
        offset = gl.minimum(gl.maximum(gl.load(call.offset_ptr + b), -FARTHEST), FARTHEST)
        left += offset
        right += offset
    if call.OFFSET == OFFSET_ALIGNED:
        left += m - n
        right += m - n
    return batch, first_q, n, first_k, m, left, right


@gluon.jit
def visited_blocks(call, lo, hi, left, right, m):
    """The key blocks that rows lo … hi visit, as (first, full_from, full_to, last): full_from … full_to need no test.

    At least one block, so that every tile goes through the same pipeline.
    """
    first = 0
    full_from = 0
    last = call.key_blocks
    full_to = call.full_blocks
    if call.PACKED:
        last = gl.cdiv(m, call.BLOCK_N)
        full_to = m // call.BLOCK_N
    if call.RIGHT == LIMITED:
        last = gl.minimum(last, gl.cdiv(gl.maximum(hi + right, 0), call.BLOCK_N))
        full_to = gl.minimum(full_to, gl.maximum(lo + 1 + right, 0) // call.BLOCK_N)
    if call.LEFT:
        first = gl.maximum(gl.minimum(gl.maximum(lo + left, 0) // call.BLOCK_N, last - 1), 0)
        full_from = gl.cdiv(gl.maximum(hi - 1 + left, 0), call.BLOCK_N)
    last = gl.maximum(last, first + 1)
    full_to = gl.maximum(gl.minimum(full_to, last), first)
    full_from = gl.minimum(gl.maximum(full_from, first), full_to)
    return first, full_from, full_to, last


@gluon.jit
def block_at(call, i, first, full_from, full_to, last):
    """The i-th key block of a tile: those above the full ones, then those below, then the full ones, each downwards."""
    j = last - 1 - i
    if call.LEFT:
        above = last - full_to
        edges = above + full_from - first
        j = gl.where(i < above, j, gl.where(i < edges, full_from - 1 - (i - above), full_to - 1 - (i - edges)))
    return j


@gluon.jit
def map_row(call, b, h, start):
    """Row of the tile map, and its partial and full blocks; at least one block."""
    row = ((b % call.map_batch) * call.map_heads + h % call.map_heads) * call.map_tiles + start // BASE_TILE
    ratio: gl.constexpr = BASE_TILE // call.BLOCK_N
    parts = gl.load(call.counts_ptr + 2 * row) * ratio
    fulls = gl.load(call.counts_ptr + 2 * row + 1) * ratio
    return row, parts, fulls


@gluon.jit
def draw_ticket(call):
    """The next place in the queue; `claim_tile` says what lies there. 0 without a queue.

    Relaxed: nothing else passes through the queue, and an acquiring one would empty this multiprocessor's L1.
    """
    ticket = 0
    if call.ORDER == QUEUED:
        ticket = call.programs + gl.atomic_add(call.queue_ptr, 1, sem="relaxed")
    return ticket


@gluon.jit
def claim_tile(call, count, ticket):
    """The producer's tile `count`, −1 behind the last: with a queue, the one at place `ticket`.

    What lies there is looked up once, here, and left in shared memory for `tile_facts`; the first fact is the head, −1
    behind the last tile. The producer draws the ticket while it would wait for the buffers of Q, and looks it up while
    it would wait for V's, so that neither the atomic's latency nor that of look-ups and divisions is on a product's
    path.
    """
    if call.ORDER == QUEUED:
        total = gl.load(call.sched_ptr)
        if call.PACKED:
            total *= call.heads
        tile = gl.where(ticket < total, ticket, -1)
    else:
        tile = placed_tile(call, count)
    if is_told(call.ORDER, call.D):
        b, h, start = decode_tile(call, gl.maximum(tile, 0))
        told = gl.where(tile < 0, -1, h)
        if call.MAP:
            row, parts, fulls = map_row(call, b, h, start)
            facts = (told, start, b, gl.load(call.part_begin + row), parts, fulls, gl.load(call.run_begin + row))
        else:
            batch, first_q, n, first_k, m, left, _ = geometry(call, b)
            offset = left - call.left
            if call.PACKED:
                facts = (told, start, first_q, offset, n, m, first_k)
            else:
                facts = (told, start, batch, offset, 0, 0, 0)
        # Slot and barrier are free: rows of tile count − 1 have been asked for, so their buffers of Q, of which there
        # are two at most, had been handed back, and every consumer is done with the facts of tile count − 4.
        for i in gl.static_range(7 if call.MAP or call.PACKED else 4):
            call.tile_s.index(_place(count, i)).store(gl.full([1], facts[i], gl.int32, call.LINE))
        mbarrier.arrive(call.tile_full.index(count & (SLOTS - 1)), count=1)
    return tile


@gluon.jit
def _place(count, i: gl.constexpr):
    return FACTS * (count & (SLOTS - 1)) + i


@gluon.jit
def _fact(call, count, i: gl.constexpr):
    return gl.max(call.tile_s.index(_place(count, i)).load(call.LINE), 0)


@gluon.jit
def tile_facts(call, count):
    """Of a CTA's tile `count`: head and first row; then as `geometry` says; then of a map its first partial tile, how
    many partial and full blocks, and its first run of full ones."""
    of_map = (0, 0, 0, 0)
    if is_told(call.ORDER, call.D):
        h = _fact(call, count, 0)
        start = _fact(call, count, 1)
        third = _fact(call, count, 2)
        if call.MAP:
            where = (third, 0, call.q_len, 0, call.k_len, 0, 0)
            of_map = (_fact(call, count, 3), _fact(call, count, 4), _fact(call, count, 5), _fact(call, count, 6))
        else:
            offset = 0
            if call.OFFSET != OFFSET_FIXED:
                offset = _fact(call, count, 3)
            left = call.left + offset
            right = call.right + offset
            if call.PACKED:
                n = _fact(call, count, 4)
                m = _fact(call, count, 5)
                where = (0, third, n, _fact(call, count, 6), m, left, right)
            else:
                where = (third, 0, call.q_len, 0, call.k_len, left, right)
    else:
        b, h, start = decode_tile(call, placed_tile(call, count))
        where = geometry(call, b)
    return h, start, where, of_map


@gluon.jit
def await_tile(call, count):
    """Wait for what a consumer is told of its tile `count`; negative behind the last."""
    if is_told(call.ORDER, call.D):
        mbarrier.wait(call.tile_full.index(count & (SLOTS - 1)), count // SLOTS & 1)
        tile = _fact(call, count, 0)
    else:
        tile = placed_tile(call, count)
    return tile


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next stage of the ring, and the phase of its barriers."""
    if STAGES == 2:
        phase = phase ^ stage
        stage = stage ^ 1
    else:
        wrap = (stage == STAGES - 1).to(gl.int32)
        stage = (stage + 1) * (1 - wrap)
        phase = phase ^ wrap
    return stage, phase
