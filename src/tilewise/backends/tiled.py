"""Attention in O(N) memory in plain PyTorch: FlashAttention's loop over tiles, every feature, any device, float64 too.

Query tiles outside, the keys they can see inside; tiles that see nothing are never visited. Four engines serve:

- `whole`: the entire call is one call of ATen's fused CPU kernel;
- `dense`: that, with restrictions and biases as one N×M mask, where that is small;
- `flash`: that kernel on each query tile with the keys it can see, gathered, under one shared tile mask; what comes in
  several chunks is merged, in float32 (float64 for float64);
- `plain`: score blocks written out (scores.py), for every feature and every device.

The forward is Dao, FlashAttention-2 (2023), algorithm 1; the backward recomputes P from the LSE (its algorithm 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tilewise.backends import cpu_flash
from tilewise.backends.base import Gradients, Needs, Operands, empty_ordered, empty_output
from tilewise.backends.problems import (
    Chunk,
    ChunkMasks,
    Problem,
    RowTiles,
    chunks,
    restriction,
    sequences,
    tiled_problems,
)
from tilewise.backends.scores import NEG_INF, ScoreBlocks, Totals, delta_rows, sink_gradient
from tilewise.masks import TILE
from tilewise.reference.softmax import finish, merge, merge_sink, shift_of
from tilewise.spec import AttentionSpec

PLAIN_ELEMENTS = 2**24
"""Scores that a plain tile may hold: 64 MiB in float32."""
DENSE_ELEMENTS = 2**22
"""B·H·N·M up to which one N×M mask costs less than walking tiles: at most 16 MiB."""
FLASH_KEYS = 4096
"""Keys per flash chunk: a tile mask stays within the cache (128 × 4096 float32 = 2 MiB)."""

Engine = Literal["whole", "dense", "flash", "plain"]


class TileConfig(NamedTuple):
    engine: Engine
    block_m: int
    block_n: int
    batch: int
    """Batch entries that are computed at once."""


def choose_engine(spec: AttentionSpec) -> Engine:
    if spec.device != "cpu" or spec.softcap is not None or spec.dropout > 0.0 or spec.relative is not None:
        return "plain"
    if spec.packed or spec.q_offset == "tensor" or 0 in (spec.batch, spec.q_len, spec.k_len):
        return "flash"
    added = spec.bias is not None or spec.alibi or spec.mask is not None
    if not added and (spec.reach == (None, None) or cpu_flash.takes_causal(spec)):
        return "whole"
    small = spec.batch * spec.heads * spec.q_len * spec.k_len <= DENSE_ELEMENTS
    return "dense" if small else "flash"


def plain_config(spec: AttentionSpec) -> TileConfig:
    """Tile shapes for which no more than about PLAIN_ELEMENTS scores exist at once."""
    block_m = min(512, max(1, spec.q_len))
    batch = 1 if spec.packed else max(1, min(spec.batch, PLAIN_ELEMENTS // (max(1, spec.heads) * block_m * TILE)))
    block_n = PLAIN_ELEMENTS // (block_m * max(1, spec.heads) * batch) // TILE * TILE
    return TileConfig("plain", block_m, max(TILE, min(FLASH_KEYS, block_n)), batch)


class _Tile(NamedTuple):
    """One query tile of a problem with all that its computation needs."""

    problem: Problem
    blocks: ScoreBlocks
    masks: ChunkMasks | None
    rows: range
    chunks: list[Chunk]

    def of(self, x: Tensor) -> Tensor:
        """The tile's rows of a [B, H, N, ...] tensor of the whole call."""
        return self.problem.of_rows(x)[:, :, self.rows.start : self.rows.stop]

    def allowed(self, chunk: Chunk) -> Tensor | None:
        if self.masks is None or chunk.signature is None:
            return None
        return self.masks.allowed(chunk.signature)[: len(self.rows)]

    def additive(self, chunk: Chunk) -> Tensor | None:
        """Biases and mask of a chunk as one additive tensor, broadcastable to [B, H, rows, keys], or None."""
        biases: list[Tensor] = []
        for piece in chunk.pieces:
            bias = self.blocks.additive(self.rows, piece)
            if bias is not None:
                biases.append(bias.expand(*bias.shape[:2], len(self.rows), len(piece)))
        total = None
        if biases:
            total = biases[0] if len(biases) == 1 else torch.cat(biases, dim=-1)
        if self.masks is not None and chunk.signature is not None:
            masked = self.masks.additive(chunk.signature)[: len(self.rows)]
            total = masked if total is None else total + masked
        return total

    def empty_rows(self, chunk: Chunk) -> Tensor | None:
        """Rows that the mask of a chunk leaves nothing, or None where a bias might do so too."""
        if self.masks is None or chunk.signature is None or self.blocks.biased:
            return None
        return self.masks.empty_rows(chunk.signature)[: len(self.rows)]

    def gather(self, chunk: Chunk, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The chunk's keys and values in `dtype`; one range in that dtype is a view."""
        k, v = ([x[:, :, piece.start : piece.stop] for piece in chunk.pieces] for x in (self.problem.k, self.problem.v))
        if len(chunk.pieces) == 1:
            return k[0].to(dtype), v[0].to(dtype)
        return torch.cat(k, dim=2).to(dtype), torch.cat(v, dim=2).to(dtype)


def _tiles(operands: Operands, spec: AttentionSpec, config: TileConfig) -> Iterator[_Tile]:
    for whole, row_tiles in tiled_problems(operands, spec):
        n, m = whole.q.shape[2], whole.k.shape[2]
        block_m = config.block_m if row_tiles is None else TILE
        for problem in _batches(whole, config.batch):
            blocks = ScoreBlocks(problem, operands, spec)
            masks = None if row_tiles is None else ChunkMasks(row_tiles.tile_map, problem.q.device, blocks.dtype)
            for start in range(0, n, block_m):
                rows = range(start, min(start + block_m, n))
                yield _Tile(problem, blocks, masks, rows, _chunks_of(row_tiles, start // TILE, m, config))


def _batches(problem: Problem, size: int) -> Iterator[Problem]:
    if len(problem.indices) <= size:
        yield problem
        return
    for start in range(0, len(problem.indices), size):
        yield problem.at_batch(start, min(start + size, len(problem.indices)))


def _chunks_of(row_tiles: RowTiles | None, tile: int, m: int, config: TileConfig) -> list[Chunk]:
    if row_tiles is None:
        return [Chunk((range(j, min(j + config.block_n, m)),)) for j in range(0, m, config.block_n)]
    return list(chunks(row_tiles.visits(tile, m), config.block_n, contiguous=config.engine == "plain"))


def _forward_flash(tile: _Tile, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    # What will be merged must not be rounded to half precision first.
    alone = len(tile.chunks) == 1 and tile.blocks.sink is None
    dtype = tile.problem.q.dtype if alone else tile.blocks.dtype
    q = tile.problem.q[:, :, tile.rows.start : tile.rows.stop].to(dtype)
    out, lse = None, None
    for chunk in tile.chunks:
        k, v = tile.gather(chunk, dtype)
        part = cpu_flash.forward(q, k, v, spec.scale, tile.additive(chunk), empty=tile.empty_rows(chunk))
        out, lse = part if out is None or lse is None else merge(out, lse, *part)
    if out is None or lse is None:
        out, lse = q.new_zeros(*q.shape[:3], spec.v_head_dim), q.new_full(q.shape[:3], NEG_INF)
    return out, lse


def _forward_plain(tile: _Tile, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    q = tile.blocks.q_rows(tile.rows)
    m = q.new_full(q.shape[:3], NEG_INF)
    l = torch.zeros_like(m)
    acc = q.new_zeros(*q.shape[:3], spec.v_head_dim)
    for chunk in tile.chunks:
        keys = chunk.pieces[0]
        s, _ = tile.blocks.scores(q, tile.rows, keys, tile.allowed(chunk))
        m_new = torch.maximum(m, s.amax(-1))
        shift = shift_of(m_new)
        p = s.sub_(shift[..., None]).exp_()
        alpha = torch.exp(m - shift)
        l = l * alpha + p.sum(-1)
        acc = acc.mul_(alpha[..., None]).add_(tile.blocks.times_v(p, tile.rows, keys))
        m = m_new
    return finish(m, l, acc)


class Tiled:
    name = "tiled"

    def why_not(self, spec: AttentionSpec) -> str | None:
        return None

    def configure(self, spec: AttentionSpec) -> TileConfig:
        engine = choose_engine(spec)
        return plain_config(spec) if engine == "plain" else TileConfig(engine, 512, FLASH_KEYS, max(1, spec.batch))

    def forward(self, operands: Operands, spec: AttentionSpec, config: TileConfig) -> tuple[Tensor, Tensor]:
        if config.engine in ("whole", "dense"):
            additive, causal = _whole_mask(operands, spec, config)
            out, lse = cpu_flash.forward(operands.q, operands.k, operands.v, spec.scale, additive, causal)
            return (out, lse) if operands.sink is None else merge_sink(out, lse, operands.sink)
        out, lse = empty_output(operands)
        forward_tile = _forward_flash if config.engine == "flash" else _forward_plain
        for tile in _tiles(operands, spec, config):
            part = forward_tile(tile, spec)
            if tile.blocks.sink is not None:
                part = merge_sink(*part, tile.blocks.sink)
            tile.of(out).copy_(part[0])
            tile.of(lse).copy_(part[1])
        return out, lse

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        config: TileConfig,
        needs: Needs,
    ) -> Gradients:
        if needs.bias:
            config = plain_config(spec)
        if config.engine in ("whole", "dense"):
            return _backward_whole(dout, dlse, operands, out, lse, spec, config, needs)
        dq = empty_ordered(operands.q, spec.head_dim)
        totals = Totals.zeros(operands, needs)
        for tile in _tiles(operands, spec, config):
            lse_tile = tile.of(lse)
            empty = (lse_tile == NEG_INF)[..., None]
            # Whatever arrives from rows that saw nothing, NaN too, must not reach the others.
            dout_tile = tile.of(dout).to(tile.blocks.dtype).masked_fill(empty, 0.0)
            out_tile = tile.of(out).to(tile.blocks.dtype)
            dlse_tile = None if dlse is None else tile.of(dlse)
            delta = delta_rows(dout_tile, dlse_tile, out_tile)
            if totals.sink is not None and tile.blocks.sink is not None:
                totals.sink[tile.problem.heads].add_(sink_gradient(tile.blocks.sink, lse_tile, delta))
            q = tile.blocks.q_rows(tile.rows)
            dq_tile = torch.zeros_like(q)
            lse_safe = lse_tile[..., None].masked_fill(empty, float("inf"))
            for chunk in tile.chunks:
                if config.engine == "flash":
                    cotangents = dout_tile, dlse_tile
                    dq_tile += _backward_flash(tile, chunk, q, *cotangents, out_tile, lse_tile, spec, totals)
                else:
                    keys, allowed = chunk.pieces[0], tile.allowed(chunk)
                    dq_tile += tile.blocks.backward(q, dout_tile, delta, lse_safe, tile.rows, keys, allowed, totals)
            tile.of(dq).copy_(dq_tile)
        return totals.gradients(dq, operands)


def _whole_mask(operands: Operands, spec: AttentionSpec, config: TileConfig) -> tuple[Tensor | None, bool]:
    """(additive mask, causal flag) for one call of the fused kernel."""
    if config.engine == "whole":
        return None, spec.reach != (None, None)
    blocks = ScoreBlocks(next(sequences(operands, spec)), operands, spec)
    return blocks.dense_additive(restriction(operands, spec)), False


def _backward_whole(
    dout: Tensor,
    dlse: Tensor | None,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    config: TileConfig,
    needs: Needs,
) -> Gradients:
    q, k, v = operands.q, operands.k, operands.v
    additive, causal = _whole_mask(operands, spec, config)
    dq, dk, dv = cpu_flash.backward(dout, dlse, q, k, v, out, lse, spec.scale, additive, causal)
    dsink = None
    if operands.sink is not None and needs.sink:
        delta = delta_rows(dout.to(lse.dtype), dlse, out.to(lse.dtype))
        dsink = sink_gradient(operands.sink.to(lse.dtype), lse, delta).to(operands.sink.dtype)
    return Gradients(dq, dk, dv, sink=dsink)


def _backward_flash(
    tile: _Tile,
    chunk: Chunk,
    q: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    totals: Totals,
) -> Tensor:
    """Add the chunk's dk and dv to `totals` and return its share of dq."""
    k, v = tile.gather(chunk, q.dtype)
    dq, dk, dv = cpu_flash.backward(dout, dlse, q, k, v, out, lse, spec.scale, tile.additive(chunk))
    start = 0
    for piece in chunk.pieces:
        part = slice(start, start + len(piece))
        totals.add_keys(tile.problem, piece, dk[:, :, part], dv[:, :, part])
        start += len(piece)
    return dq


TILED = Tiled()
