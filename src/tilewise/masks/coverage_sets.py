"""Cover and keys (coverage.py) of the masks that are sets of tokens, blocks, documents or bits, not formulas."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tilewise.masks.arrays import Held
from tilewise.masks.coverage import TILE, Cover, Tiles, Tiling, compact, cover, keys, look, pair, place
from tilewise.masks.lines import (
    EMPTY,
    FULL,
    OR,
    UNDECIDED,
    Line,
    combine,
    constant,
    from_edges,
    from_intervals,
    ranges,
    take_planes,
)
from tilewise.masks.sets import Dense, Documents, Global, Random, RandomTokens


def _units(places: np.ndarray, states: np.ndarray | int, length: int) -> Line:
    """A line of single tiles at sorted, distinct `places`."""
    edges = np.stack((places, places + 1), axis=1).reshape(-1)
    state = np.stack((np.broadcast_to(states, places.shape), np.full_like(places, EMPTY)), axis=1).reshape(-1)
    return from_edges(edges, state, length)


def _each_row(row: Line, count: int) -> Line:
    """The same row of tiles `count` times."""
    return take_planes(row, np.zeros(count, np.int64), row.length)


class _TokenTiles(NamedTuple):
    """Tiles that hold tokens: their number on the axis (sorted), whether all 128 places are tokens, and a number that
    is equal for tiles with tokens at equal places."""

    tile: np.ndarray
    full: np.ndarray
    pattern: np.ndarray


def _token_tiles(positions: np.ndarray) -> _TokenTiles:
    tile, at = np.unique(positions // TILE, return_inverse=True)
    bits = np.zeros((len(tile), TILE), np.bool_)
    bits[at.reshape(-1), positions % TILE] = True
    packed = np.packbits(bits, axis=1)
    pattern = np.unique(packed, axis=0, return_inverse=True)[1].reshape(-1) + 1 if len(tile) else tile
    return _TokenTiles(tile, np.all(bits, axis=1), pattern)


def _global_tiles(mask: Global, tiling: Tiling) -> tuple[_TokenTiles, _TokenTiles]:
    """Tokens by row tile (sequences one after another) and by column tile."""

    def work_out() -> tuple[_TokenTiles, _TokenTiles]:
        tokens, reach = np.array(mask.tokens, np.int64), tiling.rows * TILE
        row = tokens - tiling.offsets[:, None]
        inside = (row >= 0) & (row < reach)
        rows = (row + np.arange(len(row))[:, None] * reach)[inside]
        return _token_tiles(rows), _token_tiles(tokens)

    return tiling.remember(mask, "tokens", work_out)


@cover.register
def _(mask: Global, tiling: Tiling, heads: np.ndarray) -> Cover:
    del heads
    rows, columns = _global_tiles(mask, tiling)
    batch = len(tiling.offsets)
    seen = _units(columns.tile, np.where(columns.full, FULL, UNDECIDED), tiling.columns)
    sees = _units(rows.tile, np.where(rows.full, FULL, UNDECIDED), batch * tiling.rows)
    sees = Line(sees.edges * tiling.columns, sees.state, sees.length * tiling.columns)
    return Cover(combine(_each_row(seen, batch * tiling.rows), sees, OR), batch, 1)


@keys.register
def _(mask: Global, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    rows, columns = _global_tiles(mask, tiling)
    by_row = np.zeros(len(tiling.offsets) * tiling.rows, np.int64)
    by_row[rows.tile] = rows.pattern
    by_column = np.zeros(tiling.columns, np.int64)
    by_column[columns.tile] = columns.pattern
    return pair(by_row[(tiles.b if len(tiling.offsets) > 1 else 0) * tiling.rows + tiles.t], by_column[tiles.c])


_FEWEST = 16
"""Random blocks smaller than this make more patterns in a tile than there are tiles to share them."""


class _Blocks(NamedTuple):
    """The draw of a Random mask: `chosen[k, head, first row + …]`, its block rows counted from `first`."""

    chosen: np.ndarray
    first: int


def _random_blocks(mask: Random, tiling: Tiling) -> _Blocks:
    def work_out() -> _Blocks:
        first = int(tiling.offsets.min()) // mask.block
        last = (int(tiling.offsets.max()) + tiling.rows * TILE - 1) // mask.block
        heads = np.arange(tiling.frame.heads if mask.per_head else 1)[:, None]
        row = np.arange(first, last + 1) + 0 * heads
        return _Blocks(np.array(mask.draw(np, row, heads, tiling.frame.m)).reshape(-1, *row.shape), first)

    return tiling.remember(mask, "blocks", work_out)


@cover.register
def _(mask: Random, tiling: Tiling, heads: np.ndarray) -> Cover:
    chosen, first_row = _random_blocks(mask, tiling)
    heads = heads if mask.per_head else np.zeros(1, np.int64)
    top = tiling.offsets[:, None] + np.arange(tiling.rows) * TILE
    batch, columns = len(top), tiling.columns
    base = (np.arange(batch)[:, None] * len(heads) + np.arange(len(heads)))[..., None] * tiling.rows
    base = (base + np.arange(tiling.rows)) * columns
    starts, stops, states = [], [], []

    def put(start: np.ndarray, stop: np.ndarray, state: int) -> None:
        start, stop = start.clip(0, columns), stop.clip(0, columns)
        some = start < stop
        starts.append((start + base)[some])
        stops.append((stop + base)[some])
        states.append(np.full(int(some.sum()), state, np.int64))

    block, top_row, bottom_row = mask.block, top // mask.block, (top + TILE - 1) // mask.block
    for step in range(int((bottom_row - top_row).max()) + 1):
        row = np.minimum(top_row + step, bottom_row) - first_row
        for choice in chosen:
            left = choice[heads][:, row].swapaxes(0, 1) * block
            put(left // TILE, (left + block - 1) // TILE + 1, UNDECIDED)
            if block >= TILE and step == 0:
                within = (top_row == bottom_row)[:, None]
                put(-(-left // TILE), np.where(within, (left + block) // TILE, 0), FULL)
    length = batch * len(heads) * tiling.rows * columns
    if not starts:
        return Cover(_units(np.zeros(0, np.int64), EMPTY, length), batch, len(heads))
    line = from_intervals(np.concatenate(starts), np.concatenate(stops), np.concatenate(states), length)
    return Cover(line, batch, len(heads))


@keys.register
def _(mask: Random, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    chosen, first_row = _random_blocks(mask, tiling)
    block = mask.block
    if block < _FEWEST:
        return place(tiles, tiling) * tiling.frame.heads + tiles.h
    top, left = tiling.offset(tiles) + tiles.t * TILE, tiles.c * TILE
    # Where, in the tile, the second block row and block column begin; the others follow every `block`.
    second_row, second_column = block - top % block, block - left % block
    codes = pair(second_row.clip(max=TILE), second_column.clip(max=TILE))
    head = tiles.h if mask.per_head else np.zeros_like(tiles.h)
    for r in range((TILE - 2) // block + 2):
        inside_row = (r == 0) | (second_row + (r - 1) * block < TILE)
        row = np.where(inside_row, top // block + r - first_row, 0)
        bits = np.zeros_like(top)
        picked = chosen[:, head, row]
        for c in range((TILE - 2) // block + 2):
            inside = inside_row & ((c == 0) | (second_column + (c - 1) * block < TILE))
            bits = bits * 2 + (inside & (picked == left // block + c).any(axis=0))
        codes = pair(codes, bits)
    return codes


@cover.register
def _(mask: RandomTokens, tiling: Tiling, heads: np.ndarray) -> Cover:
    heads = heads if mask.per_head else np.zeros(1, np.int64)
    batch = len(tiling.offsets)
    p = (tiling.offsets[:, None] + np.arange(tiling.rows * TILE))[:, None, :]
    row = (np.arange(batch)[:, None] * len(heads) + np.arange(len(heads)))[..., None] * tiling.rows
    row = row + np.arange(tiling.rows * TILE) // TILE
    length = batch * len(heads) * tiling.rows * tiling.columns
    if mask.n * TILE >= tiling.columns:
        return Cover(constant(length, UNDECIDED), batch, len(heads))
    places = np.zeros(0, np.int64)
    for chosen in mask.draw(np, p, heads[:, None], tiling.frame.m):
        places = np.union1d(places, row * tiling.columns + chosen // TILE)
    return Cover(_units(places, UNDECIDED, length), batch, len(heads))


@keys.register
def _(mask: RandomTokens, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    return place(tiles, tiling) * tiling.frame.heads + (tiles.h if mask.per_head else 0)


@look.register
def _(mask: RandomTokens, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    # The few chosen keys are written into empty tiles, instead of every pair compared with every choice.
    p = tiles.t[:, None] * TILE + np.arange(TILE) + tiling.offset(tiles)[:, None]
    allowed = np.zeros((len(tiles.b), TILE, TILE), np.bool_)
    for chosen in mask.draw(np, p, tiles.h[:, None], tiling.frame.m):
        column = chosen - tiles.c[:, None] * TILE
        k, i = np.nonzero((column >= 0) & (column < TILE))
        allowed[k, i, column[k, i]] = True
    return allowed


class _Axis(NamedTuple):
    """Which ids stand in which tiles of one axis, by (sequence, tile) and then id.

    `pattern` is equal where an id stands at equal places of a tile; `_WHOLE` is all 128 of them.
    """

    tile: np.ndarray
    id: np.ndarray
    pattern: np.ndarray
    distinct: np.ndarray
    """The number of distinct ids in each (sequence, tile)."""


_WHOLE = TILE  # the pattern of one stretch of 128 ids from place 0
_STRETCHES = TILE * (TILE + 1)


def _stretches(ids: np.ndarray, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stretches of equal ids [batch, length] within tiles: (id, (sequence, tile), start·129 + size) of each.

    The last stretch of a sequence goes on to its tile's end, as the predicate does.
    """
    begins = np.ones(ids.shape, np.bool_)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins[:, ::TILE] = True
    b, i = np.nonzero(begins)
    stop = np.append(i[1:], 0)
    stop = np.where(stop == 0, tiles * TILE, stop)
    return ids[b, i], b * tiles + i // TILE, i % TILE * (TILE + 1) + stop - i


def _axis(ids: np.ndarray, tile: np.ndarray, stretch: np.ndarray, tiles: int) -> _Axis:
    code = tile * (int(ids.max(initial=0)) + 1) + ids
    if (code[1:] > code[:-1]).all():
        pattern = stretch
    else:
        order = np.argsort(code, kind="stable")
        first = np.append(True, code[order][1:] != code[order][:-1])
        several = np.append(~first[1:], False)[first]
        at = order[first]
        # An id that stands in several stretches of a tile gets a pattern of its own.
        pattern = np.where(several, _STRETCHES + np.arange(len(at)), stretch[at])
        tile, ids = tile[at], ids[at]
    return _Axis(tile, ids, pattern, np.bincount(tile, minlength=tiles))


def _document_axes(mask: Documents, tiling: Tiling) -> tuple[_Axis, _Axis]:
    def work_out() -> tuple[_Axis, _Axis]:
        def of(held: Held, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            ids = np.atleast_2d(held.host())
            return _stretches(np.broadcast_to(ids, (mask.batch, ids.shape[1])), tiles)

        rows = of(mask.q_ids, tiling.rows)
        columns = rows if mask.k_ids is mask.q_ids else of(mask.k_ids, tiling.columns)
        numbers = compact(np.concatenate((rows[0], columns[0])))
        r, c = numbers[: len(rows[0])], numbers[len(rows[0]) :]
        by_row = _axis(r, *rows[1:], mask.batch * tiling.rows)
        return by_row, by_row if rows is columns else _axis(c, *columns[1:], mask.batch * tiling.columns)

    return tiling.remember(mask, "ids", work_out)


@cover.register
def _(mask: Documents, tiling: Tiling, heads: np.ndarray) -> Cover:
    del heads
    rows, columns = _document_axes(mask, tiling)
    count = int(max(rows.id.max(initial=0), columns.id.max(initial=0))) + 1
    # Neighbouring column tiles that hold an id alike make one interval of it.
    b, c = columns.tile // tiling.columns, columns.tile % tiling.columns
    whole = columns.pattern == _WHOLE
    by_id = np.argsort((b * count + columns.id) * tiling.columns + c)
    code, c, whole = (b * count + columns.id)[by_id], c[by_id], whole[by_id]
    joined = (code[1:] == code[:-1]) & (c[1:] == c[:-1] + 1) & (whole[1:] == whole[:-1])
    first = np.flatnonzero(np.append(True, ~joined))
    start, stop = c[first], c[np.append(first[1:], len(c)) - 1] + 1
    code, whole = code[first], whole[first]
    wanted = rows.tile // tiling.rows * count + rows.id
    low, high = np.searchsorted(code, wanted, side="left"), np.searchsorted(code, wanted, side="right")
    at = ranges(low, high - low)
    row = np.repeat(rows.tile, high - low) * tiling.columns
    full = np.repeat(rows.pattern == _WHOLE, high - low) & whole[at]
    length = mask.batch * tiling.rows * tiling.columns
    line = from_intervals(row + start[at], row + stop[at], np.where(full, FULL, UNDECIDED), length)
    return Cover(line, mask.batch, 1)


@keys.register
def _(mask: Documents, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    rows, columns = _document_axes(mask, tiling)
    b = tiles.b if mask.batch > 1 else np.zeros_like(tiles.b)
    row, column = b * tiling.rows + tiles.t, b * tiling.columns + tiles.c
    lone_row, lone_column = rows.distinct[row] == 1, columns.distinct[column] == 1
    # Where one side holds a single id, the tile's bits are the places of that id on both sides.
    only = np.where(lone_row, _first_id(rows)[row], _first_id(columns)[column])
    codes = pair(_pattern_of(rows, row, only), _pattern_of(columns, column, only))
    unlike = b * (tiling.rows * tiling.columns) + tiles.t * tiling.columns + tiles.c
    lone = lone_row | lone_column
    return np.where(lone, codes * 2, unlike * 2 + 1)


@look.register
def _(mask: Documents, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    def narrow() -> tuple[np.ndarray, np.ndarray]:
        # Comparing millions of pairs takes as long as the ids are wide.
        rows, columns = (np.atleast_2d(held.host()) for held in (mask.q_ids, mask.k_ids))
        low, high = min(rows.min(), columns.min()), max(rows.max(), columns.max())
        kind = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
        return rows.astype(kind), columns.astype(kind)

    def part(ids: np.ndarray, tile: np.ndarray) -> np.ndarray:
        at = (tile[:, None] * TILE + np.arange(TILE)).clip(max=ids.shape[1] - 1)
        return ids[tiles.b[:, None] if len(ids) > 1 else 0, at]

    rows, columns = tiling.remember(mask, "narrow", narrow)
    return part(rows, tiles.t)[:, :, None] == part(columns, tiles.c)[:, None, :]


def _first_id(axis: _Axis) -> np.ndarray:
    """The least id of each (sequence, tile)."""
    return axis.id[np.cumsum(axis.distinct) - axis.distinct]


def _pattern_of(axis: _Axis, tile: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """1 + the pattern of id `wanted` in each tile, 0 where it does not stand there."""
    base = int(max(axis.id.max(), wanted.max(initial=0))) + 1
    code, sought = axis.tile * base + axis.id, tile * base + wanted
    at = np.searchsorted(code, sought).clip(max=len(code) - 1)
    return np.where(code[at] == sought, axis.pattern[at] + 1, 0)


def _dense_words(mask: Dense, tiling: Tiling) -> np.ndarray:
    """The content as bits: uint8 [1|B, 1|H, row tiles, 1|128, column tiles, 1|16], zero beyond the last row and key.

    A broadcast dimension stays 1 in tiles, and its tiles are then filled with the one row or column.
    """

    def work_out() -> np.ndarray:
        b, h, n, m = mask.shape
        content = mask.content.host().reshape(b, h, n, m)
        if m == 1:
            content = np.broadcast_to(content, (b, h, n, min(TILE, tiling.frame.m)))
        packed = np.packbits(content, axis=-1, bitorder="little")
        columns, rows = -(-content.shape[-1] // TILE), -(-n // TILE)
        if n == 1:
            packed = np.broadcast_to(packed, (b, h, TILE, packed.shape[-1]))
        words = np.zeros((b, h, rows * TILE, columns * (TILE // 8)), np.uint8)
        words[:, :, : packed.shape[2], : packed.shape[3]] = packed
        return words.reshape(b, h, rows, TILE, columns, TILE // 8)

    return tiling.remember(mask, "words", work_out)


@cover.register
def _(mask: Dense, tiling: Tiling, heads: np.ndarray) -> Cover:
    words = _dense_words(mask, tiling)
    if words.shape[1] > 1:
        words = words[:, heads]
    b, h, rows, _, columns, _ = words.shape
    state = np.where(words.any(axis=(3, 5)), np.where((words == 255).all(axis=(3, 5)), FULL, UNDECIDED), EMPTY)
    width = tiling.columns // columns
    line = from_edges(np.arange(state.size) * width, state.reshape(-1), state.size * width)
    if rows == 1:
        line = take_planes(line, np.repeat(np.arange(b * h), tiling.rows), tiling.columns)
    return Cover(line, b, h)


@keys.register
def _(mask: Dense, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    shape = _dense_words(mask, tiling).shape
    at = _dense_at(shape, tiles)
    return ((at[0] * shape[1] + at[1]) * shape[2] + at[2]) * shape[4] + at[3]


def _dense_at(shape: tuple[int, ...], tiles: Tiles) -> tuple[Any, ...]:
    """Where each tile lies in `_dense_words`, a broadcast dimension at 0."""
    axes = zip((shape[0], shape[1], shape[2], shape[4]), tiles, strict=True)
    return tuple(index if size > 1 else np.zeros_like(index) for size, index in axes)


@look.register
def _(mask: Dense, tiling: Tiling, tiles: Tiles) -> np.ndarray:
    words = _dense_words(mask, tiling)
    b, h, t, c = _dense_at(words.shape, tiles)
    return np.unpackbits(words[b, h, t, :, c], axis=-1, bitorder="little").view(np.bool_)
