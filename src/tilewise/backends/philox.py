"""The dropout generator in PyTorch: a pure function of (seed, b, h, i, j), the same on every backend and tile shape.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011) with
key = (seed mod 2³², seed div 2³²) and counter = (j div 4, i, h, b); element (i, j) owns word j mod 4 of the result and
is kept when that word is at least round(p·2³²), but 2³² − 1 at most. Row i and key j count from the start of their own
sequence.

PyTorch has no unsigned 64-bit product, but int64 wraps modulo 2⁶⁴, so both halves of the product come out right once
the arithmetic shift's sign bits are masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def threshold(dropout: float) -> int:
    """Words below this are dropped; it fits in 32 bits, however near 1 the probability is."""
    return min(round(dropout * 2**32), _LOW)


def _product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    wide = x * multiplier
    return (wide >> 32) & _LOW, wide & _LOW


def keep_mask(seed: Tensor, dropout: float, b: Tensor, h: Tensor, rows: range, keys: range) -> Tensor:
    """Which elements of a block survive dropout: bool [len(b), len(h), len(rows), len(keys)].

    seed [1] int64; b and h int64 vectors of batch and head indices; rows and keys ranges of step 1.
    """
    device = seed.device
    quads = torch.arange(keys.start // 4, -(-keys.stop // 4), device=device)
    shape = (len(b), len(h), len(rows), len(quads))
    c0 = quads.expand(shape)
    c1 = torch.arange(rows.start, rows.stop, device=device)[:, None].expand(shape)
    c2 = h[:, None, None].expand(shape)
    c3 = b[:, None, None, None].expand(shape)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(-2)
    first = keys.start - 4 * (keys.start // 4)
    return words[..., first : first + len(keys)] >= threshold(dropout)
