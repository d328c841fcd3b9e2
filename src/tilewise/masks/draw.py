"""Pictures of masks: full, partial and skipped tiles, in Unicode and in SVG, and the work that skipping saves."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np

from tilewise.errors import bad_value
from tilewise.masks.algebra import Mask
from tilewise.masks.compiler import settle, tile_map
from tilewise.masks.coverage import TILE
from tilewise.masks.lines import ranges
from tilewise.masks.tilemap import TileMap

_SMALL = 32  # up to so many rows and keys, a cell is one pair
_WIDEST = 40  # cells in a row, two characters each
_PLANES = 4  # sequences and heads drawn

_SKIPPED, _FULL = " ·", "██"
_PARTIAL = ("░░", "▒▒", "▓▓")


class Cells(NamedTuple):
    """One plane cut into cells: `full` and `used` count the tiles of each that are full and that are visited, and
    `seen` is the fraction of its pairs that may attend."""

    full: np.ndarray
    used: np.ndarray
    tiles: np.ndarray
    seen: np.ndarray

    @property
    def kind(self) -> np.ndarray:
        """0 skipped, 1 full, 2 partial."""
        return np.where(self.used == 0, 0, np.where(self.full == self.tiles, 1, 2))


@dataclass(frozen=True)
class Picture:
    """What `mask.show(n, m)` returns: print it, or put `.svg()` into a page.

    A cell is one pair for up to 32 rows and keys, one tile of 128×128 for up to 40 tiles a side, else a square of
    tiles. Of several sequences and heads the first four are drawn.
    """

    expression: str
    map: TileMap
    side: int
    """Tiles a side of a cell; 0 where a cell is one pair."""
    planes: tuple[Cells, ...]

    @classmethod
    def of(cls, mask: Mask, n: int, m: int, *, offset: Any = None, heads: int | None = None) -> Picture:
        """The picture of `mask`; see `Mask.show`."""
        if 0 in (n, m):
            raise bad_value("n" if n == 0 else "m", 0, "at least 1: there is nothing to draw")
        tiles = tile_map(mask, n, m, offset=offset, heads=heads)
        drawn = range(min(_PLANES, tiles.batch * tiles.heads))
        if max(n, m) <= _SMALL:
            frame = settle(mask, n, m, offset, heads)
            pairs = mask.to_dense(n, m, offset=frame.offset, heads=heads).reshape(-1, n, m)
            one = np.ones((n, m), np.int64)
            return cls(str(mask), tiles, 0, tuple(Cells(pairs[k], pairs[k], one, 1.0 * pairs[k]) for k in drawn))
        side = max(1, -(-max(tiles.q_tiles, tiles.k_tiles) // _WIDEST))
        return cls(str(mask), tiles, side, tuple(_cells(tiles, plane, side) for plane in drawn))

    @property
    def saved(self) -> float:
        """The fraction of tiles that are never visited."""
        return self.map.skipped_tiles / self.map.total_tiles if self.map.total_tiles else 0.0

    @property
    def cell(self) -> str:
        """What one cell stands for."""
        if not self.side:
            return "a cell is one pair"
        return "a cell is one tile" if self.side == 1 else f"a cell is {self.side}×{self.side} tiles"

    def summary(self) -> str:
        """Tiles, work saved, pairs and bytes, in two lines."""
        tiles = self.map
        total = f"{tiles.total_tiles:,} tile{'' if tiles.total_tiles == 1 else 's'} of {TILE}×{TILE}"
        visited = f"{tiles.full_tiles:,} full, {tiles.partial_tiles:,} partial ({len(tiles.bits):,} distinct)"
        return (
            f"{total}: {visited}, {tiles.skipped_tiles:,} skipped: {self.saved:.1%} of the work saved\n"
            f"{tiles.sparsity:.2%} of the pairs masked; tile map {tiles.nbytes:,} bytes"
        )

    def __str__(self) -> str:
        lines = [f"{self.expression}   {self.map.n} queries × {self.map.m} keys, {self.cell}"]
        for plane, cells in enumerate(self.planes):
            if len(self.planes) > 1:
                lines.append(self._title(plane))
            lines += [_line(kinds, seen) for kinds, seen in zip(cells.kind, cells.seen, strict=True)]
        if self._left_out:
            lines.append(self._left_out)
        return "\n".join([*lines, self._legend, self.summary()])

    @property
    def _legend(self) -> str:
        if not self.side:
            return f"{_FULL} may attend  {_SKIPPED.strip()} masked"
        return f"{_FULL} full  {''.join(glyph[0] for glyph in _PARTIAL)} partial  {_SKIPPED.strip()} skipped"

    def _title(self, plane: int) -> str:
        b, h = divmod(plane, self.map.heads)
        parts = ([f"sequence {b}"] if self.map.batch > 1 else []) + ([f"head {h}"] if self.map.heads > 1 else [])
        return ", ".join(parts)

    @property
    def _left_out(self) -> str:
        more = self.map.batch * self.map.heads - len(self.planes)
        return f"… and {more} more" if more else ""

    def svg(self, size: int = 320) -> str:
        """An inline SVG, `size` pixels a picture: no script, no reference to anything outside."""
        several = len(self.planes) > 1
        gap, top = 16, 40 if several else 24
        shapes: list[str] = []
        height = size
        for plane, cells in enumerate(self.planes):
            rows, columns = cells.kind.shape
            unit = size / max(rows, columns, 1)
            height = unit * rows
            left = plane * (size + gap)
            if several:
                shapes.append(_text(left, top - 6, 12, escape(self._title(plane))))
            shapes.append(f'<g transform="translate({left} {top}) scale({unit:.6g})" shape-rendering="crispEdges">')
            shapes.append(f'<rect class="tw-skipped" width="{columns}" height="{rows}"/>')
            shapes += _rectangles(cells)
            shapes.append("</g>")
        below = top + height + 16
        label = f"{self.expression}, {self.map.n} queries × {self.map.m} keys"
        words = ("may attend", "", "masked") if not self.side else ("full", "partial", "skipped")
        keyed = zip(("tw-full", "tw-partial", "tw-skipped"), words, strict=True)
        legend = "   ".join(f'<tspan class="{name}">■</tspan> {word}' for name, word in keyed if word)
        first, second = self.summary().split("\n")
        rest = "; ".join(part for part in (second, self.cell, self._left_out) if part)
        shapes += [_text(0, 14, 13, escape(label)), _text(0, below, 12, legend)]
        shapes += [_text(0, below + 17, 11, escape(first)), _text(0, below + 33, 11, escape(rest))]
        width = max(len(self.planes) * (size + gap) - gap, 7 * max(len(label), len(first)))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {below + 40:.6g}" width="{width}" '
            f'role="img" font-family="system-ui, sans-serif"><title>{escape(label)}</title>'
            f"{_STYLE}{''.join(shapes)}</svg>"
        )


def _text(x: float, y: float, size: int, content: str) -> str:
    return f'<text class="tw-text" x="{x:.6g}" y="{y:.6g}" font-size="{size}" xml:space="preserve">{content}</text>'


_STYLE = "<style>.tw-full{fill:#1f6feb}.tw-partial{fill:#e08a1e}.tw-skipped{fill:#8884}.tw-text{fill:#747c85}</style>"


def _line(kinds: np.ndarray, seen: np.ndarray) -> str:
    """A row of cells; a partial one is the denser the more of its pairs may attend."""
    partial = (_PARTIAL[min(2, int(fraction * 3))] for fraction in seen)
    return "".join((_SKIPPED, _FULL, glyph)[kind] for kind, glyph in zip(kinds, partial, strict=True))


def _rectangles(cells: Cells) -> list[str]:
    """Neighbouring cells of a row that look alike as one rectangle; a partial one is the denser the more may attend."""
    shade = np.where(cells.kind == 2, np.clip(np.ceil(cells.seen * 4) / 4, 0.25, 1.0), 1.0)
    shapes = []
    for y, (kinds, shades) in enumerate(zip(cells.kind, shade, strict=True)):
        look = kinds * 10 + shades
        starts = np.flatnonzero(np.append(True, look[1:] != look[:-1]))
        for x, stop in zip(starts, [*starts[1:], len(look)], strict=True):
            if kinds[x] == 0:
                continue
            name = "tw-full" if kinds[x] == 1 else "tw-partial"
            opacity = f' opacity="{0.25 + 0.75 * shades[x]:.3g}"' if kinds[x] == 2 else ""
            shapes.append(f'<rect class="{name}"{opacity} x="{x}" y="{y}" width="{stop - x}" height="1"/>')
    return shapes


def _cells(tiles: TileMap, plane: int, side: int) -> Cells:
    """Plane `plane` of a map in cells of side × side tiles."""
    height, width = -(-tiles.q_tiles // side), -(-tiles.k_tiles // side)
    full, partial = np.zeros((height, width), np.int64), np.zeros((height, width), np.int64)
    pairs = np.zeros((height, width), np.float64)
    row, start, count = tiles.runs()
    mine = row // tiles.q_tiles == plane
    t, start, stop = row[mine] % tiles.q_tiles, start[mine], (start + count)[mine]
    # A run is spread over the cells that it crosses.
    first = start // side
    crossed = (stop - 1) // side - first + 1
    cell = ranges(first, crossed)
    t, begin = np.repeat(t, crossed), cell * side
    inside = np.minimum(np.repeat(stop, crossed), begin + side) - np.maximum(np.repeat(start, crossed), begin)
    np.add.at(full, (t // side, cell), inside)
    np.add.at(pairs, (t // side, cell), inside * TILE * np.minimum(TILE, tiles.n - t * TILE))
    row = tiles.part_rows()
    mine = row // tiles.q_tiles == plane
    at = row[mine] % tiles.q_tiles // side, tiles.part_col[mine] // side
    np.add.at(partial, at, 1)
    np.add.at(pairs, at, np.bitwise_count(tiles.bits).sum(axis=(1, 2))[tiles.part_id[mine]])

    def split(total: int, step: int) -> np.ndarray:
        return np.diff(np.append(np.arange(0, total, step), total))

    count_tiles = np.outer(split(tiles.q_tiles, side), split(tiles.k_tiles, side))
    area = np.outer(split(tiles.n, side * TILE), split(tiles.m, side * TILE))
    return Cells(full, full + partial, count_tiles, pairs / area)
