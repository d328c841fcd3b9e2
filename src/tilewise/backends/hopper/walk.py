"""Which tile a CTA of the forward kernel computes next, which key blocks the tile visits, and in which order.

A tile is 64 rows a consumer of one head. Where all tiles are alike, a CTA finds its own by counting; where their
lengths follow from the geometry, in a list that the host has dealt out (schedule.py); where only the device knows them,
in a queue, longest first, from which whoever is done takes the next.

`call` is the kernel's record of arguments (forward.py).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from tilewise.backends.hopper.primitives import gl, gluon, mbarrier

ROW_MAJOR, LISTED, QUEUED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Where a CTA finds its next tile: by counting, in its own list, or by taking the next one of a list for all."""

OFFSET_FIXED, OFFSET_TENSOR, OFFSET_ALIGNED = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
"""Where row 0's position comes from: one integer, a tensor [B], or M − N of the packed sequence."""

FARTHEST = gl.constexpr(1 << 29)
"""An offset beyond any sequence; with a window's side and a row it still fits into 32 bits."""

BASE_TILE = gl.constexpr(128)
"""Rows and columns of one tile of a tile map."""


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
    if call.RIGHT:
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
    """The next place in the queue; `claim_tile` says what lies there. 0 without a queue."""
    ticket = 0
    if call.ORDER == QUEUED:
        ticket = call.programs + gl.atomic_add(call.queue_ptr, 1)
    return ticket


@gluon.jit
def claim_tile(call, count, ticket):
    """The producer's tile `count`: with a queue, the one at place `ticket`.

    The producer draws the next tile's ticket when it begins one and looks up what lies there once it has asked for the
    first blocks; and what the consumers must know of it is left in shared memory for `told_tile`. So neither the
    atomic's nor the look-ups' latency is on the path of a load or a product. What they are told: the head (−1 behind
    the last tile) and first row; of a map the sequence, its first partial tile and how many partial and full blocks; of
    packed sequences the first token, rows, keys and offset.
    """
    if call.ORDER == QUEUED:
        total = gl.load(call.sched_ptr)
        if call.PACKED:
            total *= call.heads
        tile = gl.where(ticket < total, ticket, -1)
        b, h, start = decode_tile(call, gl.maximum(tile, 0))
        if call.MAP:
            row, parts, fulls = map_row(call, b, h, start)
            facts = (gl.where(tile < 0, -1, h), start, b, gl.load(call.part_begin + row), parts, fulls)
        else:
            _, first_q, n, _, m, left, _ = geometry(call, b)
            facts = (gl.where(tile < 0, -1, h), start, first_q, n, m, left - call.left)
        slot = count & 1
        mbarrier.wait(call.tile_free.index(slot), (count >> 1 & 1) ^ 1)
        for i in gl.static_range(6):
            call.tile_s.index(6 * slot + i).store(gl.full([1], facts[i], gl.int32, call.LINE))
        mbarrier.arrive(call.tile_full.index(slot), count=1)
    else:
        tile = placed_tile(call, count)
    return tile


@gluon.jit
def _fact(call, slot, i):
    return gl.max(call.tile_s.index(6 * slot + i).load(call.LINE), 0)


@gluon.jit
def told_tile(call, count):
    """The consumers' next tile, −1 behind the last; with a queue its head, and five more facts of `claim_tile`."""
    if call.ORDER == QUEUED:
        slot = count & 1
        mbarrier.wait(call.tile_full.index(slot), count >> 1 & 1)
        tile = _fact(call, slot, 0)
        f1 = _fact(call, slot, 1)
        f2 = _fact(call, slot, 2)
        f3 = _fact(call, slot, 3)
        f4 = _fact(call, slot, 4)
        f5 = _fact(call, slot, 5)
        mbarrier.arrive(call.tile_free.index(slot), count=1)
    else:
        tile = placed_tile(call, count)
        f1 = 0
        f2 = 0
        f3 = 0
        f4 = 0
        f5 = 0
    return tile, f1, f2, f3, f4, f5


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
