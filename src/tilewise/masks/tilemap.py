"""A mask as tiles of 128×128: for each row of tiles the runs of full tiles and the partial ones, and their transpose.

compiler.py makes tile maps from masks; kernels walk them (tensors.py carries them to a device).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tilewise.masks.coverage import TILE
from tilewise.masks.lines import (
    AND,
    EMPTY,
    FULL,
    OR,
    Line,
    combine,
    from_edges,
    invert,
    ranges,
    split_rows,
    transpose_full,
)


@dataclass(frozen=True, eq=False)
class TileMap:
    """A mask compiled for n query rows and m keys. All arrays are NumPy.

    Row `r = (b·heads + h)·q_tiles + t` is row tile t (rows 128·t …) of sequence b and head h; `batch` and `heads` are 1
    where the mask does not tell them apart. Column tile c holds keys 128·c ….

    - Full tiles of row r: the half-open ranges `[run_start[k], run_stop[k])` of column tiles for k in
      `run_ptr[r] … run_ptr[r + 1]`, in order, maximal (neighbours never touch). All their keys are below m.
    - Partial tiles of row r: columns `part_col[k]`, ascending, and entries `part_id[k]` of `bits`, for k in
      `part_ptr[r] … part_ptr[r + 1]`.
    - `bits[id, i, w]`: bit k of word w is the pair (row i, column 32·w + k) of the tile; 1 = may attend.

    Tiles in neither list are empty. The last column tile, if m is no multiple of 128, is always partial, with the bits
    from m on cleared, so a kernel needs no bounds logic for keys. Rows from n on do not count: a tile that is full on
    the rows below n is full; their bits in partial tiles are 0. `bits` has no two equal entries, and they stand in the
    order of first use, so equal masks have equal arrays.
    """

    n: int
    m: int
    offset: int | tuple[int, ...]
    """Position of query row 0 among the keys (one a sequence, if a tuple); in a transposed map its negative."""
    batch: int
    heads: int
    run_ptr: np.ndarray
    """int32 [R + 1]."""
    run_start: np.ndarray
    """int32 [runs]."""
    run_stop: np.ndarray
    """int32 [runs]."""
    part_ptr: np.ndarray
    """int32 [R + 1]."""
    part_col: np.ndarray
    """int32 [partial]."""
    part_id: np.ndarray
    """int32 [partial]."""
    bits: np.ndarray
    """uint32 [distinct, 128, 4]."""

    @property
    def q_tiles(self) -> int:
        return -(-self.n // TILE)

    @property
    def k_tiles(self) -> int:
        return -(-self.m // TILE)

    @property
    def rows(self) -> int:
        """R = batch·heads·q_tiles."""
        return self.batch * self.heads * self.q_tiles

    @property
    def full_tiles(self) -> int:
        return int((self.run_stop.astype(np.int64) - self.run_start).sum())

    @property
    def partial_tiles(self) -> int:
        return len(self.part_col)

    @property
    def total_tiles(self) -> int:
        return self.rows * self.k_tiles

    @property
    def skipped_tiles(self) -> int:
        return self.total_tiles - self.full_tiles - self.partial_tiles

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, the transposed map not included."""
        return sum(value.nbytes for value in self.__dict__.values() if isinstance(value, np.ndarray))

    @cached_property
    def visible(self) -> int:
        """How many of the batch·heads·n·m pairs may attend."""
        before = np.append(0, np.cumsum(self.run_stop.astype(np.int64) - self.run_start))
        per_row = np.diff(before[self.run_ptr])
        height = np.minimum(TILE, self.n - TILE * (np.arange(self.rows) % max(1, self.q_tiles)))
        ones = np.bitwise_count(self.bits).sum(axis=(1, 2), dtype=np.int64)
        return int((per_row * height).sum()) * TILE + int(ones[self.part_id].sum())

    @property
    def sparsity(self) -> float:
        """The fraction of pairs that may not attend."""
        pairs = self.batch * self.heads * self.n * self.m
        return 1.0 - self.visible / pairs if pairs else 0.0

    def runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, first column tile, length) of each run of full tiles."""
        row = np.repeat(np.arange(self.rows), np.diff(self.run_ptr))
        start = self.run_start.astype(np.int64)
        return row, start, self.run_stop - start

    def part_rows(self) -> np.ndarray:
        """The row of each partial tile."""
        return np.repeat(np.arange(self.rows), np.diff(self.part_ptr))

    def grid(self) -> np.ndarray:
        """int32 [R, k_tiles]: 0 where a tile is empty, 1 where it is full, else 2 + its entry in `bits`. O(tiles²)."""
        tiles = np.zeros((self.rows, self.k_tiles), np.int32)
        row, start, count = self.runs()
        tiles[np.repeat(row, count), ranges(start, count)] = 1
        tiles[self.part_rows(), self.part_col] = self.part_id + 2
        return tiles

    def to_dense(self) -> np.ndarray:
        """bool [batch, heads, n, m]; for tests and pictures, N×M bytes."""
        shape = (self.batch, self.heads, self.q_tiles, self.k_tiles)
        tiles = unpack(np.concatenate((_EMPTY_AND_FULL, self.bits)))[self.grid().reshape(shape)].swapaxes(3, 4)
        matrix = tiles.reshape(*shape[:2], self.q_tiles * TILE, self.k_tiles * TILE)
        return matrix[:, :, : self.n, : self.m]

    def transpose(self) -> TileMap:
        """The map of the transposed mask, for dK and dV: row tiles of keys, and for each the query tiles that see it.

        n and m change places, and with them the rules for the last row and column: now the last *query* tile is
        partial where n is no multiple of 128. Worked out once and kept.
        """
        return self._transposed

    @cached_property
    def _transposed(self) -> TileMap:
        negative = -self.offset if isinstance(self.offset, int) else tuple(-offset for offset in self.offset)
        if not self.total_tiles:
            return nothing(self.m, self.n, negative, self.batch, self.heads)
        planes, rows, columns = self.batch * self.heads, self.q_tiles, self.k_tiles
        row, start, count = self.runs()
        begin = row * columns + start
        edges = np.stack((begin, begin + count), axis=1).reshape(-1)
        full = from_edges(edges, np.tile(np.array([FULL, EMPTY], np.uint8), len(row)), planes * rows * columns)
        place = self.part_rows() * columns + self.part_col
        ids = self.part_id.astype(np.int64)
        if self.m % TILE:
            # A last column tile that lacks only the keys from m on is full once keys are rows. (Not so in the last row,
            # if that lacks rows too: it will be a last column then, and stays partial.)
            lacks_none = (self.bits == area(self.n, self.m, bottom=False, end=True)).all(axis=(1, 2))
            filled = (place % columns == columns - 1) & lacks_none[ids]
            full = combine(full, units(place[filled], full.length), OR)
            place, ids = place[~filled], ids[~filled]
        plane = rows * columns
        place = (place // plane * columns + place % columns) * rows + place % plane // columns
        place, ids = _sorted(place, ids, len(self.bits))
        bits = transpose_bits(self.bits)
        full = transpose_full(full, planes, rows, columns)
        return assemble((self.m, self.n, negative, self.batch, self.heads), full, place, ids, bits)


_EMPTY_AND_FULL = np.repeat(np.array([0, 0xFFFFFFFF], np.uint32), TILE * TILE // 32).reshape(2, TILE, TILE // 32)

Sizes = tuple[int, int, int | tuple[int, ...], int, int]
"""n, m, offset, batch and heads of a tile map."""


def nothing(n: int, m: int, offset: int | tuple[int, ...], batch: int, heads: int) -> TileMap:
    """The map of a problem without rows or without keys."""
    ptr, none = np.zeros(batch * heads * -(-n // TILE) + 1, np.int32), np.zeros(0, np.int32)
    return TileMap(n, m, offset, batch, heads, ptr, none, none, ptr, none, none, np.zeros((0, TILE, 4), np.uint32))


def assemble(sizes: Sizes, full: Line, place: np.ndarray, ids: np.ndarray, bits: np.ndarray) -> TileMap:
    """The canonical map from its tiles.

    Args:
        full: FULL where all pairs below n and m may attend, EMPTY elsewhere.
        place: the partial tiles' places on the line, ascending.
        ids: their entries in `bits`, which are distinct and cleared outside n and m.
    """
    n, m, _, batch, heads = sizes
    rows, columns = -(-n // TILE), -(-m // TILE)
    count = batch * heads * rows
    if m % TILE:
        ends = units(np.arange(count, dtype=np.int64) * columns + columns - 1, full.length)
        starts, stops = combine(full, ends, AND).pieces(FULL)
        cut = ranges(starts, stops - starts)
        full = combine(full, invert(ends), AND)
        bits, plain = _entry(bits, area(n, m, bottom=False, end=True))
        bits, last = _entry(bits, area(n, m, bottom=True, end=True))
        cut_ids = np.where(cut // columns % rows == rows - 1, last, plain)
        place, ids = _sorted(np.append(place, cut), np.append(ids, cut_ids), len(bits))
    used, first, which = distinct(ids)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    row, start, stop = split_rows(*full.pieces(FULL), columns)
    return TileMap(
        *sizes,
        run_ptr=_pointers(row, count),
        run_start=start.astype(np.int32),
        run_stop=stop.astype(np.int32),
        part_ptr=_pointers(place // columns, count),
        part_col=(place % columns).astype(np.int32),
        part_id=rank[which].astype(np.int32),
        bits=bits[used[order]],
    )


def _pointers(row: np.ndarray, count: int) -> np.ndarray:
    return np.append(0, np.cumsum(np.bincount(row, minlength=count))).astype(np.int32)


def _entry(bits: np.ndarray, tile: np.ndarray) -> tuple[np.ndarray, int]:
    """The dictionary with `tile` in it, and where."""
    known = np.flatnonzero((bits == tile).all(axis=(1, 2)))
    return (bits, int(known[0])) if len(known) else (np.concatenate((bits, tile[None])), len(bits))


def _sorted(place: np.ndarray, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Both by place. Sorting one int64 that holds both is several times faster than argsort."""
    both = np.sort(place * max(1, count) + ids)
    return both // max(1, count), both % max(1, count)


def units(places: np.ndarray, length: int) -> Line:
    """A line of single FULL tiles at sorted, distinct `places`."""
    edges = np.stack((places, places + 1), axis=1).reshape(-1)
    return from_edges(edges, np.tile(np.array([FULL, EMPTY], np.uint8), len(places)), length)


def distinct(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct codes (non-negative), the first place of each, and which one each place has."""
    span = int(codes.max(initial=0)) + 1
    if span > max(1 << 16, 4 * len(codes)):
        return np.unique(codes, return_index=True, return_inverse=True)
    # A table is several times faster than a sort; written backwards, so that the first place stays.
    table = np.full(span, -1, np.int64)
    table[codes[::-1]] = np.arange(len(codes))[::-1]
    found = np.flatnonzero(table >= 0)
    first = table[found]
    table[found] = np.arange(len(found))
    return found, first, table[codes]


def pack(tiles: np.ndarray) -> np.ndarray:
    """bool [T, 128, 128] to uint32 [T, 128, 4], bit k of word w for column 32·w + k."""
    return np.packbits(tiles, axis=-1, bitorder="little").view("<u4")


def unpack(bits: np.ndarray) -> np.ndarray:
    """uint32 [T, 128, 4] to bool [T, 128, 128]."""
    return np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), axis=-1, bitorder="little").view(np.bool_)


def transpose_bits(bits: np.ndarray) -> np.ndarray:
    """Each tile of uint32 [T, 128, 4] transposed, by 8×8 bits held in one uint64 (Warren, Hacker's Delight, 7-3)."""
    side, count = TILE // 8, len(bits)
    bytes_ = np.ascontiguousarray(bits).view(np.uint8).reshape(count, side, 8, side)
    x = np.ascontiguousarray(bytes_.transpose(0, 3, 1, 2)).view("<u8")
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swap = (x ^ (x >> np.uint64(shift))) & np.uint64(mask)
        x = x ^ swap ^ (swap << np.uint64(shift))
    turned = x.view(np.uint8).reshape(count, side, side, 8).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(turned).reshape(count, TILE, side).view("<u4")


def area(n: int, m: int, *, bottom: bool, end: bool) -> np.ndarray:
    """The bits below n and m of a tile in the last row (`bottom`) and the last column (`end`): uint32 [128, 4]."""
    tile = np.zeros((1, TILE, TILE), np.bool_)
    tile[0, : (n % TILE or TILE) if bottom else TILE, : (m % TILE or TILE) if end else TILE] = True
    return pack(tile)[0]
