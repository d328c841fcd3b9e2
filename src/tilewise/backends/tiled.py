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
    Visit,
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

GROUP = 8
"""Query tiles that are computed as one batch."""

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

    @property
    def fills_cores(self) -> bool:
        return self.problem.q.shape[0] * self.problem.q.shape[1] >= 2 * torch.get_num_threads()

    def allowed(self, chunk: Chunk) -> Tensor | None:
        if self.masks is None or chunk.signature is None:
            return None
        return self.masks.allowed(chunk.signature)[: len(self.rows)]

    def mask(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """Biases and mask of a chunk as one additive tensor, broadcastable to [B, H, rows, keys], or None; and the rows
        that the mask leaves nothing, where no bias might do so too."""
        biases: list[Tensor] = []
        for piece in chunk.pieces:
            bias = self.blocks.additive(self.rows, piece)
            if bias is not None:
                biases.append(bias.expand(*bias.shape[:2], len(self.rows), len(piece)))
        added = None
        if biases:
            added = biases[0] if len(biases) == 1 else torch.cat(biases, dim=-1)
        if self.masks is None or chunk.signature is None:
            return added, None
        masked, empty = (x[0, : len(self.rows)] for x in self.masks.additive((chunk.signature,)))
        return (masked, empty) if added is None else (added + masked, None)

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


def _groups(tiles: Iterator[_Tile]) -> Iterator[list[_Tile]]:
    """Tiles of one problem that see equally many keys, a few at a time, to be computed as one batch.

    The fused kernel's backward spreads over batch and heads only, so where those are few, a single tile would leave
    cores idle.
    """
    waiting: dict[tuple[ScoreBlocks, int], list[_Tile]] = {}
    blocks: ScoreBlocks | None = None
    for tile in tiles:
        if tile.blocks is not blocks:
            yield from waiting.values()
            waiting, blocks = {}, tile.blocks
        if tile.fills_cores or len(tile.chunks) != 1 or len(tile.rows) != TILE or tile.blocks.biased:
            yield [tile]
            continue
        key = tile.blocks, tile.chunks[0].width
        waiting.setdefault(key, []).append(tile)
        if len(waiting[key]) == GROUP:
            yield waiting.pop(key)
    yield from waiting.values()


class _Batch(NamedTuple):
    """A group of tiles as one batch [G·B, ...] for the fused kernel."""

    q: Tensor
    k: Tensor
    v: Tensor
    additive: Tensor | None
    empty: Tensor | None

    @classmethod
    def of(cls, group: list[_Tile], chunk: int, dtype: torch.dtype) -> _Batch:
        """Chunk number `chunk` of each tile; groups of several tiles have one chunk each."""
        first = group[0]
        keys = [tile.gather(tile.chunks[chunk], dtype) for tile in group]
        q = [tile.problem.q[:, :, tile.rows.start : tile.rows.stop].to(dtype) for tile in group]
        if len(group) == 1:
            return cls(q[0], *keys[0], *first.mask(first.chunks[chunk]))
        k, v = zip(*keys, strict=True)
        return cls(torch.cat(q), torch.cat(k), torch.cat(v), *_shared_mask(group))


def _shared_mask(group: list[_Tile]) -> tuple[Tensor | None, Tensor | None]:
    """One mask for all tiles [1, 1, TILE, width] or one each [G·B, 1, TILE, width], and their empty rows."""
    masks, batch = group[0].masks, group[0].problem.q.shape[0]
    signatures = [tile.chunks[0].signature for tile in group]
    if masks is None or all(signature is None for signature in signatures):
        return None, None
    all_visible = (Visit(range(group[0].chunks[0].width)),)
    additive, empty = masks.additive(tuple(signature or all_visible for signature in signatures))
    if len(additive) > 1 and batch > 1:
        additive, empty = additive.repeat_interleave(batch, 0), empty.repeat_interleave(batch, 0)
    return additive[:, None], empty[:, None]


def _forward_flash(group: list[_Tile], spec: AttentionSpec) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of each tile."""
    first = group[0]
    if not first.chunks:
        q = first.blocks.q_rows(first.rows)
        return [(q.new_zeros(*q.shape[:3], spec.v_head_dim), q.new_full(q.shape[:3], NEG_INF))]
    # What will be merged must not be rounded to half precision first.
    alone = len(first.chunks) == 1 and first.blocks.sink is None
    dtype = first.problem.q.dtype if alone else first.blocks.dtype
    out, lse = None, None
    for chunk in range(len(first.chunks)):
        batch = _Batch.of(group, chunk, dtype)
        part = cpu_flash.forward(batch.q, batch.k, batch.v, spec.scale, batch.additive, empty=batch.empty)
        out, lse = part if out is None or lse is None else merge(out, lse, *part)
    assert out is not None
    assert lse is not None
    return list(zip(out.chunk(len(group)), lse.chunk(len(group)), strict=True))


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
        tiles = _tiles(operands, spec, config)
        for group in _groups(tiles) if config.engine == "flash" else ([tile] for tile in tiles):
            parts = _forward_flash(group, spec) if config.engine == "flash" else [_forward_plain(group[0], spec)]
            for tile, part in zip(group, parts, strict=True):
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
        tiles = _tiles(operands, spec, config)
        for group in _groups(tiles) if config.engine == "flash" else ([tile] for tile in tiles):
            rows = [_Rows.of(tile, dout, dlse, out, lse) for tile in group]
            if totals.sink is not None:
                for tile, row in zip(group, rows, strict=True):
                    if tile.blocks.sink is not None:
                        totals.sink[tile.problem.heads].add_(sink_gradient(tile.blocks.sink, row.lse, row.delta))
            if config.engine == "flash":
                parts = _backward_flash(group, rows, spec, totals)
            else:
                parts = [_backward_plain(group[0], rows[0], totals)]
            for tile, part in zip(group, parts, strict=True):
                tile.of(dq).copy_(part)
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


class _Rows(NamedTuple):
    """What the backward knows of a tile's rows, in accumulator precision."""

    dout: Tensor
    dlse: Tensor | None
    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, tile: _Tile, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> _Rows:
        lse_rows, dtype = tile.of(lse), tile.blocks.dtype
        # Whatever arrives from rows that saw nothing, NaN too, must not reach the others.
        dout_rows = tile.of(dout).to(dtype).masked_fill((lse_rows == NEG_INF)[..., None], 0.0)
        return cls(dout_rows, None if dlse is None else tile.of(dlse), tile.of(out).to(dtype), lse_rows)

    @property
    def delta(self) -> Tensor:
        return delta_rows(self.dout, self.dlse, self.out)


def _backward_plain(tile: _Tile, rows: _Rows, totals: Totals) -> Tensor:
    """Add the tile's shares to `totals` and return its dq."""
    q, delta = tile.blocks.q_rows(tile.rows), rows.delta
    lse = rows.lse[..., None]
    lse = lse.masked_fill(lse == NEG_INF, float("inf"))
    dq = torch.zeros_like(q)
    for chunk in tile.chunks:
        keys, allowed = chunk.pieces[0], tile.allowed(chunk)
        dq += tile.blocks.backward(q, rows.dout, delta, lse, tile.rows, keys, allowed, totals)
    return dq


def _backward_flash(group: list[_Tile], rows: list[_Rows], spec: AttentionSpec, totals: Totals) -> list[Tensor]:
    """Add the group's dk and dv to `totals` and return the dq of each tile."""
    first, count = group[0], len(group)
    dout, out, lse = (torch.cat(parts) for parts in zip(*((row.dout, row.out, row.lse) for row in rows), strict=True))
    dlse = None if rows[0].dlse is None else torch.cat([row.dlse for row in rows if row.dlse is not None])
    dq = torch.zeros(*dout.shape[:3], spec.head_dim, dtype=dout.dtype)
    for chunk in range(len(first.chunks)):
        batch = _Batch.of(group, chunk, first.blocks.dtype)
        tensors = dout, dlse, batch.q, batch.k, batch.v, out, lse
        dq_part, dk, dv = cpu_flash.backward(*tensors, spec.scale, batch.additive)
        dq += dq_part
        for tile, dk_tile, dv_tile in zip(group, dk.chunk(count), dv.chunk(count), strict=True):
            start = 0
            for piece in tile.chunks[chunk].pieces:
                part = slice(start, start + len(piece))
                totals.add_keys(tile.problem, piece, dk_tile[:, :, part], dv_tile[:, :, part])
                start += len(piece)
    return list(dq.chunk(count))


TILED = Tiled()
