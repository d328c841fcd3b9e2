from __future__ import annotations

import pytest

from tilewise.bench.report import units


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234, "1230"), (99.96, "100.0"), (12.3, "12.3"), (0.01234, "0.0123"), (-5.678, "-5.68")],
)
def test_significant(value: float, text: str) -> None:
    assert units.significant(value) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.0123, "12.3 µs"), (0.5, "0.500 ms"), (12.34, "12.3 ms"), (999.4, "999 ms"), (1234, "1.23 s")],
)
def test_duration(milliseconds: float, text: str) -> None:
    assert units.duration(milliseconds) == text.replace(" ", units.SPACE)


def test_a_range_has_one_unit() -> None:
    assert units.duration_range(950, 1200) == f"0.950–1.20{units.SPACE}s"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (100 * 2**20, "100 MiB"),
        (1.05e9, "1001 MiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert units.size(count) == text.replace(" ", units.SPACE)


def test_error_percent_times_length() -> None:
    assert units.error(3.14e-7) == "3.1e-07"
    assert units.error(0.0) == "0"
    assert units.percent(0.314) == f"31{units.SPACE}%"
    assert units.times(4.314) == "4.31×"
    assert units.length(4096) == f"N{units.SPACE}={units.SPACE}4,096"


def test_rate() -> None:
    assert units.rate(1.379e11) == "138\N{NO-BREAK SPACE}GFLOP/s"
    assert units.rate(9.894e14) == "989\N{NO-BREAK SPACE}TFLOP/s"
