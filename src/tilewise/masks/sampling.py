"""Random numbers that any machine, NumPy and PyTorch agree on: a counter-based hash and sampling without repeats."""

from __future__ import annotations

from typing import Any

_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Any, bits: int) -> Any:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64 arrays, whose products wrap modulo 2⁶⁴."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x &= (1 << 64) - 1
    x = (x ^ (x >> 30)) * _MIX1 & ((1 << 64) - 1)
    x = (x ^ (x >> 27)) * _MIX2 & ((1 << 64) - 1)
    return x ^ (x >> 31)


def draw_distinct(xp: Any, seed: int, row: Any, head: Any, count: int, size: int) -> list[Any]:
    """`count` distinct integers of `range(size)` for each (row, head): a pure function of its arguments.

    A counter-based hash feeds Floyd's sampling, so a row costs `count` draws whatever the size. A draw has 31 bits;
    its bias is below size / 2³¹.

    Args:
        row, head: int64 arrays that broadcast; `row` has at least one dimension, `head` may be an int.
        size: below 2³¹.

    Returns:
        `count` arrays (all of `range(size)` if count ≥ size) in the broadcast shape of row and head.
    """
    state = _mix((row + 0 * head) ^ _signed(_mix_int(seed + _GOLDEN)))
    state = _mix(state ^ head)
    chosen: list[Any] = []
    for k, top in enumerate(range(max(0, size - count), size)):
        drawn = (_shift(_mix(state + _signed((k + 1) * _GOLDEN)), 33) * (top + 1)) >> 31
        for earlier in chosen:
            # `earlier` holds values below `top`, so a repeat may take `top` itself.
            drawn = xp.where(drawn == earlier, top, drawn)
        chosen.append(drawn)
    return chosen
