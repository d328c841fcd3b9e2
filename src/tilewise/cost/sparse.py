"""What a sparse pattern costs, from its tile map: work goes by visited tiles, not by visible scores.

A tile that holds a single visible score costs a whole tile of products, so the saving that counts is that of the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewise.cost.counts import Flops, Traffic, forward_flops, traffic_of
from tilewise.spec import AttentionSpec

if TYPE_CHECKING:
    from tilewise.masks import TileMap

TILE = 128


@dataclass(frozen=True, slots=True)
class SparseCounts:
    """One layer, all batches and heads."""

    scores: int
    """Computed: every score of every visited tile, as far as the matrix reaches."""
    visible: int
    """Of them, those that are not forbidden."""
    flops: Flops
    traffic: Traffic
    """Q, O and lse once; K and V of every visited tile, with no help from a cache."""
    map_bytes: int
    share: float
    """Of the dense scores that are computed."""

    @property
    def speedup(self) -> float:
        """Over dense attention at the same rate: the most that skipping can give."""
        return 1 / self.share if self.share else float("inf")


def sparse_counts(spec: AttentionSpec, tiles: TileMap) -> SparseCounts:
    """Costs of `spec` under the mask that `tiles` was compiled from (`tilewise.masks.tile_map`).

    A map without batch or head dims of its own counts for all of them.
    """
    repeats = spec.batch * spec.heads // (tiles.batch * tiles.heads)
    computed, keys, visible = (repeats * count for count in _walk(tiles))
    dense = spec.batch * spec.heads * spec.q_len * spec.k_len
    rows = spec.batch * spec.heads * spec.q_len
    d, dv = spec.head_dim, spec.v_head_dim
    traffic = traffic_of(spec, rows * d + keys * (d + dv), rows * dv, wide_written=rows)
    flops = forward_flops(spec, computed / max(1, spec.batch * spec.heads))
    return SparseCounts(computed, visible, flops, traffic, tiles.nbytes, computed / dense if dense else 0.0)


def _walk(tiles: TileMap) -> tuple[int, int, int]:
    """Scores computed, keys loaded and scores visible, over the rows of the map."""
    computed = keys = 0
    for row in range(tiles.rows):
        height = min(TILE, tiles.n - row % tiles.q_tiles * TILE)
        runs = range(int(tiles.run_ptr[row]), int(tiles.run_ptr[row + 1]))
        width = sum(min(int(tiles.run_stop[r]) * TILE, tiles.m) - int(tiles.run_start[r]) * TILE for r in runs)
        parts = range(int(tiles.part_ptr[row]), int(tiles.part_ptr[row + 1]))
        width += sum(min(TILE, tiles.m - int(tiles.part_col[part]) * TILE) for part in parts)
        computed += height * width
        keys += width
    return computed, keys, tiles.visible
