"""From a mask to its tile map, on the host: the analytic encoding.

`cover` (coverage.py) says which tiles are empty, full or undecided; undecided tiles with equal keys are evaluated once;
those that turn out empty or full are moved there; equal bit tiles share one entry of a dictionary. N×M is never formed:
a causal mask over a million tokens costs one evaluated tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import tilewise.masks.coverage_sets  # noqa: F401 - registers its masks with cover, keys and look
from tilewise.errors import bad_type, bad_value
from tilewise.masks.algebra import Mask
from tilewise.masks.arrays import Held
from tilewise.masks.cache import Cache, cached
from tilewise.masks.coverage import TILE, Tiles, Tiling, cover, keys, look, on_host, pair
from tilewise.masks.frame import Frame, Grid, default_offset, joint
from tilewise.masks.lines import EMPTY, FULL, OR, UNDECIDED, Line, combine, from_edges, ranges
from tilewise.masks.tilemap import Sizes, TileMap, area, assemble, distinct, nothing, pack, units

LARGEST, MOST = 8 << 30, 1 << 25
"""A tile map of more bytes, or partial tiles, is refused: such a mask is not sparse at this tile size."""

_CHUNK = 256  # tiles evaluated at once: 4 M pairs, some tens of MB


def tile_map(mask: Mask, n: int, m: int, *, offset: Any = None, heads: int | None = None) -> TileMap:
    """Compile `mask` for n query rows and m keys; cached.

    Args:
        offset: position of query row 0 among the keys, an int or integers [B]; None is m − n.
        heads: query heads; None takes as many as the mask names, or 1. It matters to masks that draw each head apart.

    Raises:
        ValueError: the mask does not fit the sizes.
    """
    frame = settle(mask, n, m, offset, heads)
    return cached(_MAPS, mask, frame, lambda: _compile(mask, frame))


_MAPS: Cache[TileMap] = Cache(128, 1 << 30, lambda tiles: tiles.nbytes)


def settle(mask: Mask, n: int, m: int, offset: Any, heads: int | None) -> Frame:
    """The frame of a problem, with everything that can be checked checked."""
    if not isinstance(mask, Mask):
        raise bad_type("mask", mask, "a mask", "wrap a boolean tensor in `masks.Dense`")
    for name, size in (("n", n), ("m", m)):
        if not hasattr(size, "__index__"):
            raise bad_type(name, size, "an int")
        if size < 0:
            raise bad_value(name, size, "at least 0")
    mask.check(n, m)
    if offset is None:
        offset = default_offset(n, m)
    elif not (isinstance(offset, int) or (hasattr(offset, "__index__") and getattr(offset, "ndim", 0) == 0)):
        offset = Held.integers(offset, "offset", (1,))
    else:
        offset = int(offset)
    sizes = [mask.batch, 1 if isinstance(offset, int) else offset.shape[0]]
    named = mask.heads
    if heads is not None and named not in (None, heads):
        raise bad_value("heads", heads, f"{named}: the mask names that many")
    wanted = named if named is not None else (heads or 1) if mask.by_head else 1
    return Frame(n, m, offset, joint("offset", sizes, "sequences"), wanted)


def _compile(mask: Mask, frame: Frame) -> TileMap:
    tiling = Tiling(frame)
    rows, columns = tiling.rows, tiling.columns
    offset = frame.offset if isinstance(frame.offset, int) else tuple(frame.offset.host().tolist())
    if not rows * columns:
        return nothing(frame.n, frame.m, offset, frame.batch, frame.heads)
    line = cover(mask, tiling, np.arange(frame.heads)).spread(frame.batch, frame.heads)
    starts, stops = line.pieces(UNDECIDED)
    _refuse_large(1, int((stops - starts).sum()))
    place = ranges(starts, stops - starts)
    plane, t, c = place // (rows * columns), place // columns % rows, place % columns
    tiles = Tiles(plane // frame.heads, plane % frame.heads, t, c)
    at_bottom, at_end = (t == rows - 1) & (frame.n % TILE > 0), (c == columns - 1) & (frame.m % TILE > 0)
    codes = pair(keys(mask, tiling, tiles), at_bottom * 2 + at_end)
    _, first, which = distinct(codes)
    _refuse_large(len(first), len(place))
    full = from_edges(line.edges, np.where(line.state == FULL, FULL, EMPTY), line.length)
    sizes = (frame.n, frame.m, offset, frame.batch, frame.heads)
    return from_tiles(sizes, full, place, first, which, lambda some: look(mask, tiling, tiles[some]))


_EMPTY_ID, _FULL_ID = -2, -1


def from_tiles(
    sizes: Sizes,
    full: Line,
    place: np.ndarray,
    first: np.ndarray,
    which: np.ndarray,
    look_at: Callable[[np.ndarray], np.ndarray],
) -> TileMap:
    """A tile map from its full tiles and from tiles to look into; these may turn out to be empty or full.

    Args:
        full: FULL where all pairs below n and m may attend, EMPTY elsewhere.
        place: places on the line of the tiles to look into, ascending.
        first, which: tile `place[k]` looks like tile `place[first[which[k]]]`, the last row and column apart.
        look_at: bool [K, 128, 128] for K numbers of tiles.
    """
    n, m = sizes[:2]
    rows, columns = -(-n // TILE), -(-m // TILE)
    at_bottom, at_end = place // columns % rows == rows - 1, place % columns == columns - 1
    areas = np.stack([area(n, m, bottom=bool(k & 2), end=bool(k & 1)) for k in range(4)])
    ids = np.empty(len(first), np.int64)
    seen: dict[bytes, int] = {}
    kept: list[np.ndarray] = []
    for k in range(0, len(first), _CHUNK):
        some = first[k : k + _CHUNK]
        real = areas[at_bottom[some] * 2 + at_end[some]]
        bits = pack(look_at(some)) & real
        empty, whole = ~np.any(bits, axis=(1, 2)), np.all(bits == real, axis=(1, 2))
        for at, tile in enumerate(bits):
            if empty[at] or whole[at]:
                ids[k + at] = _EMPTY_ID if empty[at] else _FULL_ID
                continue
            ids[k + at] = seen.setdefault(tile.tobytes(), len(seen))
            if len(kept) < len(seen):
                kept.append(tile)
    which = ids[which]
    if (ids == _FULL_ID).any():
        full = combine(full, units(place[which == _FULL_ID], full.length), OR)
    partial = which >= 0
    dictionary = np.stack(kept) if kept else np.zeros((0, TILE, TILE // 32), np.uint32)
    return assemble(sizes, full, place[partial], which[partial], dictionary)


def _refuse_large(distinct_tiles: int, partial: int) -> None:
    need = distinct_tiles * TILE * TILE // 8 + 16 * partial
    if need > LARGEST or partial > MOST:
        got = f"one with {partial:,} partial tiles, {distinct_tiles:,} of them distinct: {need / 2**30:.1f} GiB"
        want = f"at most {MOST:,} partial tiles and {LARGEST >> 30} GiB"
        raise bad_value("mask", got, want, "a mask that leaves whole 128×128 tiles empty or full")


def dense(mask: Mask, n: int, m: int, offset: Any, heads: int | None) -> np.ndarray:
    """The predicate as a matrix: bool [n, m], [H, n, m] if only heads differ, [B, 1|H, n, m] if sequences do."""
    frame = settle(mask, n, m, offset, heads)
    matrix = np.empty((frame.batch, frame.heads, n, m), np.bool_)
    step = max(1, (1 << 22) // max(1, m))
    for b, h, first in np.ndindex(frame.batch, frame.heads, -(-n // step)):
        i = np.arange(first * step, min(n, (first + 1) * step))[:, None]
        matrix[b, h, i[:, 0]] = mask.allow(Grid(np, on_host, frame, b, h, i, np.arange(m)[None, :]))
    return matrix if frame.batch > 1 else matrix[0] if frame.heads > 1 else matrix[0, 0]
