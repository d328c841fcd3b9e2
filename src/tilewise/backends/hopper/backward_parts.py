"""What the backward kernels share: how rows are counted, and how a tile passes from registers to shared memory."""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from tilewise.backends.hopper.primitives import at_most_zero, constexpr_function, gl, gluon, mbarrier
from tilewise.backends.hopper.walk import FARTHEST, OFFSET_ALIGNED, OFFSET_TENSOR

ROWS = gl.constexpr(64)
"""Query rows of a block."""
PAIR = gl.constexpr(128)
"""Rows to which each sequence's row statistics are padded, and rows of a tile of a tile map."""


@gluon.jit
def opaque():
    """A zero that the compiler cannot see through."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def new_barrier():
    """A barrier in shared memory for what the copy engine fills once a phase."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    return barrier


@gluon.jit
def new_barriers(COUNT: gl.constexpr):
    """Several of them in one allocation, to choose from by a number."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@constexpr_function
def register_order():
    """A float32 tile [64, 64] in the order of a warpgroup's registers.

    Each thread's 16 bytes stay together and a warp's 512 lie in a row: no bank conflicts.
    """
    bases = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    return gl.SharedLinearLayout(bases, [], 128)


@gluon.jit
def sequence(cu, b, length, PACKED: gl.constexpr):
    """First token, length and first row of the statistics of sequence b."""
    first = 0
    padded = 0
    if PACKED:
        first = gl.load(cu + b)
        length = gl.load(cu + b + 1) - first
        padded = (first + b * PAIR) // PAIR * PAIR
    return first, length, padded


@gluon.jit
def position_offset(q_offset_ptr, b, n, m, OFFSET: gl.constexpr):
    """Position of a sequence's first row among its keys, as far as the launcher could not put it into the window."""
    offset = 0
    if OFFSET == OFFSET_ALIGNED:
        offset = m - n
    if OFFSET == OFFSET_TENSOR:
        offset = gl.minimum(gl.maximum(gl.load(q_offset_ptr + b), -FARTHEST), FARTHEST)
    return offset


@gluon.jit
def visible_blocks(start, stop, left, right, length, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """The blocks of 64 that indices start … stop see, where i sees i − left … i + right of 0 … length.

    (edges, fulls, first, full_from, full_to): blocks full_from … full_to are seen whole by all, `fulls` of them, and
    `edges` others from `first` on by some, before and behind.
    """
    last = gl.cdiv(length, 64)
    first = 0
    full_from = 0
    full_to = last
    if LEFT:
        first = gl.minimum(gl.maximum(start - left, 0) // 64, last)
        full_from = gl.cdiv(gl.maximum(stop - 1 - left, 0), 64)
    if RIGHT:
        last = gl.maximum(gl.minimum(last, gl.cdiv(gl.maximum(stop + right, 0), 64)), first)
        full_to = gl.minimum(full_to, gl.maximum(start + right + 1, 0) // 64)
    full_from = gl.minimum(gl.maximum(full_from, first), last)
    full_to = gl.minimum(gl.maximum(full_to, full_from), last)
    fulls = full_to - full_from
    return last - first - fulls, fulls, first, full_from, full_to


@gluon.jit
def block_place(t, members, blocks):
    """The t-th block of a walk over all members' edges and then all members' full blocks: (member, first index)."""
    edges, fulls, first, full_from, full_to = blocks
    t_full = t - members * edges
    per_member = gl.where(t_full < 0, edges, fulls)
    t = gl.where(t_full < 0, t, t_full)
    member = t // per_member
    t -= member * per_member
    edge = gl.where(first + t < full_from, first + t, first + t + full_to - full_from)
    return member, 64 * gl.where(t_full < 0, edge, full_from + t)


@gluon.jit
def tanh(x):
    """tanh to 4e-7 relative: a polynomial where the exponential form cancels."""
    u = x * x
    near = -0.005664775360973334 * u + 0.020595679965414643
    near = near * u - 0.053722679345897015
    near = near * u + 0.13331150161457744
    near = near * u - 0.3333326164181039
    near = (near * u + 0.9999999961636128) * x
    far = 1.0 - 2.0 / (1.0 + gl.exp2(gl.abs(x) * 2.885390081777927))
    return gl.where(gl.abs(x) < 0.625, near, gl.where(x < 0, -far, far))


@gluon.jit
def wide_slot(pool, index):
    """One slot of the pool as a tile of 64 rows; its address is computed anew, and not kept in a register."""
    return pool.index(index + opaque()).reshape([ROWS, pool.type.shape[-1]])


@gluon.jit
def weights_of(
    s, lse, key, position, band, scores,
    MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CUT: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """P of a block's scores s, and the slope of the soft cap there.

    `lse` (in log2 units), `key` and `position` (counted from one origin) have a 1 for the dim of s that they do not
    change along. CUT: keys past the end read as 0, and the weight of such a score may be ∞ where others are far below.
    """
    scale_log2, soft_scale, soft_log2 = scores
    slope = 1.0
    if SOFTCAP:
        capped = tanh(s * soft_scale)
        x = capped * soft_log2 - lse
        slope = 1.0 - capped * capped
    else:
        x = s * scale_log2 - lse
    if CUT:
        x = at_most_zero(x)
    if MASK:
        left, right = band
        if RIGHT:
            x = gl.where(key <= position + right, x, -float("inf"))
        if LEFT:
            x = gl.where(key >= position - left, x, -float("inf"))
    return gl.exp2(x), slope
