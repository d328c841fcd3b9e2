"""Pictures of the lab, as inline SVG in the page's colours: bars, shared-memory banks, and who shares K and V."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

from tilewise.cost.banks import BANKS, Access, SharedTile, conflict_ways, warp_lanes

_WIDTH = 460


def bars(title: str, values: Mapping[str, float], text: Callable[[float], str]) -> str:
    """Horizontal bars from zero, one a name, with the value written beside each."""
    if not values:
        return ""
    row, right = 26, 96
    left = max(130, round(9 * max(map(len, values))) + 12)
    top = max(values.values()) or 1.0
    height = row * len(values) + 8
    parts = [_open(title, _WIDTH, height)]
    for index, (name, value) in enumerate(values.items()):
        y = 4 + index * row
        width = max(1.0, (_WIDTH - left - right) * value / top)
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + row / 2}" dy="0.35em" text-anchor="end">{escape(name)}</text>'
            f'<g class="series series-{index % 8}"><rect class="marker" x="{left}" y="{y + 4}" width="{width:.1f}" '
            f'height="{row - 8}"><title>{escape(name)}: {escape(text(value))}</title></rect></g>'
            f'<text class="tick" x="{left + width + 8:.1f}" y="{y + row / 2}" dy="0.35em">{escape(text(value))}</text>'
        )
    return "".join([*parts, "</svg>"])


def bank_picture(tile: SharedTile, access: Access) -> str:
    """The 32 banks across, the lanes of a warp down: each lane marks the bank of the first word that it wants.

    Lanes in one column wait for each other, unless they want the same word.
    """
    lanes, _ = warp_lanes(tile, access)
    ways = conflict_ways(tile, access)
    cell, left, top = 11, 58, 22
    title = f"{tile.layout}, {access}: {ways:g} times the least"
    parts = [_open(title, left + BANKS * cell + 8, top + len(lanes) * cell + 8)]
    for bank in range(0, BANKS, 4):
        x = left + bank * cell + cell / 2
        parts.append(f'<text class="tick small" x="{x}" y="{top - 8}" text-anchor="middle">{bank}</text>')
    parts.append(f'<text class="tick small" x="4" y="{top - 8}">bank</text>')
    for lane, (row, column) in enumerate(lanes):
        y = top + lane * cell
        if lane % 8 == 0:
            parts.append(f'<text class="tick small" x="4" y="{y + cell - 2}">lane {lane}</text>')
        parts.append(f'<path class="grid" d="M{left} {y}h{BANKS * cell}"/>')
        x = left + tile.bank(row, column) * cell
        parts.append(
            f'<g class="series series-{lane // 8}"><rect class="marker" x="{x + 1}" y="{y + 1}" width="{cell - 2}" '
            f'height="{cell - 2}"><title>lane {lane}: row {row}, column {column}, bank {tile.bank(row, column)}</title>'
            "</rect></g>"
        )
    return "".join([*parts, "</svg>"])


def heads_picture(heads: int = 8, groups: int = 2) -> str:
    """MHA, GQA, MQA and MLA: query heads above, what the cache keeps below, and who reads what."""
    kinds = (("MHA", heads), ("GQA", groups), ("MQA", 1), ("MLA", 1))
    panel, gap, box = 200, 24, 16
    width, height = 2 * panel + gap + 40, 250
    parts = [_open("Query heads and the keys and values that they share", width, height)]
    for index, (name, kept) in enumerate(kinds):
        x0, y0 = 20 + index % 2 * (panel + gap), 8 + index // 2 * 124
        step = panel / heads
        parts.append(f'<text class="label" x="{x0}" y="{y0 + 12}">{name}</text>')
        kept_x = [x0 + panel * (i + 0.5) / kept for i in range(kept)]
        latent = name == "MLA"
        for head in range(heads):
            x = x0 + step * (head + 0.5)
            to = kept_x[head * kept // heads]
            parts.append(f'<path class="axis" d="M{x:.1f} {y0 + 42}L{to:.1f} {y0 + 76}"/>')
            parts.append(
                f'<g class="series series-5"><rect class="marker" x="{x - box / 2:.1f}" y="{y0 + 26}" width="{box}" '
                f'height="{box}" rx="3"><title>query head {head}</title></rect></g>'
            )
        for number, x in enumerate(kept_x):
            wide = 3 * box if latent else box
            told = "one latent for all heads" if latent else f"K and V of head {number}"
            parts.append(
                f'<g class="series series-{2 if latent else 1}"><rect class="marker" x="{x - wide / 2:.1f}" '
                f'y="{y0 + 76}" width="{wide}" height="{box}" rx="3"><title>{told}</title></rect></g>'
            )
        kept_text = "r_kv + d_rope" if latent else f"2·{kept}·D" if kept > 1 else "2·D"
        parts.append(f'<text class="tick" x="{x0 + panel}" y="{y0 + 12}" text-anchor="end">{kept_text} a token</text>')
    return "".join([*parts, "</svg>"])


def _open(title: str, width: float, height: float) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    )
