"""Which tiles each mask fills, leaves empty or must look into, which of these look alike, and what is in them.

`cover(mask, tiling, heads)` is a line (lines.py) of FULL, EMPTY and UNDECIDED tiles; a decision is always right, and
UNDECIDED is allowed wherever deciding would cost. `keys(mask, tiling, tiles)` gives undecided tiles integers such that
equal keys have equal bits, so that `look(mask, tiling, tiles)` evaluates only distinct ones. All cost O(tiles listed),
never N×M and never rows × columns of tiles. Row tiles are judged on all their 128 rows, as if the predicate went on
beyond row n.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from tilewise.masks.algebra import And, Combination, Mask, Not, PerHead
from tilewise.masks.arrays import Held
from tilewise.masks.frame import Frame, Grid
from tilewise.masks.lines import (
    AND,
    EMPTY,
    FULL,
    OR,
    UNDECIDED,
    Line,
    combine,
    concatenate,
    from_edges,
    invert,
    take_planes,
)
from tilewise.masks.patterns import Diagonal, Prefix, Tree

TILE = 128
"""Rows and columns of a tile: the one base granularity; every kernel that takes masks uses tiles that divide it."""

_FAR = np.int64(1) << 40


class Tiles(NamedTuple):
    """Some tiles: sequence, head, row tile and column tile of each, int64."""

    b: np.ndarray
    h: np.ndarray
    t: np.ndarray
    c: np.ndarray

    def __getitem__(self, index: Any) -> Tiles:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Tiles(self.b[index], self.h[index], self.t[index], self.c[index])


class Tiling:
    """A frame cut into tiles, with a memory for what `cover` works out and `keys` needs again."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.rows, self.columns = -(-frame.n // TILE), -(-frame.m // TILE)
        held = frame.offset
        self.offsets = np.array([held], np.int64) if isinstance(held, int) else held.host()
        self._memory: dict[tuple[int, str], Any] = {}

    def offset(self, tiles: Tiles) -> np.ndarray:
        return self.offsets[tiles.b] if len(self.offsets) > 1 else self.offsets[np.zeros_like(tiles.b)]

    def batch(self, mask: Mask) -> int:
        """How many sequences the mask's cover tells apart."""
        return max(mask.batch, len(self.offsets))

    def remember(self, mask: Mask, what: str, work_out: Callable[[], Any]) -> Any:
        key = (id(mask), what)
        if key not in self._memory:
            self._memory[key] = work_out()
        return self._memory[key]


class Cover(NamedTuple):
    """A line over planes [batch, heads]."""

    line: Line
    batch: int
    heads: int

    def spread(self, batch: int, heads: int) -> Line:
        """The line over [batch, heads] planes, where each of the two is what it was or was 1."""
        if (batch, heads) == (self.batch, self.heads):
            return self.line
        b = np.arange(batch) if self.batch > 1 else np.zeros(batch, np.int64)
        h = np.arange(heads) if self.heads > 1 else np.zeros(heads, np.int64)
        source = (b[:, None] * self.heads + h).reshape(-1)
        return take_planes(self.line, source, self.line.length // (self.batch * self.heads))


@singledispatch
def cover(mask: Mask, tiling: Tiling, heads: np.ndarray) -> Cover:
    """The cover of `mask` for the heads listed (one plane if the mask does not tell heads apart)."""
    raise NotImplementedError(type(mask))


@singledispatch
def keys(mask: Mask, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    """Non-negative int64 keys of tiles: equal keys, equal bits."""
    raise NotImplementedError(type(mask))


@singledispatch
def look(mask: Mask, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    """The predicate on whole tiles: bool [tiles, 128, 128], an array that the caller may write to."""
    within = np.arange(TILE)
    rows, columns = tiles.t[:, None] * TILE + within, tiles.c[:, None] * TILE + within
    b, h = tiles.b[:, None, None], tiles.h[:, None, None]
    grid = Grid(np, on_host, tiling.frame, b, h, rows[:, :, None], columns[:, None, :])
    allowed, shape = mask.allow(grid), (len(tiles.b), TILE, TILE)
    return allowed if allowed.shape == shape else np.array(np.broadcast_to(allowed, shape))


def on_host(array: Any) -> np.ndarray:
    """What lifts an array into a NumPy grid."""
    return array.host() if isinstance(array, Held) else array


def compact(codes: np.ndarray) -> np.ndarray:
    """Codes renumbered from 0 without gaps."""
    return np.unique(codes, return_inverse=True)[1].reshape(-1)


def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One code for two: equal iff both are."""
    if not len(a):
        return a
    if (int(a.max()) + 1) * (int(b.max()) + 1) >= 1 << 62:
        a, b = compact(a), compact(b)
    return a * (b.max() + 1) + b


@cover.register
def _(mask: Combination, tiling: Tiling, heads: np.ndarray) -> Cover:
    table = AND if isinstance(mask, And) else OR
    whole = cover(mask.masks[0], tiling, heads)
    for other in mask.masks[1:]:
        part = cover(other, tiling, heads)
        size = max(whole.batch, part.batch), max(whole.heads, part.heads)
        whole = Cover(combine(whole.spread(*size), part.spread(*size), table), *size)
    return whole


@keys.register
def _(mask: Combination, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    codes = keys(mask.masks[0], tiling, tiles)
    for other in mask.masks[1:]:
        codes = pair(codes, keys(other, tiling, tiles))
    return codes


@look.register
def _(mask: Combination, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    join = np.logical_and if isinstance(mask, And) else np.logical_or
    allowed = look(mask.masks[0], tiling, tiles)
    for other in mask.masks[1:]:
        join(allowed, look(other, tiling, tiles), out=allowed)
    return allowed


@cover.register
def _(mask: Not, tiling: Tiling, heads: np.ndarray) -> Cover:
    inner = cover(mask.mask, tiling, heads)
    return inner._replace(line=invert(inner.line))


@keys.register
def _(mask: Not, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    return keys(mask.mask, tiling, tiles)


@look.register
def _(mask: Not, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    return ~look(mask.mask, tiling, tiles)


@cover.register
def _(mask: PerHead, tiling: Tiling, heads: np.ndarray) -> Cover:
    parts = [cover(mask.masks[h], tiling, heads[k : k + 1]) for k, h in enumerate(heads)]
    batch = max(part.batch for part in parts)
    by_head = concatenate([part.spread(batch, 1) for part in parts])
    source = np.arange(len(parts) * batch).reshape(len(parts), batch).T.reshape(-1)
    return Cover(take_planes(by_head, source, tiling.rows * tiling.columns), batch, len(parts))


@keys.register
def _(mask: PerHead, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    codes = np.zeros(len(tiles.b), np.int64)
    for h in np.unique(tiles.h):
        at = np.flatnonzero(tiles.h == h)
        codes[at] = compact(keys(mask.masks[h], tiling, tiles[at])) + 1
    return pair(codes, tiles.h)


@look.register
def _(mask: PerHead, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    allowed = np.empty((len(tiles.b), TILE, TILE), np.bool_)
    for h in np.unique(tiles.h):
        at = np.flatnonzero(tiles.h == h)
        allowed[at] = look(mask.masks[h], tiling, tiles[at])
    return allowed


def _rows_line(edges: np.ndarray, states: list[int], tiling: Tiling) -> Line:
    """A line from per-row edges [rows…, E] of columns, sorted along E, each row EMPTY before its first edge."""
    columns = tiling.columns
    flat = edges.reshape(-1, edges.shape[-1]).clip(0, columns)
    count = len(flat)
    flat = np.concatenate((np.zeros((count, 1), np.int64), flat), axis=1) + np.arange(count)[:, None] * columns
    return from_edges(flat.reshape(-1), np.tile(np.array([EMPTY, *states], np.uint8), count), count * columns)


@cover.register
def _(mask: Diagonal, tiling: Tiling, heads: np.ndarray) -> Cover:
    del heads
    batch = tiling.batch(mask)
    low, high = _bounds(mask, batch)
    offsets = np.broadcast_to(tiling.offsets, batch)
    # Tile (t, c) holds the distances 128·(c − t) − offset ± 127. Edges below are values of c − t.
    near = TILE - 1
    first = -((near - low - offsets) // TILE)
    stop = (high + near + offsets) // TILE + 1
    full_first = -((-near - low - offsets) // TILE)
    full_stop = (high - near + offsets) // TILE + 1
    none_full = (full_first >= full_stop) | (mask.step > 1)
    full_first, full_stop = np.where(none_full, stop, full_first), np.where(none_full, stop, full_stop)
    turns = np.stack((first, full_first, full_stop, stop), axis=-1)
    turns = np.maximum.accumulate(turns, axis=-1)
    edges = turns[:, None] + np.arange(tiling.rows)[None, :, None]
    return Cover(_rows_line(edges, [UNDECIDED, FULL, UNDECIDED, EMPTY], tiling), batch, 1)


def _bounds(mask: Diagonal, batch: int) -> tuple[np.ndarray, np.ndarray]:
    bounds = [mask.bounds(b) for b in range(mask.batch)]
    low = np.array([-_FAR if low is None else low for low, _ in bounds])
    high = np.array([_FAR if high is None else high for _, high in bounds])
    return np.broadcast_to(low, batch), np.broadcast_to(high, batch)


@keys.register
def _(mask: Diagonal, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    batch = tiling.batch(mask)
    low, high = _bounds(mask, batch)
    b = tiles.b if batch > 1 else np.zeros_like(tiles.b)
    distance = TILE * (tiles.c - tiles.t) - tiling.offset(tiles)
    below = (low[b] - distance).clip(1 - TILE, TILE) + TILE - 1
    above = (high[b] - distance).clip(-TILE, TILE - 1) + TILE
    return (below * (2 * TILE) + above) * mask.step + distance % mask.step


@cover.register
def _(mask: Prefix, tiling: Tiling, heads: np.ndarray) -> Cover:
    del heads
    edges = np.array([0, mask.n // TILE, -(-mask.n // TILE)], np.int64)
    return Cover(_rows_line(np.tile(edges, (tiling.rows, 1)), [FULL, UNDECIDED, EMPTY], tiling), 1, 1)


@keys.register
def _(mask: Prefix, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    del tiling
    return (mask.n - TILE * tiles.c).clip(0, TILE)


@cover.register
def _(mask: Tree, tiling: Tiling, heads: np.ndarray) -> Cover:
    del heads
    n, offsets = tiling.frame.n, tiling.offsets[:, None]
    row = np.arange(tiling.rows) * TILE
    first, last = offsets + row, offsets + np.minimum(row + TILE, n) - 1
    context = offsets + n - mask.parents.shape[0]
    edges = np.stack((np.zeros_like(first), np.minimum(context, first + 1) // TILE, last // TILE + 1), axis=-1)
    edges = np.maximum.accumulate(edges, axis=-1)
    return Cover(_rows_line(edges, [FULL, UNDECIDED, EMPTY], tiling), len(offsets), 1)


@keys.register
def _(mask: Tree, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    near = (TILE * (tiles.c - tiles.t) - tiling.offset(tiles)).clip(-TILE, TILE) + TILE
    causal = tiles.t * TILE + TILE <= tiling.frame.n - mask.parents.shape[0]
    return np.where(causal, near, 2 * TILE + 1 + place(tiles, tiling))


def place(tiles: Tiles, tiling: Tiling) -> np.ndarray:
    """A number of its own for each (sequence, row tile, column tile)."""
    return (tiles.b * tiling.rows + tiles.t) * tiling.columns + tiles.c
