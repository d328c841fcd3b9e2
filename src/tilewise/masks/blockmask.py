"""Tile maps from and to FlexAttention's `BlockMask`, exactly: its `mask_mod` is evaluated on every partial block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tilewise.errors import bad_value
from tilewise.masks.algebra import Mask
from tilewise.masks.compiler import from_tiles
from tilewise.masks.compiler import tile_map as compile_map
from tilewise.masks.coverage import TILE
from tilewise.masks.lines import EMPTY, FULL, from_edges
from tilewise.masks.tilemap import TileMap
from tilewise.masks.tiles import FromTiles

_PARTIAL = 2


def to_block_mask(
    mask: Mask | TileMap,
    n: int | None = None,
    m: int | None = None,
    *,
    offset: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """`mask` for n query rows and m keys as a BlockMask of 128×128 blocks on `device`; a `TileMap` brings its sizes.

    Its `mask_mod` looks the pair up in the map's bits, so it is exact on every pair, and it traces under vmap and
    compile. A BlockMask lists blocks in rows × columns of int32: this costs O(tiles²) bytes where a tile map does not.
    """
    if isinstance(mask, TileMap):
        tiles = mask
    else:
        tiles = compile_map(mask, _size(n, "n"), _size(m, "m"), offset=offset, heads=heads)
    if 0 in (tiles.n, tiles.m):
        raise bad_value("n" if tiles.n == 0 else "m", 0, "at least 1: a BlockMask has no empty form")
    grid = tiles.grid()
    shape = (tiles.batch, tiles.heads, tiles.q_tiles, tiles.k_tiles)

    def listed(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        order = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)
        counts = chosen.sum(axis=-1, dtype=np.int32)
        return torch.from_numpy(counts).view(shape[:-1]).to(device), torch.from_numpy(order).view(shape).to(device)

    words = np.zeros((len(tiles.bits) + 2, TILE, TILE // 32), np.uint32)
    words[1], words[2:] = 0xFFFFFFFF, tiles.bits
    entries = torch.from_numpy(grid).view(shape).to(device)
    bits = torch.from_numpy(words.view(np.int32)).to(device)
    one_sequence, one_head = tiles.batch == 1, tiles.heads == 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        tile = entries[b * 0 if one_sequence else b, h * 0 if one_head else h, q // TILE, k // TILE]
        return ((bits[tile, q % TILE, k % TILE // 32] >> (k % 32)) & 1) == 1

    return BlockMask.from_kv_blocks(
        *listed(grid > 1),
        *listed(grid == 1),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(tiles.n, tiles.m),
    )


def from_block_mask(block_mask: BlockMask) -> FromTiles:
    """The mask of a BlockMask of any block size; `.map` is its tile map. Reads the BlockMask on the host.

    A block listed as full is full; in a block listed as partial `mask_mod` is evaluated, pair by pair; any other block
    is empty, whatever `mask_mod` would say there, as in FlexAttention.
    """
    n, m = block_mask.seq_lengths
    block_n, block_m = block_mask.BLOCK_SIZE
    blocks = _listed(block_mask.kv_num_blocks, block_mask.kv_indices) * np.uint8(_PARTIAL)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        blocks[_listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)] = FULL
    batch, heads = blocks.shape[:2]
    rows, columns = -(-n // TILE), -(-m // TILE)
    lowest, highest = _extremes(blocks, n, m, block_n, block_m)
    full = (lowest == FULL) & (highest == FULL)
    line = from_edges(np.arange(full.size), np.where(full, FULL, EMPTY).reshape(-1), full.size)
    place = np.flatnonzero((highest > EMPTY) & ~full)
    within = np.arange(TILE)
    device = block_mask.kv_indices.device
    mask_mod = torch.vmap(block_mask.mask_mod)

    def look_at(some: np.ndarray) -> np.ndarray:
        plane, t, c = place[some] // (rows * columns), place[some] // columns % rows, place[some] % columns
        b, h = (plane // heads)[:, None, None], (plane % heads)[:, None, None]
        i = (t[:, None] * TILE + within).clip(max=n - 1)[:, :, None]
        j = (c[:, None] * TILE + within).clip(max=m - 1)[:, None, :]
        state = blocks[b, h, i // block_n, j // block_m]
        pairs = (np.broadcast_to(x, state.shape).reshape(-1) for x in (b, h, i, j))
        allowed = mask_mod(*(torch.from_numpy(x.copy()).to(device) for x in pairs)).cpu().numpy().reshape(state.shape)
        return (state == FULL) | ((state == _PARTIAL) & allowed)

    every = np.arange(len(place))
    return FromTiles(from_tiles((n, m, m - n, batch, heads), line, place, every, every, look_at))


def _size(size: int | None, name: str) -> int:
    if size is None:
        raise TypeError(f"to_block_mask: {name} is needed unless a TileMap brings it")
    return size


def _listed(counts: Tensor, indices: Tensor) -> np.ndarray:
    """bool [B, H, rows, columns]: the blocks of each row's list."""
    count, index = counts.cpu().numpy(), indices.cpu().numpy().astype(np.int64)
    within = np.arange(index.shape[-1]) < count[..., None]
    listed = np.zeros((*index.shape[:-1], index.shape[-1] + 1), np.bool_)
    np.put_along_axis(listed, np.where(within, index, index.shape[-1]), True, axis=-1)
    return listed[..., :-1]


def _extremes(blocks: np.ndarray, n: int, m: int, block_n: int, block_m: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest state of the blocks that each 128×128 tile touches: [B, H, q_tiles, k_tiles]."""

    def touched(size: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        start = np.arange(0, size, TILE)
        return start // block, (np.minimum(start + TILE, size) - 1) // block

    lowest, highest = blocks, blocks
    for axis, (size, block) in ((2, (n, block_n)), (3, (m, block_m))):
        first, last = touched(size, block)
        steps = int((last - first).max(initial=0)) + 1
        at = [np.minimum(first + step, last) for step in range(steps)]
        lowest = np.minimum.reduce([lowest.take(index, axis=axis) for index in at])
        highest = np.maximum.reduce([highest.take(index, axis=axis) for index in at])
    return lowest, highest
