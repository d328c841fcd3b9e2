"""Line charts on logarithmic axes, as inline SVG that takes its colours from the page's CSS variables.

A chart is drawn 460 units wide with text of 13 units, so that it stays readable at its natural size on a phone and
two fit beside each other on a desk. Series differ in colour, marker and dash, so none needs colour to be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 310
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 14, 52
STYLES = 8
"""How many series a page tells apart; the stylesheet defines the colours `--series-0` to `--series-7`."""

_DASHES = ("", "7 4", "2 4", "9 3 2 3", "", "5 3", "3 3", "10 4")


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y), both > 0; `style` is its colour, marker and dash, equal across charts."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: int
    strong: bool = False


@dataclass(frozen=True)
class Limit:
    """A line that the series are read against: a boundary to stay under (`forbidden`), or a ceiling to reach."""

    label: str
    points: tuple[tuple[float, float], ...]
    forbidden: bool = False


@dataclass(frozen=True)
class LogScale:
    """Maps [low, high] to pixels [start, end] logarithmically."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


def log_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    y_tick: Callable[[float], str] | None = None,
    binary: bool = False,
    limit: Limit | None = None,
) -> str:
    """An `<svg>` of all series on log-log axes.

    Args:
        title: the chart's accessible name.
        x_text, y_text: how a value is written, in tooltips and on the axes; `y_tick` for the y axis if it differs.
        binary: y ticks at powers of two, for bytes.

    Returns:
        The SVG as text, or "" if there is no point to draw.
    """
    points = [point for one in series for point in one.points] + list(limit.points if limit else ())
    if not points:
        return ""
    xs = sorted({x for x, _ in points})
    x_scale = LogScale(xs[0] / 1.15, xs[-1] * 1.15, LEFT, WIDTH - RIGHT)
    low, high = _padded(min(y for _, y in points), max(y for _, y in points))
    y_scale = LogScale(low, high, HEIGHT - BOTTOM, TOP)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        *_y_axis(y_scale, binary_ticks(low, high) if binary else ticks(low, high), y_tick or y_text),
        *_x_axis(x_scale, _spread(xs, x_scale), x_text, x_label),
    ]
    if limit:
        parts += _limit(limit, x_scale, y_scale)
    for one in sorted(series, key=lambda s: s.strong):
        parts += _line(one, x_scale, y_scale, x_text, y_text)
    return "".join([*parts, "</svg>"])


def swatch(style: int) -> str:
    """A small `<svg>` of a series' line and marker, for the legend."""
    return (
        f'<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true"><g class="series series-{style % STYLES}">'
        f'<path d="M1 7H33"{_dash(style)}/>{_marker(style, 17, 7)}</g></svg>'
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    """Room above and below, and at least a factor of four in all, so that equal values do not fill the chart."""
    room = max(1.25, (4 * low / high) ** 0.5)
    return low / room, high * room


def ticks(low: float, high: float) -> list[float]:
    """Round values in [low, high]: powers of ten, or 1-2-5 steps where those would be fewer than three.

    Over many decades only every second, third … power is kept, so that at most seven are left.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    powers = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(powers) >= 3:
        return powers[:: math.ceil(len(powers) / 7)]
    fine = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    return [value for value in fine if low <= value <= high]


def binary_ticks(low: float, high: float) -> list[float]:
    """Powers of two in [low, high], every second, third … only, so that at most seven are left."""
    powers = [2.0**e for e in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    step = math.ceil(len(powers) / 7)
    return [power for power in powers if math.log2(power) % step == 0]


def _spread(xs: Sequence[float], scale: LogScale) -> list[float]:
    """The measured x values, less those whose labels would touch the previous one."""
    kept: list[float] = []
    for x in xs:
        if not kept or scale(x) - scale(kept[-1]) >= 46:
            kept.append(x)
    return kept


def _y_axis(scale: LogScale, values: Sequence[float], text: Callable[[float], str]) -> Iterable[str]:
    for value in values:
        y = f"{scale(value):.1f}"
        yield f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y}" dy="0.32em" text-anchor="end">{escape(text(value))}</text>'


def _x_axis(scale: LogScale, xs: Sequence[float], text: Callable[[float], str], label: str) -> Iterable[str]:
    base = HEIGHT - BOTTOM
    yield f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>'
    for value in xs:
        x = f"{scale(value):.1f}"
        yield f'<path class="axis" d="M{x} {base}v5"/>'
        yield f'<text class="tick" x="{x}" y="{base + 20}" text-anchor="middle">{escape(text(value))}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'


def _limit(limit: Limit, x_scale: LogScale, y_scale: LogScale) -> Iterable[str]:
    """The line drawn across the whole width; everything above a forbidden one is tinted."""
    (first, last) = limit.points[0][1], limit.points[-1][1]
    ends = [(x_scale.low, first), *limit.points, (x_scale.high, last)]
    path = "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in ends)
    if limit.forbidden:
        yield f'<path class="over" d="M{path}L{WIDTH - RIGHT} {TOP}L{LEFT} {TOP}Z"/>'
    yield f'<path class="limit{" forbidden" if limit.forbidden else ""}" d="M{path}"/>'
    yield f'<text class="label" x="{LEFT + 8}" y="{y_scale(first) - 8:.1f}">{escape(limit.label)}</text>'


def _line(
    series: Series, x_scale: LogScale, y_scale: LogScale, x_text: Callable[[float], str], y_text: Callable[[float], str]
) -> Iterable[str]:
    placed = [(x_scale(x), y_scale(y)) for x, y in series.points]
    strong = " strong" if series.strong else ""
    yield f'<g class="series series-{series.style % STYLES}{strong}">'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    yield f'<path d="M{path}"{_dash(series.style)}/>'
    for (x, y), (px, py) in zip(series.points, placed, strict=True):
        tooltip = escape(f"{series.name}, {x_text(x)}: {y_text(y)}")
        yield f"<g>{_marker(series.style, px, py)}<title>{tooltip}</title></g>"
    yield "</g>"


def _dash(style: int) -> str:
    pattern = _DASHES[style % STYLES]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _marker(style: int, x: float, y: float) -> str:
    """Circle, square, triangle and diamond, filled for the first four styles and hollow for the others."""
    r = 4.2
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"',
        f'<rect x="{x - r * 0.9:.1f}" y="{y - r * 0.9:.1f}" width="{r * 1.8:.1f}" height="{r * 1.8:.1f}"',
        f'<path d="M{x:.1f} {y - r * 1.2:.1f}l{r * 1.15:.1f} {r * 2:.1f}h{-r * 2.3:.1f}z"',
        f'<path d="M{x:.1f} {y - r * 1.35:.1f}l{r * 1.35:.1f} {r * 1.35:.1f}l{-r * 1.35:.1f} {r * 1.35:.1f}'
        f'l{-r * 1.35:.1f} {-r * 1.35:.1f}z"',
    )
    hollow = " hollow" if style % STYLES >= 4 else ""
    return f'{shapes[style % 4]} class="marker{hollow}"/>'
