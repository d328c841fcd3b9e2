"""Cut a call into dense problems, and a problem into query tiles with the keys that each may see.

Shared by the PyTorch backends. A packed batch becomes one problem a sequence, per-sequence offsets one a batch row, and
a mask that differs per batch or head one each; everything else is one problem. The keys that a query tile visits come
from the tile map of all restrictions together (causal, window and mask are one mask value here); tiles that see nothing
never appear.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.backends.base import Operands
from tilewise.errors import bad_value
from tilewise.masks import TILE, Causal, Mask, TileMap, Window, tile_map
from tilewise.masks.tensors import dense, unpack
from tilewise.spec import AttentionSpec

EVERYTHING = slice(None)
KEPT_MASKS = 16
"""Structured masks have a handful of signatures; unstructured ones would fill memory."""


class Problem(NamedTuple):
    """A dense piece of a call with one geometry: the whole batch, one sequence or head of it, or one packed sequence.

    The tensors are views of the call's operands; `batch`, `heads`, `kv_heads`, `rows` and `keys` say where they lie.
    Row i of the piece has position `i + offset`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    offset: int
    heads: slice
    kv_heads: slice
    indices: range
    """The batch or sequence numbers that dropout, biases and per-sequence slopes go by."""
    batch: slice = EVERYTHING
    rows: slice = EVERYTHING
    keys: slice = EVERYTHING

    def of_rows(self, x: Tensor) -> Tensor:
        """The part of a [B, H, N, ...] tensor of the whole call that belongs to this problem's rows."""
        return x[self.batch, self.heads, self.rows]

    def of_keys(self, x: Tensor) -> Tensor:
        """The part of a [B, Hkv, M, ...] tensor of the whole call that belongs to this problem's keys."""
        return x[self.batch, self.kv_heads, self.keys]

    def at_batch(self, start: int, stop: int) -> Problem:
        """The batch entries start … stop of a problem that holds the whole batch."""
        part = slice(start, stop)
        return self._replace(q=self.q[part], k=self.k[part], v=self.v[part], batch=part, indices=range(start, stop))

    def at_head(self, h: int, group: int) -> Problem:
        head, kv_head = slice(h, h + 1), slice(h // group, h // group + 1)
        tensors = self.q[:, head], self.k[:, kv_head], self.v[:, kv_head]
        return self._replace(q=tensors[0], k=tensors[1], v=tensors[2], heads=head, kv_heads=kv_head)


class Visit(NamedTuple):
    """Consecutive keys that a query tile visits: all of them visible, or those of one bit tile."""

    keys: range
    bits: int | None = None


class RowTiles(NamedTuple):
    """The rows of a tile map that belong to one problem."""

    tile_map: TileMap
    first: int

    def visits(self, tile: int, m: int) -> list[Visit]:
        """What query tile number `tile` visits, in the order of the keys."""
        t, r = self.tile_map, self.first + tile
        runs = range(t.run_ptr[r], t.run_ptr[r + 1])
        parts = range(t.part_ptr[r], t.part_ptr[r + 1])
        found = [Visit(range(int(t.run_start[e]) * TILE, int(t.run_stop[e]) * TILE)) for e in runs]
        for e in parts:
            start = int(t.part_col[e]) * TILE
            found.append(Visit(range(start, min(start + TILE, m)), int(t.part_id[e])))
        return sorted(found, key=lambda visit: visit.keys.start)


Signature = tuple[Visit, ...]
"""Visits by width and bit tile, wherever they lie."""


class Chunk(NamedTuple):
    """Visits computed at once. `signature` names the mask: equal signatures have equal masks; None needs none."""

    pieces: tuple[range, ...]
    signature: Signature | None = None

    @property
    def width(self) -> int:
        return sum(len(piece) for piece in self.pieces)


def chunks(visits: Iterable[Visit], limit: int, *, contiguous: bool) -> Iterator[Chunk]:
    """Group visits into chunks of at most `limit` keys where that saves calls.

    A long run of full tiles stands alone, so that it needs no mask. `contiguous` allows only chunks that are one range.
    """
    pending: list[Visit] = []
    width = 0
    for visit in visits:
        if visit.bits is None and len(visit.keys) > limit // 2:
            if pending:
                yield _chunk(pending)
            pending, width = [], 0
            for start in range(visit.keys.start, visit.keys.stop, limit):
                yield Chunk((range(start, min(start + limit, visit.keys.stop)),))
            continue
        gap = bool(pending) and pending[-1].keys.stop != visit.keys.start
        if pending and (width + len(visit.keys) > limit or (contiguous and gap)):
            yield _chunk(pending)
            pending, width = [], 0
        pending.append(visit)
        width += len(visit.keys)
    if pending:
        yield _chunk(pending)


def _chunk(visits: list[Visit]) -> Chunk:
    pieces: list[range] = []
    for visit in visits:
        if pieces and pieces[-1].stop == visit.keys.start:
            pieces[-1] = range(pieces[-1].start, visit.keys.stop)
        else:
            pieces.append(visit.keys)
    if all(visit.bits is None for visit in visits):
        return Chunk(tuple(pieces))
    return Chunk(tuple(pieces), tuple(Visit(range(len(visit.keys)), visit.bits) for visit in visits))


class ChunkMasks:
    """The masks of chunks, unpacked from bit tiles; what consecutive tiles share is kept."""

    def __init__(self, tile_map: TileMap, device: torch.device, dtype: torch.dtype) -> None:
        self._bits = torch.from_numpy(tile_map.bits.view("int32")).to(device)
        self._each_bit = (1 << torch.arange(32, dtype=torch.int64)).to(torch.int32).to(device)
        self._dtype = dtype
        self._kept: dict[tuple[Signature, ...], tuple[Tensor, Tensor]] = {}

    def allowed(self, signature: Signature) -> Tensor:
        """bool [TILE, width], True = visible."""
        additive, _ = self.additive((signature,))
        return additive[0] == 0.0

    def additive(self, signatures: tuple[Signature, ...]) -> tuple[Tensor, Tensor]:
        """For G chunks of one width: 0 where visible and −∞ elsewhere [G, TILE, width]; rows without a key [G, TILE].

        Equal signatures give G = 1, for all of them.
        """
        if all(signature == signatures[0] for signature in signatures):
            signatures = signatures[:1]
        if signatures not in self._kept:
            if len(self._kept) >= KEPT_MASKS:
                self._kept.clear()
            self._kept[signatures] = self._unpack(signatures)
        return self._kept[signatures]

    def _unpack(self, signatures: tuple[Signature, ...]) -> tuple[Tensor, Tensor]:
        width = sum(len(visit.keys) for visit in signatures[0])
        tiles = [
            [
                -1 if visit.bits is None else visit.bits
                for visit in signature
                for _ in range(-(-len(visit.keys) // TILE))
            ]
            for signature in signatures
        ]
        ids = torch.tensor(tiles, device=self._bits.device)
        distinct, place = ids.unique(return_inverse=True)
        words = self._bits[distinct.clamp(min=0)].masked_fill((distinct < 0)[:, None, None], -1)
        hidden = (words[..., None] & self._each_bit).eq(0).flatten(2)
        tiles = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        empty = words.eq(0).all(-1)
        return tiles[place].transpose(1, 2).flatten(2)[..., :width], empty[place].all(1)


def _tile_ids(signature: Signature) -> Iterator[int]:
    """The bit tile of each column tile of a chunk, −1 for one that is all visible."""
    for visit in signature:
        for _ in range(0, len(visit.keys), TILE):
            yield -1 if visit.bits is None else visit.bits


def restriction(operands: Operands, spec: AttentionSpec) -> Mask | None:
    """Causal, window and mask of the call as one mask value, or None when every key is visible."""
    reach = spec.reach
    parts: list[Mask] = []
    if reach == (None, 0):
        parts.append(Causal())
    elif reach != (None, None):
        parts.append(Window(*reach))
    if spec.mask is not None:
        parts.append(unpack(spec.mask, operands.mask_tensors))
    return reduce(operator.and_, parts) if parts else None


def sequences(operands: Operands, spec: AttentionSpec) -> Iterator[Problem]:
    """The problems of a call as far as its geometry goes: one, one a batch row, or one a packed sequence."""
    q, k, v = operands.q, operands.k, operands.v
    heads, kv_heads = slice(0, spec.heads), slice(0, spec.kv_heads)
    offsets = None if operands.q_offset is None else operands.q_offset.tolist()
    fixed = spec.q_offset if isinstance(spec.q_offset, int) else None
    if operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None:
        starts_q, starts_k = operands.cu_seqlens_q.tolist(), operands.cu_seqlens_k.tolist()
        check_ends("cu_seqlens_q", starts_q, q.shape[2])
        check_ends("cu_seqlens_k", starts_k, k.shape[2])
        for s in range(spec.batch):
            rows, keys = slice(starts_q[s], starts_q[s + 1]), slice(starts_k[s], starts_k[s + 1])
            aligned = (keys.stop - keys.start) - (rows.stop - rows.start)
            offset = offsets[s] if offsets is not None else aligned if fixed is None else fixed
            parts = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            yield Problem(*parts, offset, heads, kv_heads, range(s, s + 1), rows=rows, keys=keys)
        return
    offset = spec.k_len - spec.q_len if fixed is None else fixed
    whole = Problem(q, k, v, offset, heads, kv_heads, range(spec.batch))
    if offsets is None:
        yield whole
        return
    for b in range(spec.batch):
        yield whole.at_batch(b, b + 1)._replace(offset=offsets[b])


def check_ends(name: str, ends: list[int], total: int) -> None:
    """Raises ValueError unless the cumulative lengths rise from 0 to the number of tokens."""
    if ends[0] != 0:
        raise bad_value(name, f"first value {ends[0]}", "0", "prepend a 0 to the cumulative sum of the lengths")
    if any(b < a for a, b in pairwise(ends)):
        raise bad_value(name, ends, "values that never fall", "pass the cumulative sum of the lengths")
    if ends[-1] != total:
        raise bad_value(name, f"last value {ends[-1]}", f"the number of tokens, {total}")


def tiled_problems(operands: Operands, spec: AttentionSpec) -> Iterator[tuple[Problem, RowTiles | None]]:
    """Every problem of the call with its rows of the tile map; None where all keys are visible."""
    mask = restriction(operands, spec)
    for whole in sequences(operands, spec):
        n, m = whole.q.shape[2], whole.k.shape[2]
        if mask is None or 0 in (n, m, whole.q.shape[0]):
            yield whole, None
            continue
        tiles = tile_map(mask, n, m, offset=whole.offset, heads=spec.heads)
        alone = tiles.batch == 1 or len(whole.indices) == 1
        for problem in [whole] if alone else [whole.at_batch(b, b + 1) for b in whole.indices]:
            first = min(problem.indices.start, tiles.batch - 1) * tiles.heads * tiles.q_tiles
            if tiles.heads == 1:
                yield problem, RowTiles(tiles, first)
                continue
            for h in range(spec.heads):
                yield problem.at_head(h, spec.group), RowTiles(tiles, first + h * tiles.q_tiles)


def allowed_pairs(problem: Problem, mask: Mask, spec: AttentionSpec) -> Tensor:
    """The whole boolean matrix of a problem, [1|B, 1|H, n, m]: for backends that hold N×M anyway."""
    n, m = problem.q.shape[2], problem.k.shape[2]
    matrix = dense(mask, n, m, device=problem.q.device, offset=problem.offset, heads=spec.heads)
    return matrix if matrix.shape[0] in (1, len(problem.indices)) else matrix[problem.indices.start :][:1]
