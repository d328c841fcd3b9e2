"""The roofline as a picture: the roof, what the model puts under it (hollow) and what was measured (filled)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tilewise.bench.report import units
from tilewise.bench.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, LogScale, ticks


@dataclass(frozen=True)
class Point:
    """A dot: `measured` FLOP/s is None where only the model speaks."""

    name: str
    intensity: float
    attainable: float
    measured: float | None = None
    style: int = 0


def roofline_chart(title: str, peak: float, bandwidth: float, points: Sequence[Point]) -> str:
    """An `<svg>` of FLOP/s over FLOP/byte, both logarithmic.

    Args:
        peak: FLOP/s of the flat part; `bandwidth`: bytes/s of the slope.
        points: what to place; a label stands beside the filled dot, or the hollow one where nothing was measured.
    """
    ridge = peak / bandwidth
    low = min([ridge / 64, *(point.intensity / 2 for point in points)])
    high = max([ridge * 64, *(point.intensity * 2 for point in points)])
    rates = [point.measured for point in points if point.measured]
    bottom = min([low * bandwidth, *rates]) / 1.5
    x, y = LogScale(low, high, LEFT, WIDTH - RIGHT), LogScale(bottom, peak * 2.5, HEIGHT - BOTTOM, TOP)
    base = HEIGHT - BOTTOM
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for value in ticks(bottom, peak * 2.5):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        text = escape(units.significant(value / 1e9, 1))
        parts.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y(value):.1f}" dy="0.32em" text-anchor="end">{text}</text>'
        )
    for value in ticks(low, high):
        parts.append(f'<path class="axis" d="M{x(value):.1f} {base}v5"/>')
        text = escape(units.significant(value, 1))
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{base + 20}" text-anchor="middle">{text}</text>')
    parts += [
        f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>',
        f'<path class="limit" d="M{x(low):.1f} {y(low * bandwidth):.1f}L{x(ridge):.1f} {y(peak):.1f}'
        f'H{WIDTH - RIGHT}"/>',
        f'<text class="label" x="{WIDTH - RIGHT}" y="{y(peak) - 7:.1f}" text-anchor="end">{units.rate(peak)}</text>',
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        "FLOP a byte; y: GFLOP/s</text>",
    ]
    parts += [_dot(point, x, y, sloping=point.intensity < ridge) for point in points]
    return "".join([*parts, "</svg>"])


def _dot(point: Point, x: LogScale, y: LogScale, *, sloping: bool) -> str:
    px, py = x(point.intensity), y(point.attainable)
    found = [
        f'<g class="series series-{point.style}">',
        f'<g><circle cx="{px:.1f}" cy="{py:.1f}" r="5" class="marker hollow"/>'
        f"<title>{escape(point.name)}, attainable: {units.significant(point.attainable / 1e9)} GFLOP/s</title></g>",
    ]
    # Beside the slope there is room to the right of a dot, under the flat part below it.
    label_x, label_y, anchor = (px + 9, py + 5, "start") if sloping else (px, py + 20, "middle")
    if point.measured:
        my = y(point.measured)
        label_x, label_y, anchor = (px + 9, my + 4, "start") if px < 0.7 * WIDTH else (px - 9, my + 4, "end")
        share = units.percent(point.measured / point.attainable)
        found.append(f'<path d="M{px:.1f} {min(py + 5, my):.1f}V{my:.1f}" stroke-dasharray="2 3"/>')
        found.append(
            f'<g><circle cx="{px:.1f}" cy="{my:.1f}" r="5" class="marker"/><title>{escape(point.name)}, measured: '
            f"{units.significant(point.measured / 1e9)} GFLOP/s, {share} of attainable</title></g>"
        )
    found.append(
        f'<text class="label" x="{label_x:.1f}" y="{label_y:.1f}" text-anchor="{anchor}">'
        f"{escape(point.name)}</text></g>"
    )
    return "".join(found)
