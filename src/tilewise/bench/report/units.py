"""Numbers as people read them, the same in the terminal and in the report: no line break parts one from its unit."""

from __future__ import annotations

import math

SPACE = "\N{NO-BREAK SPACE}"

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def significant(value: float, digits: int = 3) -> str:
    """`value` to that many significant digits, never in exponent form: 1234 → "1230", 0.01234 → "0.0123"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    return f"{rounded:.{max(decimals, 0)}f}"


def duration(milliseconds: float, digits: int = 3) -> str:
    """12.3 → "12.3 ms", 1234 → "1.23 s", 0.0123 → "12.3 µs"."""
    factor, unit = _time_unit(milliseconds)
    return f"{significant(milliseconds * factor, digits)}{SPACE}{unit}"


def duration_range(low: float, high: float) -> str:
    """Two durations in the unit of the longer one: "238–300 ms"."""
    factor, unit = _time_unit(high)
    return f"{significant(low * factor)}–{significant(high * factor)}{SPACE}{unit}"


def _time_unit(milliseconds: float) -> tuple[float, str]:
    if milliseconds >= 1000:
        return 1e-3, "s"
    return (1e3, "µs") if milliseconds < 0.1 else (1.0, "ms")


def size(count: float) -> str:
    """Bytes in binary units: 1536 → "1.5 KiB"; whole units where nothing follows the point."""
    power = 0 if count < 1 else min(int(math.log2(count) // 10), len(_BYTES) - 1)
    value = count / 1024**power
    text = f"{value:.0f}" if value >= 1000 else significant(value)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{SPACE}{_BYTES[power]}"


def rate(flops: float) -> str:
    """FLOP/s: 1.379e11 → "138 GFLOP/s"."""
    factor, unit = (1e-12, "TFLOP/s") if flops >= 1e12 else (1e-9, "GFLOP/s")
    return f"{significant(flops * factor)}{SPACE}{unit}"


def error(value: float) -> str:
    """An error to two digits: 3.1e-07."""
    return "0" if value == 0 else f"{value:.1e}"


def times(ratio: float) -> str:
    """A ratio: 4.31 → "4.31×"."""
    return f"{significant(ratio)}×"


def percent(fraction: float) -> str:
    return f"{significant(100 * fraction, 2)}{SPACE}%"


def length(n: float) -> str:
    """A sequence length with its name: "N = 4,096"."""
    return f"N{SPACE}={SPACE}{n:,.0f}"
