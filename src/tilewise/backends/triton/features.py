"""What the attention kernels share on the device: which tiles a tile visits, and what happens to its scores.

Every function works on score tiles in either orientation: `i` holds query rows and `j` key columns as index tensors
that broadcast against each other, [block_m, 1] and [1, block_n] where rows are queries, [1, block_m] and [block_n, 1]
in the dK/dV kernel, which computes transposed tiles so that P and dS are already the left operands that it needs.

Scores leave `scores_log2` in units of log2, so that every exponential is the hardware's `ex2`. `SCORE` says by bits
what goes beyond scale·q·k; each bit is a compile-time constant, so what a call does not use is not in its kernel.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SOFTCAP = tl.constexpr(1)
BIAS = tl.constexpr(2)
RELATIVE = tl.constexpr(4)
ALIBI = tl.constexpr(8)
SCALED = tl.constexpr(16)
"""A scale below 0 turns the row maximum around, and one of 0 makes −∞·0 of what is masked, so these scores are scaled
before either."""

OFFSET_FIXED = tl.constexpr(0)
OFFSET_TENSOR = tl.constexpr(1)
OFFSET_ALIGNED = tl.constexpr(2)
"""Where a row's position comes from: one integer, one of a tensor [B], or M − N of the packed sequence."""

BASE_TILE = tl.constexpr(128)
"""Rows and columns of one tile of a tile map."""


SHARED_INTEGERS = [
    "heads",
    "group",
    "q_len",
    "k_len",
    "q_rows",
    "offset",
    "left",
    "right",
    "radius",
    "threshold",
    "map_batch",
    "map_heads",
    "map_tiles",
]
"""Sizes on which no kernel specialises, so that a new shape compiles nothing."""

MAP_ARRAYS = [
    "run_begin",
    "run_end",
    "run_start",
    "run_stop",
    "part_begin",
    "part_end",
    "part_col",
    "part_id",
    "bits_ptr",
]
"""Views whose alignment differs from map to map: without this a new mask could compile a new kernel."""


@triton.jit
def ceil_div(x, y: tl.constexpr):
    return (x + y - 1) // y


@triton.jit
def floor_div(x, y: tl.constexpr):
    """x div y, rounded down for negative x too."""
    return tl.where(x >= 0, x // y, -((-x + y - 1) // y))


@triton.jit
def sequence(cu_ptr, b, length, PACKED: tl.constexpr):
    """First token and length of sequence b: the packed ones are delimited by cu_seqlens."""
    first = 0
    if PACKED:
        first = tl.load(cu_ptr + b)
        length = tl.load(cu_ptr + b + 1) - first
    return first, length


@triton.jit
def row_offset(offset_ptr, offset, b, n, m, OFFSET: tl.constexpr):
    """Position of query row 0."""
    if OFFSET == OFFSET_TENSOR:
        offset = tl.load(offset_ptr + b)
    if OFFSET == OFFSET_ALIGNED:
        offset = m - n
    return offset


@triton.jit
def visible_tiles(
    lo,
    hi,
    offset,
    left,
    right,
    length,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which tiles of BLOCK along one side a tile [lo, hi) of the other side visits.

    With ROWS the tile holds query rows and visits keys, `length` = M; otherwise keys visiting rows, `length` = N.
    Returns (first, full_from, full_to, last): tiles first … full_from and full_to … last need the band or bounds
    checked element by element, those between are visible throughout.
    """
    if ROWS:
        any_lo, any_hi = lo + offset - left, hi + offset + right
        full_lo, full_hi = hi - 1 + offset - left, lo + offset + right + 1
        has_lo: tl.constexpr = LEFT
        has_hi: tl.constexpr = RIGHT
    else:
        any_lo, any_hi = lo - offset - right, hi - offset + left
        full_lo, full_hi = hi - 1 - offset - right, lo - offset + left + 1
        has_lo: tl.constexpr = RIGHT
        has_hi: tl.constexpr = LEFT
    first = 0
    full_from = 0
    last = ceil_div(length, BLOCK)
    full_to = length // BLOCK
    if has_lo:
        first = tl.minimum(tl.maximum(any_lo, 0) // BLOCK, last)
        full_from = ceil_div(tl.maximum(full_lo, 0), BLOCK)
    if has_hi:
        last = tl.maximum(tl.minimum(last, ceil_div(tl.maximum(any_hi, 0), BLOCK)), first)
        full_to = tl.minimum(full_to, tl.maximum(full_hi, 0) // BLOCK)
    full_from = tl.minimum(tl.maximum(full_from, first), last)
    full_to = tl.minimum(tl.maximum(full_to, full_from), last)
    return first, full_from, full_to, last


@triton.jit
def head_rows(pointer, batch, head, first, lanes, dims, stride_b, stride_h, stride_n, WIDE: tl.constexpr):
    """Pointers to token rows first + lanes of one head, [rows, dims]. Strides are 64-bit; without WIDE the offsets
    inside the tile fit in 32."""
    rows = lanes.to(tl.int64) * stride_n
    if not WIDE:
        rows = rows.to(tl.int32)
    return pointer + batch * stride_b + head * stride_h + first * stride_n + (rows[:, None] + dims[None, :])


@triton.jit
def load_tile(
    source,
    batch,
    head,
    first,
    start,
    stride,
    lanes,
    length,
    dims,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
    BOUND: tl.constexpr,
):
    """BLOCK token rows from `start` of a sequence of `length` tokens, [BLOCK, BLOCK_DIM], 0 outside.

    `source` is a descriptor of the whole tensor with TMA (the copy engine fills what is out of range with zeros), else
    a tile of pointers to rows 0 … BLOCK of this head and sequence. Without BOUND every row is in range.
    """
    if TMA:
        tile = tl.reshape(source.load([batch, head, first + start, 0]), (BLOCK, BLOCK_DIM))
    else:
        pointers = source + start * stride
        if BOUND:
            mask = (start + lanes < length)[:, None]
            if DIM != BLOCK_DIM:
                mask = mask & (dims < DIM)[None, :]
            tile = tl.load(pointers, mask=mask, other=0.0)
        elif DIM != BLOCK_DIM:
            tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def in_band(i, j, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """p − left ≤ j ≤ p + right, of whichever sides there are."""
    distance = j - i - offset
    if LEFT and RIGHT:
        return (distance >= -left) & (distance <= right)
    if LEFT:
        return distance >= -left
    return distance <= right


@triton.jit
def tanh(x):
    """tanh to 4·10⁻⁷ relative: a polynomial where the exponential form cancels (error 1.0·10⁻⁷ up to 0.625)."""
    u = x * x
    near = -0.005664775360973334 * u + 0.020595679965414643
    near = near * u - 0.053722679345897015
    near = near * u + 0.13331150161457744
    near = near * u - 0.3333326164181039
    near = (near * u + 0.9999999961636128) * x
    far = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(x) * (2.0 * LOG2E)))
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def scores_log2(
    dots,
    i,
    j,
    n,
    m,
    offset,
    scale,
    softcap,
    bias_ptr,
    bias_stride_n,
    bias_stride_m,
    relative_ptr,
    radius,
    slope,
    SCORE: tl.constexpr,
):
    """(softcap(scale·q·k) + bias + relative − slope·|p − j|)·log2 e, and tanh(scale·q·k / c) for the gradient.

    The pointers already stand at this batch and head. Out-of-range elements read a bias of 0.
    """
    s = dots * scale
    capped = s
    if SOFTCAP & SCORE:
        capped = tanh(s / softcap)
        s = capped * softcap
    if BIAS & SCORE:
        pointers = bias_ptr + i.to(tl.int64) * bias_stride_n + j.to(tl.int64) * bias_stride_m
        s += tl.load(pointers, mask=(i < n) & (j < m), other=0.0).to(tl.float32)
    if RELATIVE & SCORE:
        nearest = tl.minimum(tl.maximum(i + offset - j, -radius), radius)
        s += tl.load(relative_ptr + radius + nearest).to(tl.float32)
    if ALIBI & SCORE:
        s -= slope * tl.abs(i + offset - j).to(tl.float32)
    return s * LOG2E, capped


@triton.jit
def kept(
    seed, threshold, start_m, start_n, h, b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Which elements of the tile at (start_m, start_n) survive dropout; the rule stands in SPEC 1.5 and philox.py.

    Philox4x32-10 with key (seed mod 2³², seed div 2³²) and counter (j div 4, i, h, b): one evaluation serves four
    neighbouring keys, so start_n and BLOCK_N are multiples of 4.
    """
    quads = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    rows = start_m + tl.arange(0, BLOCK_M)
    if TRANSPOSED:
        c0 = (quads[:, None] + tl.zeros([1, BLOCK_M], tl.int32)).to(tl.uint32)
        c1 = (rows[None, :] + tl.zeros([BLOCK_N // 4, 1], tl.int32)).to(tl.uint32)
    else:
        c0 = (quads[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)).to(tl.uint32)
        c1 = (rows[:, None] + tl.zeros([1, BLOCK_N // 4], tl.int32)).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + h.to(tl.uint32), zero + b.to(tl.uint32))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if TRANSPOSED:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (BLOCK_N, BLOCK_M))
    else:
        words = tl.reshape(words, (BLOCK_M, BLOCK_N))
    return words >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def within(start):
    """Where in its base tile a tile starts."""
    return start - start // BASE_TILE * BASE_TILE


@triton.jit
def bit_tile(bits_ptr, tile_id, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Elements [row + ROWS, column + COLUMNS] of a bit tile, bool: uint32 words of 32 columns, lowest bit first."""
    words_per_row: tl.constexpr = BASE_TILE // 32
    base = bits_ptr + tile_id.to(tl.int64) * (BASE_TILE * words_per_row)
    rows = row + tl.arange(0, ROWS)
    if COLUMNS < 32:
        packed = tl.load(base + rows * words_per_row + column // 32)
        lanes = column - column // 32 * 32 + tl.arange(0, COLUMNS)
        seen = (packed[:, None] >> lanes[None, :]) & 1
    else:
        words = column // 32 + tl.arange(0, COLUMNS // 32)
        packed = tl.load(base + rows[:, None] * words_per_row + words[None, :])
        bits = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        seen = tl.reshape(bits, (ROWS, COLUMNS))
    return seen != 0


@triton.jit
def probabilities(
    dots,
    lse2,
    i,
    j,
    start_m,
    start_n,
    bits,
    bits_id,
    geometry,
    extras,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SCORE: tl.constexpr,
    BOUND: tl.constexpr,
    BITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """P of a tile, recomputed; 0 where the mask forbids. And tanh(scale·q·k / c) where the call has a soft cap.

    `lse2` broadcasts against the tile. BOUND tests j < M, which only tiles with query rows as rows need: a column out
    of range is otherwise a row of dK and dV that is not stored.
    """
    n, m, offset, left, right, scale_log2 = geometry
    capped = dots
    if SCORE:
        scale, softcap, bias_ptr, bias_stride_n, bias_stride_m, relative_ptr, radius, slope = extras
        s, capped = scores_log2(
            dots, i, j, n, m, offset, scale, softcap, bias_ptr, bias_stride_n, bias_stride_m, relative_ptr, radius,
            slope, SCORE,
        )  # fmt: skip
        p = tl.exp2(s - lse2)
    else:
        p = tl.exp2(dots * scale_log2 - lse2)
    if BITS:
        if TRANSPOSED:
            # The transposed map stores its bit tiles with keys as rows.
            seen = bit_tile(bits, bits_id, within(start_n), within(start_m), BLOCK_N, BLOCK_M)
        else:
            seen = bit_tile(bits, bits_id, within(start_m), within(start_n), BLOCK_M, BLOCK_N)
        p = tl.where(seen, p, 0.0)
    if LEFT or RIGHT:
        p = tl.where(in_band(i, j, offset, left, right, LEFT, RIGHT), p, 0.0)
    if BOUND:
        p = tl.where(j < m, p, 0.0)
    return p, capped


@triton.jit
def map_row(b, h, tile, batch, heads, tiles):
    """Row of a tile map: sequence, head and base tile, where the map may not tell sequences or heads apart."""
    return ((b % batch) * heads + h % heads) * tiles + tile


@triton.jit
def first_run(run_begin, run_end, run_start, run_stop, row, BLOCK: tl.constexpr):
    """The full tiles of a tile map's row, in tiles of BLOCK: how many; the first run's index, first tile and end; and
    the index behind the last run."""
    lo = tl.load(run_begin + row)
    hi = tl.load(run_end + row)
    lanes = tl.arange(0, 64)
    length = tl.zeros([64], tl.int32)
    for chunk in range(lo, hi, 64):
        inside = chunk + lanes < hi
        stop = tl.load(run_stop + chunk + lanes, mask=inside, other=0)
        length += stop - tl.load(run_start + chunk + lanes, mask=inside, other=0)
    ratio: tl.constexpr = BASE_TILE // BLOCK
    tile = tl.load(run_start + lo, mask=lo < hi, other=0) * ratio
    stop = tl.load(run_stop + lo, mask=lo < hi, other=0) * ratio
    return tl.sum(length, 0) * ratio, lo, tile, stop, hi


@triton.jit
def next_in_run(run_start, run_stop, entry, tile, stop, last, BLOCK: tl.constexpr):
    """Step to the next full tile: the one beside it, or the first of the next run. One flat loop over all runs keeps
    its pipeline full, where a loop for each run would drain at its end."""
    tile += 1
    wrap = tile >= stop
    entry += wrap.to(tl.int32)
    ratio: tl.constexpr = BASE_TILE // BLOCK
    fetch = wrap & (entry < last)
    tile = tl.where(wrap, tl.load(run_start + entry, mask=fetch, other=0) * ratio, tile)
    stop = tl.where(wrap, tl.load(run_stop + entry, mask=fetch, other=0) * ratio, stop)
    return entry, tile, stop


@triton.jit
def find_tile(run_begin, run_end, run_start, run_stop, part_begin, part_end, part_col, part_id, row, column):
    """What a tile map's row says of one column: −1 empty, −2 full, otherwise the id of its bit tile."""
    lanes = tl.arange(0, 64)
    found = tl.full([64], -1, tl.int32)
    lo = tl.load(run_begin + row)
    hi = tl.load(run_end + row)
    for chunk in range(lo, hi, 64):
        inside = chunk + lanes < hi
        start = tl.load(run_start + chunk + lanes, mask=inside, other=0)
        stop = tl.load(run_stop + chunk + lanes, mask=inside, other=0)
        found = tl.where((start <= column) & (column < stop), -2, found)
    lo = tl.load(part_begin + row)
    hi = tl.load(part_end + row)
    for chunk in range(lo, hi, 64):
        inside = chunk + lanes < hi
        same = tl.load(part_col + chunk + lanes, mask=inside, other=-1) == column
        found = tl.where(same, tl.load(part_id + chunk + lanes, mask=inside, other=0), found)
    # One lane at most holds an answer; the others' −1 drop out of the sum.
    return tl.sum(found + 1, 0) - 1
