"""Tiles as intervals on a line: the algebra by which masks combine without a grid of tiles.

All tiles of a problem, plane by plane (a plane is one sequence and head), row by row, stand on one line of length
planes·rows·columns. A `Line` is a piecewise constant function on it: EMPTY, FULL or UNDECIDED. A causal mask over a
million tokens is then 24,576 pieces instead of 67 million tiles, and `&`, `|`, `~` are merges of sorted edges. Every
function here works on whole arrays; none loops over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EMPTY, FULL, UNDECIDED = 0, 1, 2

AND = np.array([[EMPTY, EMPTY, EMPTY], [EMPTY, FULL, UNDECIDED], [EMPTY, UNDECIDED, UNDECIDED]], dtype=np.uint8)
OR = np.array([[EMPTY, FULL, UNDECIDED], [FULL, FULL, FULL], [UNDECIDED, FULL, UNDECIDED]], dtype=np.uint8)
NOT = np.array([FULL, EMPTY, UNDECIDED], dtype=np.uint8)
DIFFERS = np.array([[EMPTY, FULL, EMPTY], [FULL, EMPTY, FULL], [EMPTY, FULL, EMPTY]], dtype=np.uint8)
"""Whether exactly one of the two is FULL."""


class Line(NamedTuple):
    """Piece k covers [edges[k], edges[k + 1]) with state[k]; the last piece ends at `length`."""

    edges: np.ndarray
    """int64, strictly increasing, the first 0."""
    state: np.ndarray
    """uint8; neighbours differ."""
    length: int

    @property
    def stops(self) -> np.ndarray:
        return np.append(self.edges[1:], self.length)

    def pieces(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops of the maximal pieces in `state`."""
        at = np.flatnonzero(self.state == state)
        return self.edges[at], self.stops[at]


def constant(length: int, state: int) -> Line:
    return Line(np.zeros(1, np.int64), np.array([state], np.uint8), length)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenation of `arange(starts[k], starts[k] + counts[k])`."""
    total = int(counts.sum())
    before = np.cumsum(counts) - counts
    return np.arange(total, dtype=np.int64) + np.repeat(starts - before, counts)


def from_edges(edges: np.ndarray, state: np.ndarray, length: int) -> Line:
    """A line from sorted edges: of several at one place the last counts, and equal neighbours become one piece.

    Tiles before the first edge are EMPTY; edges at or after `length` are dropped.
    """
    if not len(edges) or edges[0] > 0:
        edges, state = np.concatenate(([0], edges)), np.concatenate(([EMPTY], state))
    last_at_place = np.append(edges[1:] != edges[:-1], True) & (edges < length)
    edges, state = edges[last_at_place], state[last_at_place]
    changes = np.append(True, state[1:] != state[:-1])
    return Line(edges[changes].astype(np.int64, copy=False), state[changes].astype(np.uint8, copy=False), length)


def from_intervals(starts: np.ndarray, stops: np.ndarray, state: np.ndarray, length: int) -> Line:
    """The union of any intervals, overlapping and in any order: FULL where a FULL one lies, else UNDECIDED where an
    UNDECIDED one lies."""
    full = state == FULL
    # One int64 an event, so that a plain sort (several times faster than argsort) orders them: place, then its weight.
    weight = np.where(full, 2, 0)
    events = np.sort(np.concatenate((starts * 4 + weight, stops * 4 + weight + 1)))
    places, kind = events >> 2, events & 3
    sign = 1 - 2 * (kind & 1)
    fulls = np.cumsum(np.where(kind >= 2, sign, 0))
    others = np.cumsum(np.where(kind >= 2, 0, sign))
    return from_edges(places, np.where(fulls > 0, FULL, np.where(others > 0, UNDECIDED, EMPTY)), length)


def combine(a: Line, b: Line, table: np.ndarray) -> Line:
    """`table[state of a, state of b]` everywhere; AND, OR and DIFFERS are such tables."""
    edges = np.sort(np.concatenate((a.edges, b.edges)))
    left = a.state[np.searchsorted(a.edges, edges, side="right") - 1]
    right = b.state[np.searchsorted(b.edges, edges, side="right") - 1]
    return from_edges(edges, table[left, right], a.length)


def invert(a: Line) -> Line:
    return a._replace(state=NOT[a.state])


def concatenate(lines: Sequence[Line]) -> Line:
    """One line after the other."""
    lengths = np.array([line.length for line in lines])
    starts = np.cumsum(lengths) - lengths
    edges = np.concatenate([line.edges + start for line, start in zip(lines, starts, strict=True)])
    return from_edges(edges, np.concatenate([line.state for line in lines]), int(lengths.sum()))


def take_planes(line: Line, source: np.ndarray, plane: int) -> Line:
    """The line whose plane k is plane `source[k]` of `line`; `plane` is the length of one."""
    count = line.length // plane
    borders = np.arange(count, dtype=np.int64) * plane
    edges = np.union1d(line.edges, borders)
    state = line.state[np.searchsorted(line.edges, edges, side="right") - 1]
    first = np.append(np.searchsorted(edges, borders), len(edges))
    counts = np.diff(first)[source]
    index = ranges(first[source], counts)
    shift = np.repeat((np.arange(len(source)) - source) * plane, counts)
    return from_edges(edges[index] + shift, state[index], len(source) * plane)


def split_rows(starts: np.ndarray, stops: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intervals on the line cut at row borders: (row, first column, stop column) of each piece, in order."""
    first = starts // columns
    counts = (stops - 1) // columns - first + 1
    row = ranges(first, counts)
    base = row * columns
    start = np.maximum(np.repeat(starts, counts), base) - base
    return row, start, np.minimum(np.repeat(stops, counts), base + columns) - base


def transpose_full(line: Line, planes: int, rows: int, columns: int) -> Line:
    """The FULL part of a line of [planes, rows, columns] tiles as a line of [planes, columns, rows] tiles.

    A transposed run begins and ends where two neighbouring rows differ, so only those tiles are ever listed: the cost
    is the number of transposed runs, not of full tiles.
    """
    plane = rows * columns
    # The line one row further on: what stands above each tile; nothing stands above the first row of a plane.
    above = from_edges(np.append(0, line.edges + columns), np.append(EMPTY, line.state), line.length)
    tops = np.arange(planes, dtype=np.int64) * plane
    tops = np.stack((tops, tops + columns), axis=1).reshape(-1)
    below_top = from_edges(tops, np.tile([EMPTY, FULL], planes), line.length)
    starts, stops = combine(line, combine(above, below_top, AND), DIFFERS).pieces(FULL)
    turns = ranges(starts, stops - starts)
    row, start, stop = split_rows(*line.pieces(FULL), columns)
    last = row % rows == rows - 1
    # A run that reaches the last row ends at the bottom of its column: the transposed row's end.
    bottom = ranges(row[last] * columns + start[last], stop[last] - start[last])

    def place(tile: np.ndarray, below: int) -> np.ndarray:
        return (tile // plane * columns + tile % columns) * rows + tile % plane // columns + below

    toggles = np.sort(np.concatenate((place(turns, 0), place(bottom, 1))))
    return from_edges(toggles, np.where(np.arange(len(toggles)) % 2 == 0, FULL, EMPTY), line.length)
