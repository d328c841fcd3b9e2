"""N = M = 1,048,576: every named mask compiles, and turns over, within a second and a gigabyte."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from tilewise.masks import BigBird, Causal, Dilated, Documents, Global, Longformer, Mask, Window, compiler
from tilewise.masks.compiler import tile_map

N = 1 << 20
_CUTS = np.sort(np.random.default_rng(0).choice(np.arange(1, N), 999, replace=False))

MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Window(1024, 0),
    "dilated": Dilated(64, 8),
    "documents": Documents(np.searchsorted(_CUTS, np.arange(N), side="right")),
    "longformer": Longformer(512, [0]),
    "bigbird": BigBird(64, 3, 2, 3),
    "combined": Causal() & (Window(256, 0) | Global([0])),
}


def visible(name: str) -> int:
    """How many pairs may attend, in closed form; None of these asks the tile map."""
    i = np.arange(N, dtype=np.int64)
    match name:
        case "causal":
            per_row = i + 1
        case "window":
            per_row = np.minimum(i, 1024) + 1
        case "dilated":
            per_row = np.minimum(i // 8, 64) + np.minimum((N - 1 - i) // 8, 64) + 1
        case "documents":
            sizes = np.diff(np.concatenate(([0], _CUTS, [N])))
            return int((sizes**2).sum())
        case "longformer":
            per_row = np.minimum(i, 256) + np.minimum(N - 1 - i, 256) + 1 + (i > 256)
            per_row[0] = N
        case _:
            per_row = np.minimum(i, 256) + 1 + (i > 256)
    return int(per_row.sum())


@pytest.mark.parametrize("name", MASKS)
def test_a_million_tokens(name: str) -> None:
    mask = MASKS[name]
    took = []
    for _ in range(3):
        compiler._MAPS.clear()
        start = time.perf_counter()
        tiles = tile_map(mask, N, N)
        turned = tiles.transpose()
        took.append(time.perf_counter() - start)
    assert min(took) < 1.0
    assert turned.visible == tiles.visible
    assert turned.full_tiles == tiles.full_tiles
    if name != "bigbird":
        assert tiles.visible == visible(name)
    compiler._MAPS.clear()
    tracemalloc.start()
    tile_map(mask, N, N).transpose()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 30


def test_odd_sizes_at_a_million() -> None:
    """Nothing aligned: N and M no multiples of 128, any offset."""
    for n, m, offset in ((N - 77, N - 1, None), (1000, N + 3, 12_345), (N - 1, 777, -5)):
        tiles = tile_map(Causal() & Window(5000, 0), n, m, offset=offset)
        p = np.arange(n) + (m - n if offset is None else offset)
        low, high = np.maximum(p - 5000, 0), np.minimum(p, m - 1)
        assert tiles.visible == np.maximum(high - low + 1, 0).sum()
        assert tiles.transpose().visible == tiles.visible
