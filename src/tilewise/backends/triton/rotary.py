"""Rotary embeddings, forward and backward, portable.

What: the first 2·HALF columns of x [B, H, N, D] turned by position times frequency, pair by pair; the gradient is the
same kernel with the angle reversed. Bound by memory: x is read once and written once.
Ownership: one program has BLOCK_N tokens of one sequence and `heads_each` heads of it; neighbours have other heads.
Angles depend on the token and the pair alone, so they are computed once a program and serve all its heads.
Registers: cosines and sines [BLOCK_N, HALF] in float32, one head's tile beside them. No shared memory.
Angles: frequencies are integers in units of 2⁻⁶⁴ turns; the 64-bit product with the position drops whole turns exactly,
and its upper half is the angle to 2⁻³² turns: two bits say the quadrant, the rest lies within ±π/4. There short
polynomials are within 10⁻⁷ of sine and cosine; the library's own would carry a slow path for huge angles along.
Order: load positions and frequencies, sines and cosines, then head by head: load, rotate, store.
Source: Su et al., RoFormer (2021).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.rotary import Place
from tilewise.backends.triton.configs import Tile
from tilewise.backends.triton.launch import launch

RADIANS = tl.constexpr(1.4629180792671596e-09)
"""2π / 2³²."""

EIGHTH = tl.constexpr(1 << 29)
"""An eighth of a turn as a phase."""

S3, S5, S7 = tl.constexpr(-1.666665067e-01), tl.constexpr(8.331978662e-03), tl.constexpr(-1.949563609e-04)
C4, C6, C8 = tl.constexpr(4.166664687e-02), tl.constexpr(-1.388736751e-03), tl.constexpr(2.443845142e-05)
"""sin x ≈ x + x³(S3 + S5 x² + S7 x⁴) and cos x ≈ 1 − x²/2 + x⁴(C4 + C6 x² + C8 x⁴): minimax fits for |x| ≤ π/4, off by
2·10⁻⁹ and 10⁻¹⁰ before float32 rounds."""

FROM_OFFSET, FROM_OFFSETS, FROM_POSITIONS = 0, 1, 2
"""What the kernel's PLACE flag may be."""

TILE_ELEMENTS = 2048
"""Pairs × tokens of one tile: four warps hold its angles in 32 registers a thread."""

PROGRAMS = 1024
"""Programs that fill a GPU; beyond them each takes more heads, which share its angles."""

WIDE, NARROW = Tile(0, 0, 4, 1), Tile(0, 0, 1, 1)
"""Launch shapes of whole tiles and of a few tokens; only warps and stages count."""


@triton.jit
def sine_and_cosine(phase):
    """Of an int32 phase in units of 2⁻³² turns."""
    quadrant = ((phase + EIGHTH) >> 30) & 3
    x = (((phase + EIGHTH) & ((1 << 30) - 1)) - EIGHTH).to(tl.float32) * RADIANS
    z = x * x
    sine = x + x * z * (S3 + z * (S5 + z * S7))
    cosine = 1.0 - 0.5 * z + z * z * (C4 + z * (C6 + z * C8))
    swapped = (quadrant & 1) != 0
    sin = tl.where(swapped, cosine, sine)
    cos = tl.where(swapped, sine, cosine)
    return tl.where((quadrant & 2) != 0, -sin, sin), tl.where(((quadrant + 1) & 2) != 0, -cos, cos)


@triton.jit(do_not_specialize=["offset", "n", "heads", "heads_each", "stride_pb", "factor"])
def rotary(
    x_ptr,
    out_ptr,
    turns_ptr,
    place_ptr,
    offset,
    n,
    heads,
    heads_each,
    factor,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_pb,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLACE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    COPY_REST: tl.constexpr,
):
    """out [B, H, N, D]; place_ptr holds positions [1|B, N] with row stride stride_pb, or offsets [B], or nothing, as
    PLACE says. COPY_REST: out is not x, and the columns beyond the rotated ones are copied."""
    blocks = (n + BLOCK_N - 1) // BLOCK_N
    groups = (heads + heads_each - 1) // heads_each
    first = tl.program_id(0) % groups * heads_each
    tile = tl.program_id(0) // groups
    batch = tile // blocks
    rows = tile % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n
    pairs = tl.arange(0, BLOCK_HALF)
    pair_ok = pairs < HALF
    if PLACE == 2:
        positions = tl.load(place_ptr + batch.to(tl.int64) * stride_pb + rows, mask=row_ok, other=0).to(tl.int64)
    else:
        positions = rows.to(tl.int64) + offset
        if PLACE == 1:
            positions += tl.load(place_ptr + batch).to(tl.int64)
    turns = tl.load(turns_ptr + pairs, mask=pair_ok, other=0)
    sin, cos = sine_and_cosine(((positions[:, None] * turns[None, :]) >> 32).to(tl.int32))
    cos *= factor
    sin *= -factor if INVERSE else factor
    x_rows = x_ptr + batch.to(tl.int64) * stride_xb + rows.to(tl.int64)[:, None] * stride_xn
    out_rows = out_ptr + batch.to(tl.int64) * stride_ob + rows.to(tl.int64)[:, None] * stride_on
    for h in range(first, min(first + heads_each, heads)):
        x_head = x_rows + tl.cast(h, tl.int64) * stride_xh
        out_head = out_rows + tl.cast(h, tl.int64) * stride_oh
        if INTERLEAVED:
            cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            ok = row_ok[:, None] & (cols < 2 * HALF)
            both = tl.load(x_head + cols, mask=ok, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(both, (BLOCK_N, BLOCK_HALF, 2)))
            turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (BLOCK_N, 2 * BLOCK_HALF))
            tl.store(out_head + cols, turned.to(out_ptr.dtype.element_ty), mask=ok)
        else:
            cols = pairs[None, :]
            ok = row_ok[:, None] & pair_ok[None, :]
            a = tl.load(x_head + cols, mask=ok, other=0.0).to(tl.float32)
            b = tl.load(x_head + cols + HALF, mask=ok, other=0.0).to(tl.float32)
            tl.store(out_head + cols, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=ok)
            tl.store(out_head + cols + HALF, (a * sin + b * cos).to(out_ptr.dtype.element_ty), mask=ok)
        if COPY_REST:
            rest = (2 * HALF + tl.arange(0, BLOCK_REST))[None, :]
            rest_ok = row_ok[:, None] & (rest < D)
            tl.store(out_head + rest, tl.load(x_head + rest, mask=rest_ok), mask=rest_ok)


class Remembered(NamedTuple):
    """A plan as `launch` asks for it: all follows from dtypes, strides and flags."""

    plain: bool
    compiled: dict[Any, Any]


_REMEMBERED: dict[tuple[torch.dtype, torch.dtype | None], Remembered] = {}
"""By the dtypes of x and of the positions."""


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def rotate(
    x: Tensor, out: Tensor, place: Place, turns: Tensor, factor: float, *, interleaved: bool, inverse: bool
) -> None:
    """Write x [B, H, N, D] rotated into `out` (which may be x); arguments as `backends.rotary.rotate`.

    float32, float16 or bfloat16 with a contiguous last dim; runs on x's device, which must be the current one.
    """
    batch, heads, n, dim = x.shape
    if 0 in (batch, heads, n):
        return
    half = turns.shape[0]
    block_half = _power_of_two(half)
    block_n = min(_power_of_two(n), max(1, TILE_ELEMENTS // block_half))
    tiles = batch * (-(-n // block_n))
    heads_each = max(1, min(heads, tiles * heads // PROGRAMS))
    source, index, row_step = FROM_OFFSET, None, 0
    if place.positions is not None:
        source, index = FROM_POSITIONS, place.positions.contiguous()
        row_step = n if index.shape[0] > 1 else 0
    elif place.offsets is not None:
        source, index = FROM_OFFSETS, place.offsets.contiguous()
    rest = 0 if out is x else dim - 2 * half
    launch(
        rotary,
        tiles * (-(-heads // heads_each)),
        _REMEMBERED.setdefault((x.dtype, None if index is None else index.dtype), Remembered(True, {})),
        (x, out) if index is None else (x, out, index),
        (
            x,
            out,
            turns,
            turns if index is None else index,
            place.offset if index is None else 0,
            n,
            heads,
            heads_each,
            factor,
            *x.stride()[:3],
            *out.stride()[:3],
            row_step,
        ),
        (dim, half, block_half, _power_of_two(rest), block_n, source, interleaved, inverse, rest > 0),
        WIDE if block_n * block_half >= TILE_ELEMENTS // 2 else NARROW,
    )
