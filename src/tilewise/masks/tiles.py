"""A tile map as a mask: what BlockMasks and users' own maps become, to combine and to attend with."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from tilewise.errors import bad_value
from tilewise.masks.arrays import Held
from tilewise.masks.coverage import TILE, Cover, Tiles, Tiling, cover, keys, look
from tilewise.masks.frame import Grid
from tilewise.masks.lines import FULL, UNDECIDED, from_intervals
from tilewise.masks.patterns import Pattern, placeholder
from tilewise.masks.tilemap import TileMap, unpack

_HEAD = 7
_ARRAYS = ("run_ptr", "run_start", "run_stop", "part_ptr", "part_col", "part_id")


class FromTiles(Pattern):
    """The pairs of a tile map, by query row i and key j whatever the position of the row.

    It fits the map's own n and m only. Made from a `TileMap`, or from the integers that another one was written to
    (`$0` of its expression).
    """

    name = "tiles"
    content: Held

    def __init__(self, content: Any) -> None:
        held = Held.integers(_write(content) if isinstance(content, TileMap) else content, "content", (1,))
        self._set(content=held)
        self._set(batch=self.map.batch, heads=self.map.heads if self.map.heads > 1 else None)

    @cached_property
    def _map(self) -> TileMap:
        return _read(self.content.host())

    @property
    def map(self) -> TileMap:
        return self._map

    def check(self, n: int, m: int) -> None:
        if (n, m) != (self.map.n, self.map.m):
            raise bad_value("content", f"a tile map of {self.map.n} rows and {self.map.m} keys", f"{n} and {m}")

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """For the plain predicate: the entry of each tile [R, k_tiles], and the entries (0 empty, 1 full) as words."""
        tiles = self.map
        words = np.zeros((len(tiles.bits) + 2, TILE, TILE // 32), np.int64)
        words[1], words[2:] = 0xFFFFFFFF, tiles.bits
        return tiles.grid().astype(np.int64), words

    def allow(self, grid: Grid) -> Any:
        entry, words = (grid.lift(array) for array in self._table)
        plane = (grid.b if self.map.batch > 1 else 0) * self.map.heads + (grid.h if self.map.heads > 1 else 0)
        tile = entry[plane * self.map.q_tiles + grid.i // TILE, grid.j // TILE]
        return (words[tile, grid.i % TILE, grid.j % TILE // 32] >> (grid.j % 32)) & 1 == 1

    def _parameters(self, arrays: list[Held]) -> list[str]:
        return [placeholder(self.content, arrays)]


def _write(tiles: TileMap) -> np.ndarray:
    head = [tiles.n, tiles.m, tiles.batch, tiles.heads, len(tiles.run_start), len(tiles.part_col), len(tiles.bits)]
    return np.concatenate((head, *(getattr(tiles, name) for name in _ARRAYS), tiles.bits.reshape(-1))).astype(np.int64)


def _read(content: np.ndarray) -> TileMap:
    wrong = bad_value("content", f"{len(content)} integers", "a tile map as it was written", "make it from a `TileMap`")
    if len(content) < _HEAD or (content[:_HEAD] < 0).any():
        raise wrong
    n, m, batch, heads, runs, parts, entries = content[:_HEAD].tolist()
    rows, columns = batch * heads * -(-n // TILE), -(-m // TILE)
    lengths = [rows + 1, runs, runs, rows + 1, parts, parts, entries * TILE * (TILE // 32)]
    if len(content) != _HEAD + sum(lengths):
        raise wrong
    *arrays, bits = np.split(content[_HEAD:], np.cumsum(lengths)[:-1])
    run_ptr, start, stop, part_ptr, column, entry = arrays
    pointers = ((run_ptr, runs), (part_ptr, parts))
    fits = all(ptr[0] == 0 and ptr[-1] == size and (np.diff(ptr) >= 0).all() for ptr, size in pointers)
    fits = fits and (start >= 0).all() and (start < stop).all() and (stop <= columns).all()
    if not fits or (column < 0).any() or (column >= columns).any() or (entry < 0).any() or (entry >= entries).any():
        raise bad_value("content", "pointers, columns or entries out of range", "a tile map as it was written")
    words = bits.astype(np.uint32).reshape(entries, TILE, TILE // 32)
    return TileMap(n, m, m - n, batch, heads, *(array.astype(np.int32) for array in arrays), bits=words)


@cover.register
def _(mask: FromTiles, tiling: Tiling, heads: np.ndarray) -> Cover:
    del heads
    tiles, columns = mask.map, tiling.columns
    row, start, count = tiles.runs()
    begin, part = row * columns + start, tiles.part_rows() * columns + tiles.part_col
    starts, stops = np.concatenate((begin, part)), np.concatenate((begin + count, part + 1))
    states = np.repeat([FULL, UNDECIDED], [len(row), len(part)])
    return Cover(from_intervals(starts, stops, states, tiles.rows * columns), tiles.batch, tiles.heads)


def _entries(mask: FromTiles, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    """Of each tile: 0 if it is empty, 1 if full, else 2 + its entry."""
    own = mask.map
    b = tiles.b if own.batch > 1 else np.zeros_like(tiles.b)
    h = tiles.h if own.heads > 1 else np.zeros_like(tiles.h)
    wanted = ((b * own.heads + h) * tiling.rows + tiles.t) * tiling.columns + tiles.c
    row, start, count = own.runs()
    places = tiling.remember(mask, "places", lambda: own.part_rows() * tiling.columns + own.part_col)
    begin, end = row * tiling.columns + start, row * tiling.columns + start + count
    run = np.searchsorted(begin, wanted, side="right") - 1
    entry = np.zeros(len(wanted), np.int64)
    if len(row):
        entry[(run >= 0) & (wanted < end[run])] = 1
    if len(places):
        at = np.searchsorted(places, wanted).clip(max=len(places) - 1)
        entry = np.where(places[at] == wanted, own.part_id[at] + 2, entry)
    return entry


@keys.register
def _(mask: FromTiles, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    return _entries(mask, tiling, tiles)


@look.register
def _(mask: FromTiles, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    entry = _entries(mask, tiling, tiles)
    allowed = np.repeat(entry == 1, TILE * TILE).reshape(-1, TILE, TILE)
    partial = entry > 1
    allowed[partial] = unpack(mask.map.bits[entry[partial] - 2])
    return allowed
