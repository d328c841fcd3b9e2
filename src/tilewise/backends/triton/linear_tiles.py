"""What the kernels of linear attention share: where a segment lies, how its tiles are loaded, and their products.

A *segment* is a run of whole chunks of one sequence; one program walks it alone, chunk by chunk, with its state in
registers. A *slot* numbers the segments of all sequences. Dense: slot = sequence · segments + index. Packed: two small
tables on the device say which sequence a slot belongs to and which slot is the first of a sequence.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

NONE, TOKEN, CHANNEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of decay: none, one factor a token, one a token and key channel."""
IDENTITY, ELU, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Feature maps."""
LEAST = tl.constexpr(-60.0)
"""reference.linear.LEAST_LOG_DECAY"""
EPSILON = tl.constexpr(1e-6)
"""reference.linear.EPSILON"""


@triton.jit
def locate(slot, segments, n, cu_ptr, slot_sequence, first_slot, length, PACKED: tl.constexpr):
    """(sequence, row of the batch, first token, number of tokens) of a slot; no tokens for an unused one."""
    if PACKED:
        sequence = tl.load(slot_sequence + slot)
        known = tl.maximum(sequence, 0)
        first = tl.load(cu_ptr + known) + (slot - tl.load(first_slot + known)) * length
        live = tl.where(sequence < 0, 0, tl.minimum(tl.load(cu_ptr + known + 1) - first, length))
        sequence = known
        batch = 0
    else:
        sequence = slot // segments
        first = (slot - sequence * segments) * length
        live = tl.minimum(n - first, length)
        batch = sequence
    return sequence, batch, first, live


@triton.jit
def load_rows(base, stride_n, rows, live, dims, SIZE: tl.constexpr):
    """[rows, dims] of base, 0 outside."""
    inside = (rows < live)[:, None] & (dims < SIZE)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride_n + dims[None, :], mask=inside, other=0.0)


@triton.jit
def mapped(x, scale, rows, live, dims, SIZE: tl.constexpr, FEATURE: tl.constexpr, SCALED: tl.constexpr):
    """φ(x)·scale in x's dtype, 0 outside."""
    y = x.to(tl.float32)
    if FEATURE == ELU:
        y = tl.where((rows < live)[:, None] & (dims < SIZE)[None, :], tl.where(y > 0.0, y + 1.0, tl.exp(y)), 0.0)
    if FEATURE == RELU:
        y = tl.maximum(y, 0.0)
    if SCALED:
        y *= scale
    return y.to(x.dtype)


@triton.jit
def slope(x, FEATURE: tl.constexpr):
    """φ'(x), float32."""
    y = x.to(tl.float32)
    if FEATURE == ELU:
        y = tl.where(y > 0.0, 1.0, tl.exp(y))
    if FEATURE == RELU:
        y = tl.where(y > 0.0, 1.0, 0.0)
    return y


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b; operands of two dtypes (float16 beside a float32 that may exceed its range) meet in TF32."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")


@triton.jit
def token_decay(gate_ptr, stride_n, rows, live):
    """Of one chunk: the running sum of log decays, and their total."""
    gate = tl.load(gate_ptr + rows.to(tl.int64) * stride_n, mask=rows < live, other=0.0).to(tl.float32)
    gate = tl.maximum(gate, LEAST)
    return tl.cumsum(gate, 0), tl.sum(gate, 0)


@triton.jit
def channel_decay(sums_ptr, rows, start, live, dims, SIZE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr):
    """Of one chunk, from the running sums in memory: up to row − SHIFT, and their total."""
    at = rows - SHIFT
    inside = ((at >= start) & (at < live))[:, None] & (dims < SIZE)[None, :]
    sums = tl.load(sums_ptr + at.to(tl.int64)[:, None] * SIZE + dims[None, :], mask=inside, other=0.0)
    last = tl.minimum(start + CHUNK, live) - 1
    return sums, tl.load(sums_ptr + last.to(tl.int64) * SIZE + dims, mask=dims < SIZE, other=0.0)
