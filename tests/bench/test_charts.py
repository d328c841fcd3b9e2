from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from tilewise.bench.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    STYLES,
    TOP,
    WIDTH,
    Limit,
    LogScale,
    Series,
    binary_ticks,
    log_chart,
    swatch,
    ticks,
)


def draw(series: list[Series], limit: Limit | None = None, **options: object) -> ET.Element:
    svg = log_chart("A <title>", series, x_label="N", x_text=str, y_text=str, limit=limit, **options)  # type: ignore[arg-type]
    return ET.fromstring(svg)  # noqa: S314 - our own output


def test_log_scale_maps_ends_and_middle() -> None:
    scale = LogScale(1, 100, 0, 200)
    assert scale(1) == 0
    assert scale(10) == pytest.approx(100)
    assert scale(100) == pytest.approx(200)


@pytest.mark.parametrize(("low", "high"), [(0.9, 1100), (3e-7, 2e-6), (0.011, 0.05), (1e-12, 1e9), (450, 5200)])
def test_ticks_are_round_inside_and_few(low: float, high: float) -> None:
    values = ticks(low, high)
    assert 2 <= len(values) <= 8
    for value in values:
        assert low <= value <= high
        assert round(value / 10 ** math.floor(math.log10(value) + 1e-9), 6) in (1, 2, 5)


@pytest.mark.parametrize(("low", "high"), [(1000, 5000), (2**18, 2**31), (1.0, 2**60)])
def test_binary_ticks_are_powers_of_two_inside_and_few(low: float, high: float) -> None:
    values = binary_ticks(low, high)
    assert 2 <= len(values) <= 7
    assert all(low <= value <= high and math.log2(value).is_integer() for value in values)


@pytest.mark.parametrize("ys", [(1.0, 1.0, 1.0), (1e-9, 1.0, 1e9), (3e-7, 4e-7, 5e-7)])
def test_every_marker_lies_inside_the_axes(ys: tuple[float, ...]) -> None:
    points = tuple(zip((1.0, 512.0, 65536.0), ys, strict=True))
    for style in range(STYLES + 1):
        chart = draw([Series("a", points, style)])
        inside_x, inside_y = (LEFT, WIDTH - RIGHT), (TOP, HEIGHT - BOTTOM)
        markers = [e for e in chart.iter() if "marker" in e.get("class", "")]
        assert len(markers) == 3
        for marker in markers:
            at = marker.get("d")
            x, y = (float(n) for n in re.findall(r"[\d.]+", at)[:2]) if at else (None, None)
            x = x if x is not None else float(marker.get("cx") or marker.get("x") or "nan")
            y = y if y is not None else float(marker.get("cy") or marker.get("y") or "nan")
            assert inside_x[0] - 5 <= x <= inside_x[1] + 5
            assert inside_y[0] - 6 <= y <= inside_y[1] + 6


def test_points_are_placed_logarithmically_and_upward() -> None:
    chart = draw([Series("a", ((1.0, 1.0), (10.0, 10.0), (100.0, 100.0)), 0)])
    circles = [e for e in chart.iter() if e.tag == "circle"]
    (x0, y0), (x1, y1), (x2, y2) = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in circles]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x1
    assert y0 > y1


def test_names_are_escaped_and_shown_in_tooltips() -> None:
    chart = draw([Series("<b>&", ((1.0, 2.0),), 0)])
    assert chart.get("aria-label") == "A <title>"
    assert "<b>&, 1.0: 2.0" in [e.text for e in chart.iter() if e.tag == "title"]


def test_strong_series_are_drawn_last() -> None:
    chart = draw([Series("auto", ((1.0, 1.0),), 0, strong=True), Series("other", ((1.0, 1.0),), 1)])
    groups = [e.get("class") for e in chart if "series" in e.get("class", "")]
    assert groups == ["series series-1", "series series-0 strong"]


def test_a_forbidden_limit_tints_what_is_above_it() -> None:
    points = ((1.0, 5.0), (10.0, 5.0))
    tinted = draw([Series("a", ((1.0, 1.0), (10.0, 2.0)), 0)], Limit("most", points, forbidden=True))
    plain = draw([Series("a", ((1.0, 1.0), (10.0, 2.0)), 0)], Limit("most", points))
    assert [e.get("class") for e in tinted if e.get("class", "").startswith(("over", "limit"))] == [
        "over",
        "limit forbidden",
    ]
    assert [e.get("class") for e in plain if e.get("class", "").startswith(("over", "limit"))] == ["limit"]
    assert "most" in [e.text for e in plain.iter() if e.tag == "text"]


def test_close_x_labels_are_thinned_but_all_points_drawn() -> None:
    xs = [1000.0, 1010.0, 1020.0, 4000.0]
    chart = draw([Series("a", tuple((x, 1.0) for x in xs), 0)])
    labels = [e.text for e in chart.iter() if e.tag == "text" and e.text in {str(x) for x in xs}]
    assert labels == ["1000.0", "4000.0"]
    assert len([e for e in chart.iter() if e.tag == "circle"]) == 4


def test_nothing_to_draw_is_nothing() -> None:
    assert log_chart("t", [], x_label="N", x_text=str, y_text=str) == ""


def test_styles_differ_without_colour() -> None:
    """Dash pattern and marker together tell any two series apart."""
    looks = {re.sub(r"series-\d", "", swatch(style)) for style in range(STYLES)}
    assert len(looks) == STYLES
