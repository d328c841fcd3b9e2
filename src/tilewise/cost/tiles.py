"""What the tiled algorithms do, from sizes alone; equal, to the element, to what `tilewise.reference`'s loops count.

Only full and causal problems are walked here. Which tiles a window or a mask visits is for its tile map to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tilewise import errors
from tilewise.cost.counts import Traffic, diagonal, traffic_of
from tilewise.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class TiledCounts:
    """What a tiled algorithm does; the fields mean what those of `tilewise.reference.Counters` mean."""

    traffic: Traffic
    on_chip_bytes: int
    matmul_flops: int
    rescalings: int
    divisions: int
    tiles_visited: int
    tiles_skipped: int


class _QTile(NamedTuple):
    """A tile of query rows and the keys that it visits, `cols` of them in `visits` tiles from the first."""

    rows: int
    cols: int
    visits: int


def _q_tiles(spec: AttentionSpec, block_m: int, block_n: int) -> Iterator[_QTile]:
    if block_m < 1 or block_n < 1:
        raise errors.bad_value("block_m, block_n", (block_m, block_n), "at least 1 each")
    if spec.windowed or spec.mask is not None:
        raise errors.bad_value("spec", "a window or a mask", "a full or causal problem", "count with its tile map")
    offset = diagonal(spec)
    for start in range(0, spec.q_len, block_m):
        stop = min(start + block_m, spec.q_len)
        seen = min(spec.k_len, max(0, stop + offset)) if spec.causal else spec.k_len
        visits = math.ceil(seen / block_n)
        yield _QTile(stop - start, min(visits * block_n, spec.k_len), visits)


def _tiled(
    spec: AttentionSpec,
    q_tiles: list[_QTile],
    block_n: int,
    traffic: Traffic,
    on_chip: Callable[[int, int], tuple[int, int]],
    matmul_depth: int,
    *,
    rescalings: int = 0,
    divisions: int = 0,
) -> TiledCounts:
    """`on_chip(rows, cols)` gives the operand and accumulator elements of one tile set."""
    heads = spec.batch * spec.heads
    visited = sum(tile.visits for tile in q_tiles)
    tallest = max((tile.rows for tile in q_tiles if tile.visits), default=0)
    held = on_chip(tallest, min(block_n, spec.k_len)) if tallest else (0, 0)
    return TiledCounts(
        traffic=traffic,
        on_chip_bytes=held[0] * traffic.itemsize + held[1] * traffic.wide_itemsize,
        matmul_flops=2 * heads * sum(tile.rows * tile.cols for tile in q_tiles) * matmul_depth,
        rescalings=heads * rescalings,
        divisions=heads * divisions,
        tiles_visited=heads * visited,
        tiles_skipped=heads * (len(q_tiles) * math.ceil(spec.k_len / block_n) - visited),
    )


def _forward_tile_set(spec: AttentionSpec) -> Callable[[int, int], tuple[int, int]]:
    """q, k, v tiles; s, p, acc tiles with m and l."""
    d, dv = spec.head_dim, spec.v_head_dim
    return lambda rows, cols: (rows * d + cols * (d + dv), 2 * rows * cols + rows * dv + 2 * rows)


def flash_v1_counts(spec: AttentionSpec, block_m: int = 64, block_n: int = 64) -> TiledCounts:
    """FlashAttention-1: K and V once; for every visited tile Q, and O, m, l read and written (`reference.flash_v1`)."""
    q_tiles = list(_q_tiles(spec, block_m, block_n))
    heads, n, d, dv = spec.batch * spec.heads, spec.q_len, spec.head_dim, spec.v_head_dim
    visited_rows = sum(tile.rows * tile.visits for tile in q_tiles)
    traffic = traffic_of(
        spec,
        heads * (spec.k_len * (d + dv) + visited_rows * d),
        0,
        wide_read=heads * visited_rows * (dv + 2),
        wide_written=heads * (n + visited_rows) * (dv + 2),
    )
    visits = sum(tile.visits for tile in q_tiles)
    return _tiled(spec, q_tiles, block_n, traffic, _forward_tile_set(spec), d + dv, rescalings=visits, divisions=visits)


def flash_v2_counts(spec: AttentionSpec, block_m: int = 64, block_n: int = 64) -> TiledCounts:
    """FlashAttention-2: Q, O and lse once; K and V once a Q tile, as far as it sees (`reference.flash_v2`).

    No cache is assumed: on a GPU many of the re-reads of K and V hit the L2, and `ideal_traffic` is what is left if
    all of them do.
    """
    q_tiles = list(_q_tiles(spec, block_m, block_n))
    heads, n, d, dv = spec.batch * spec.heads, spec.q_len, spec.head_dim, spec.v_head_dim
    traffic = traffic_of(
        spec,
        heads * (n * d + sum(tile.cols for tile in q_tiles) * (d + dv)),
        heads * n * dv,
        wide_written=heads * n,
    )
    visits = sum(tile.visits for tile in q_tiles)
    return _tiled(
        spec, q_tiles, block_n, traffic, _forward_tile_set(spec), d + dv, rescalings=visits, divisions=len(q_tiles)
    )


def flash_backward_counts(
    spec: AttentionSpec, block_m: int = 64, block_n: int = 64, *, with_dlse: bool = False
) -> TiledCounts:
    """The backward by recomputation, K and V tiles outside (`reference.flash_backward`): delta, main loop, dQ scaling.

    K, V, dK, dV move once per K/V head, as the query heads that share one are an inner loop.
    """
    q_tiles = list(_q_tiles(spec, block_m, block_n))
    heads, kv_heads = spec.batch * spec.heads, spec.batch * spec.kv_heads
    n, d, dv = spec.q_len, spec.head_dim, spec.v_head_dim
    visited_rows = sum(tile.rows * tile.visits for tile in q_tiles)
    kv_elements = kv_heads * spec.k_len * (d + dv)
    traffic = traffic_of(
        spec,
        heads * (2 * n * dv + visited_rows * (d + dv)) + kv_elements,
        heads * n * d + kv_elements,
        wide_read=heads * (n * with_dlse + visited_rows * (2 + d) + n * d),
        wide_written=heads * (n + n * d + visited_rows * d),
    )

    def on_chip(rows: int, cols: int) -> tuple[int, int]:
        """k, v, q, dout tiles; s, p, dp, ds, dq, dk, dv tiles with lse and delta."""
        operands = (rows + cols) * (d + dv)
        return operands, 4 * rows * cols + rows * d + cols * (d + dv) + 2 * rows

    return _tiled(spec, q_tiles, block_n, traffic, on_chip, 3 * d + 2 * dv)
