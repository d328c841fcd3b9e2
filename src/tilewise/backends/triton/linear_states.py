"""States between segments: what each segment adds, and then what each begins with.

`segment_sums`. One program owns a [block_a, block_b] tile of one segment's Σ w_j a_jᵀ b_j, in registers (float32), and
walks the segment's chunks: forward with a = φ(k), b = v and weights down to the segment's end, for the states; backward
with a = φ(q)·scale, b = dout and weights down to its start, for their gradients. One product a chunk: the tile decays
by the chunk's total, then takes in the chunk. Beside it Σ w_j a_j (forward) or Σ w_i e_i a_i (backward, e the gradient
of the denominator) and the segment's total log decay.

`scan_segments`. One program owns block_a rows of one head's state and goes through the sequence's segments in order (or
backwards), replacing what a segment adds by what it begins with. Where decays want gradients it also sums, for the
boundary after each segment, S∘dS over the value dim: the gradient of everything that crosses it.

Sources: Yang et al., GLA (2023), section 4, for chunks; Martin and Cundy (2018) for the scan. The two levels, so that a
state leaves the chip once a segment and not once a chunk, are this library's.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from tilewise.backends.triton.linear_tiles import (
    CHANNEL,
    NONE,
    TOKEN,
    channel_decay,
    load_rows,
    locate,
    mapped,
    product,
    token_decay,
)


@triton.jit(do_not_specialize=["heads", "segments", "n", "length"])
def segment_sums(
    a_ptr,
    b_ptr,
    e_ptr,
    gate_ptr,
    cu_ptr,
    slot_sequence,
    first_slot,
    s_ptr,
    z_ptr,
    total_ptr,
    stride_ab: tl.int64,
    stride_ah: tl.int64,
    stride_an: tl.int64,
    stride_bb: tl.int64,
    stride_bh: tl.int64,
    stride_bn: tl.int64,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gn: tl.int64,
    heads: tl.int32,
    segments: tl.int32,
    n: tl.int32,
    length: tl.int32,
    scale: tl.float32,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    FEATURE: tl.constexpr,
    SCALED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s [slots, H, DA, DB], z [slots, H, DA] and total [slots, H] or [slots, H, DA] of every segment."""
    blocks_b: tl.constexpr = (DB + BLOCK_B - 1) // BLOCK_B
    blocks_a: tl.constexpr = (DA + BLOCK_A - 1) // BLOCK_A
    program = tl.program_id(0)
    block_b = program % blocks_b
    block_a = program // blocks_b % blocks_a
    h = program // (blocks_b * blocks_a) % heads
    slot = program // (blocks_b * blocks_a) // heads
    _, batch, first, live = locate(slot, segments, n, cu_ptr, slot_sequence, first_slot, length, PACKED)
    if live <= 0:
        return
    a_dims = block_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b_dims = block_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offsets = tl.arange(0, CHUNK)
    a_ptr += batch * stride_ab + h * stride_ah + first * stride_an
    b_ptr += batch * stride_bb + h * stride_bh + first * stride_bn
    if DECAY != NONE:
        gate_ptr += batch * stride_gb + h * stride_gh + first * stride_gn
    if NORMALIZE and REVERSE:
        e_ptr += (batch * heads + h).to(tl.int64) * n + first
    s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    z = tl.zeros([BLOCK_A], tl.float32)
    total = tl.zeros([BLOCK_A], tl.float32) if DECAY == CHANNEL else 0.0
    chunks = (live + CHUNK - 1) // CHUNK
    for t in range(0, chunks):
        start = t * CHUNK
        if REVERSE:
            start = (chunks - 1 - t) * CHUNK
        rows = start + offsets
        a = load_rows(a_ptr, stride_an, rows, live, a_dims, DA)
        b = load_rows(b_ptr, stride_bn, rows, live, b_dims, DB)
        a = mapped(a, scale, rows, live, a_dims, DA, FEATURE, SCALED)
        if DECAY == TOKEN:
            sums, last = token_decay(gate_ptr, stride_gn, rows, live)
            weight = tl.exp(sums) if REVERSE else tl.exp(last - sums)
            a = (a.to(tl.float32) * weight[:, None]).to(a.dtype)
            s *= tl.exp(last)
            z *= tl.exp(last)
            total += last
        if DECAY == CHANNEL:
            sums, last = channel_decay(gate_ptr, rows, start, live, a_dims, DA, EXCLUSIVE and REVERSE, CHUNK)
            weight = tl.exp(sums) if REVERSE else tl.exp(last[None, :] - sums)
            a = (a.to(tl.float32) * weight).to(a.dtype)
            s *= tl.exp(last)[:, None]
            z *= tl.exp(last)
            total += last
        if NORMALIZE:
            if REVERSE:
                e = tl.load(e_ptr + rows, mask=rows < live, other=0.0)
                z += tl.sum(a.to(tl.float32) * e[:, None], 0)
            else:
                z += tl.sum(a.to(tl.float32), 0)
        s = product(tl.trans(a), b, s, PRECISION)
    place = (slot * heads + h).to(tl.int64)
    inside = (a_dims < DA)[:, None] & (b_dims < DB)[None, :]
    tl.store(s_ptr + place * DA * DB + a_dims[:, None] * DB + b_dims[None, :], s, mask=inside)
    if block_b == 0:
        if NORMALIZE:
            tl.store(z_ptr + place * DA + a_dims, z, mask=a_dims < DA)
        if DECAY == CHANNEL:
            tl.store(total_ptr + place * DA + a_dims, total, mask=a_dims < DA)
        if DECAY == TOKEN:
            tl.store(total_ptr + place, total)


@triton.jit(do_not_specialize=["heads", "segments"])
def scan_segments(
    s_ptr,
    z_ptr,
    total_ptr,
    begin_s_ptr,
    begin_z_ptr,
    end_s_ptr,
    end_z_ptr,
    other_s_ptr,
    other_z_ptr,
    other_end_s_ptr,
    other_end_z_ptr,
    crossing_ptr,
    first_slot,
    heads: tl.int32,
    segments: tl.int32,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    BEGIN: tl.constexpr,
    BEGIN_Z: tl.constexpr,
    END: tl.constexpr,
    CROSSING: tl.constexpr,
):
    """s and z [slots, H, …] from sums to what a segment begins with (REVERSE: the gradient of what it ends with).

    `begin` is the state before a sequence, `end` the one after it [sequences, H, …]. `other` are the forward states and
    final state whose product with these gradients is crossing [slots, H, DA].
    """
    blocks_a: tl.constexpr = (DA + BLOCK_A - 1) // BLOCK_A
    program = tl.program_id(0)
    h = program // blocks_a % heads
    sequence = program // blocks_a // heads
    a_dims = program % blocks_a * BLOCK_A + tl.arange(0, BLOCK_A)
    b_dims = tl.arange(0, BLOCK_B)
    inside = (a_dims < DA)[:, None] & (b_dims < DB)[None, :]
    within = a_dims[:, None] * DB + b_dims[None, :]
    if PACKED:
        first = tl.load(first_slot + sequence)
        count = tl.load(first_slot + sequence + 1) - first
    else:
        first = sequence * segments
        count = segments
    own = (sequence * heads + h).to(tl.int64)
    s = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    z = tl.zeros([BLOCK_A], tl.float32)
    if BEGIN:
        s = tl.load(begin_s_ptr + own * DA * DB + within, mask=inside, other=0.0)
    if BEGIN_Z:
        z = tl.load(begin_z_ptr + own * DA + a_dims, mask=a_dims < DA, other=0.0)
    for t in range(0, count):
        slot = first + t
        if REVERSE:
            slot = first + count - 1 - t
        place = slot.to(tl.int64) * heads + h
        added = tl.load(s_ptr + place * DA * DB + within, mask=inside, other=0.0)
        if CROSSING:
            after = tl.load(other_end_s_ptr + own * DA * DB + within, mask=inside & (t == 0), other=0.0)
            after += tl.load(other_s_ptr + (place + heads) * DA * DB + within, mask=inside & (t > 0), other=0.0)
            crossing = tl.sum(after * s, 1)
            if NORMALIZE:
                after_z = tl.load(other_end_z_ptr + own * DA + a_dims, mask=(a_dims < DA) & (t == 0), other=0.0)
                after_z += tl.load(other_z_ptr + (place + heads) * DA + a_dims, mask=(a_dims < DA) & (t > 0), other=0.0)
                crossing += after_z * z
            tl.store(crossing_ptr + place * DA + a_dims, crossing, mask=a_dims < DA)
        if NORMALIZE:
            added_z = tl.load(z_ptr + place * DA + a_dims, mask=a_dims < DA, other=0.0)
        # A tile smaller than the program is held by several warps, each of which loads it, and one stores: not before
        # the others have loaded what it replaces.
        tl.debug_barrier()
        tl.store(s_ptr + place * DA * DB + within, s, mask=inside)
        if NORMALIZE:
            tl.store(z_ptr + place * DA + a_dims, z, mask=a_dims < DA)
        if DECAY == TOKEN:
            kept = tl.exp(tl.load(total_ptr + place))
            s *= kept
            z *= kept
        if DECAY == CHANNEL:
            kept = tl.exp(tl.load(total_ptr + place * DA + a_dims, mask=a_dims < DA, other=0.0))
            s *= kept[:, None]
            z *= kept
        s += added
        if NORMALIZE:
            z += added_z
    if END:
        tl.store(end_s_ptr + own * DA * DB + within, s, mask=inside)
        if NORMALIZE:
            tl.store(end_z_ptr + own * DA + a_dims, z, mask=a_dims < DA)
