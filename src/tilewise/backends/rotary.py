"""Rotary embeddings in PyTorch: the angles, exact for any position, and the rotation.

An angle is needed modulo one turn only. A frequency is therefore kept as the fraction of a turn that one token adds, an
integer in units of 2⁻⁶⁴ turns; position times frequency in 64-bit integers drops whole turns exactly, whatever the
position. What is left of error is that of the float64 frequency, 10⁻¹⁶ times the angle: 10⁻¹⁰ radians after a million
tokens, where `float32(position) · float32(frequency)` is off by 10⁻¹.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.reference.softmax import accumulator_dtype

TURN_BITS = 64


def as_turns(frequencies: list[float], device: torch.device) -> Tensor:
    """Radians a token as int64 [len(frequencies)] in units of 2⁻⁶⁴ turns."""
    span = 1 << TURN_BITS
    whole = [int(math.ldexp(f / (2.0 * math.pi), TURN_BITS)) % span for f in frequencies]
    return torch.tensor([w - span if w >= span // 2 else w for w in whole], dtype=torch.int64, device=device)


class Place(NamedTuple):
    """Where the tokens of x [B, H, N, D] stand: exactly one of explicit positions and offsets, or a plain offset."""

    positions: Tensor | None
    """[1|B, N] integers."""
    offsets: Tensor | None
    """[B] integers: token i of sequence b stands at offsets[b] + i."""
    offset: int
    """Token i stands at offset + i."""


def packed_positions(cu_seqlens: Tensor, tokens: int, offsets: Tensor | None, offset: int) -> Tensor:
    """[1, tokens] int64: each token's place within its own sequence, plus that sequence's offset. Reads nothing on the
    host."""
    t = torch.arange(tokens, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64)
    sequence = torch.searchsorted(ends, t, right=True).clamp_(max=ends.shape[0] - 1)
    positions = t - cu_seqlens[:-1].to(torch.int64)[sequence]
    positions = positions + (offset if offsets is None else offsets.to(torch.int64)[sequence])
    return positions[None]


def _positions(place: Place, n: int, device: torch.device) -> Tensor:
    if place.positions is not None:
        return place.positions.to(torch.int64)
    t = torch.arange(n, device=device)
    return (t + place.offset)[None] if place.offsets is None else t + place.offsets.to(torch.int64)[:, None]


def rotate(
    x: Tensor, out: Tensor, place: Place, turns: Tensor, factor: float, *, interleaved: bool, inverse: bool
) -> None:
    """Write x [B, H, N, D] with its first 2·len(turns) columns rotated and multiplied by `factor` into `out`.

    `out` may be x itself. `inverse` turns the other way. Computes in float32, in float64 for float64.
    """
    dtype = accumulator_dtype(x.dtype)
    dim = 2 * turns.shape[0]
    phase = _positions(place, x.shape[2], x.device)[..., None] * turns
    angle = (phase >> 11).double().mul_(2.0 * math.pi / 2**53)
    cos = (angle.cos() * factor).to(dtype)[:, None]
    sin = (angle.sin() * (-factor if inverse else factor)).to(dtype)[:, None]
    if interleaved:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    else:
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    a, b = x[..., first].to(dtype), x[..., second].to(dtype)
    turned = a * cos - b * sin, a * sin + b * cos
    out[..., first], out[..., second] = turned
    if out is not x:
        out[..., dim:] = x[..., dim:]
