"""Masks over an op boundary, tile maps as tensors, their cache, and the exchange with FlexAttention."""

from __future__ import annotations

import dataclasses
import gc
import random
from typing import Any

import mask_oracle
import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask

from tilewise.masks import (
    Causal,
    Dense,
    Documents,
    FromTiles,
    Global,
    Mask,
    PerHead,
    Prefix,
    Random,
    TileMap,
    Window,
    compiler,
    tensors,
)
from tilewise.masks.compiler import tile_map


@pytest.mark.parametrize("seed", range(5))
def test_pack_and_unpack(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        problem = mask_oracle.problem_of(rng)
        mask = mask_oracle.expression(rng, problem, depth=3).mask
        text, packed = tensors.pack(mask)
        assert all(isinstance(tensor, torch.Tensor) for tensor in packed)
        again = tensors.unpack(text, packed)
        assert again == mask
        assert tensors.pack(again) == (text, packed) if not packed else tensors.pack(again)[0] == text


def test_unpack_sees_writes_to_ids() -> None:
    ids = torch.tensor([0, 0, 1, 1])
    first = tensors.unpack("documents($0)", [ids])
    assert tensors.unpack("documents($0)", [ids]) is first
    ids[1] = 1
    assert tensors.unpack("documents($0)", [ids]) == Documents([0, 1, 1, 1])
    assert first == Documents([0, 0, 1, 1])


def test_as_mask() -> None:
    tensor = torch.ones(4, 4, dtype=torch.bool)
    assert tensors.as_mask(tensor) == Dense(tensor)
    assert tensors.as_mask(Causal()) == Causal()
    with pytest.raises(TypeError, match="boolean"):
        tensors.as_mask(torch.ones(4, 4))


def test_tensors_are_the_map() -> None:
    mask, n, m = Causal() & (Window(200, 0) | Global([0, 400])), 513, 700
    for transposed in (False, True):
        tiles = tile_map(mask, n, m)
        tiles = tiles.transpose() if transposed else tiles
        got = tensors.tile_map(mask, n, m, transposed=transposed)
        assert (got.n, got.m, got.batch, got.heads) == (tiles.n, tiles.m, 1, 1)
        assert all(field.dtype == torch.int32 for field in got if isinstance(field, torch.Tensor))
        np.testing.assert_array_equal(got.run_begin, tiles.run_ptr[:-1])
        np.testing.assert_array_equal(got.run_end, tiles.run_ptr[1:])
        np.testing.assert_array_equal(got.part_end, tiles.part_ptr[1:])
        for name in ("run_start", "run_stop", "part_col", "part_id"):
            np.testing.assert_array_equal(getattr(got, name), getattr(tiles, name))
        np.testing.assert_array_equal(got.bits.numpy().view(np.uint32), tiles.bits)
        assert tensors.tile_map(mask, n, m, transposed=transposed) is got
    assert isinstance(mask.tile_map(n, m, "cpu"), tensors.TileTensors)


def test_cache_keeps_no_tensor_alive() -> None:
    compiler._MAPS.clear()
    tensors._TENSORS.clear()
    content = torch.rand(1, 2, 200, 300) > 0.5
    first = tensors.tile_map(Dense(content), 200, 300)
    assert tensors.tile_map(Dense(content), 200, 300) is first
    assert tensors.tile_map(tensors.unpack(*tensors.pack(Dense(content))), 200, 300) is first
    content[0, 0, 0] = True
    assert tensors.tile_map(Dense(content), 200, 300) is not first
    assert len(compiler._MAPS) == len(tensors._TENSORS) == 2
    del content
    gc.collect()
    assert len(compiler._MAPS) == len(tensors._TENSORS) == 0
    with torch.inference_mode():
        untracked = torch.rand(200, 300) > 0.5
        seen = tensors.tile_map(Dense(untracked), 200, 300)
        untracked.fill_(False)
        assert tensors.tile_map(Dense(untracked), 200, 300).bits.shape != seen.bits.shape
    assert len(compiler._MAPS) == 0


def test_cache_is_bounded() -> None:
    compiler._MAPS.clear()
    for size in range(1, 300):
        tile_map(Causal(), size, size)
    assert len(compiler._MAPS) == 128
    offsets = [tile_map(Causal(), 10, 10, offset=k) for k in (0, 1)]
    assert offsets[0] is not offsets[1]
    assert tile_map(Causal(), 10, 10, offset=0) is offsets[0]
    assert tile_map(Random(1), 10, 10, heads=2) is not tile_map(Random(1), 10, 10, heads=3)


def test_another_device_is_refused() -> None:
    elsewhere = Causal(torch.zeros(2, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match="offset on meta"):
        tensors.tile_map(elsewhere, 4, 4, device="cpu")


def same_map(a: TileMap, b: TileMap) -> None:
    for field in dataclasses.fields(TileMap):
        if field.name != "offset":
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


ROUND = [
    Causal(),
    Causal() & (Window(100, 0) | Global([0, 130])),
    ~Window(64, 64) | Prefix(128),
    PerHead([Causal(), Window(20, 300), Prefix(129)]),
    Documents(np.sort(np.arange(1000) * 7919 % 6)) & Causal(),
]


@pytest.mark.parametrize("mask", ROUND, ids=str)
def test_block_mask_round_trip(mask: Mask) -> None:
    n = m = 1000
    tiles = tile_map(mask, n, m)
    block_mask = tensors.to_block_mask(mask, n, m)
    assert block_mask.seq_lengths == (n, m)
    back = tensors.from_block_mask(block_mask)
    same_map(back.map, tiles)
    same_map(tile_map(back, n, m), tiles)
    assert tensors.from_block_mask(tensors.to_block_mask(back.map)).map.n == n
    # The mask_mod alone answers for every pair, in full and empty blocks too.
    pairs = create_mask(block_mask.mask_mod, tiles.batch, tiles.heads, n, m, device="cpu")
    np.testing.assert_array_equal(pairs.numpy(), tiles.to_dense())
    combined = create_mask(
        and_masks(block_mask.mask_mod, lambda b, h, q, k: q >= k), 1, tiles.heads, n, m, device="cpu"
    )
    np.testing.assert_array_equal(combined.numpy(), tiles.to_dense() & np.tri(n, m, dtype=bool))


@pytest.mark.parametrize("block", [128, 64, 256, (64, 256), (100, 130)], ids=str)
@pytest.mark.parametrize("sizes", [(600, 600), (257, 513), (128, 1)], ids=str)
def test_from_block_masks_of_any_block_size(block: Any, sizes: tuple[int, int]) -> None:
    n, m = sizes
    documents = torch.arange(max(n, m)) // 90

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q + b * 50 >= k) & ((documents[q] == documents[k]) | (k < h * 100))

    block_mask = create_block_mask(mask_mod, 2, 3, n, m, device="cpu", BLOCK_SIZE=block)
    mask = tensors.from_block_mask(block_mask)
    want = create_mask(mask_mod, 2, 3, n, m, device="cpu").numpy()
    np.testing.assert_array_equal(mask.map.to_dense(), want)
    np.testing.assert_array_equal(mask.to_dense(n, m), want)
    np.testing.assert_array_equal((mask & Causal()).tile_map(n, m).to_dense(), want & Causal().to_dense(n, m))
    same_map(mask.map, tile_map(Dense(want), n, m))


def test_partial_blocks_are_what_the_mask_mod_says() -> None:
    """All blocks listed as partial, none as full: fullness is found by evaluating."""
    full = torch.zeros(1, 1, 3, dtype=torch.int32)
    counts, indices = torch.tensor([[[1, 2, 3]]]).int(), torch.tensor([[[[0, 9, 9], [1, 0, 9], [2, 1, 0]]]]).int() % 3
    block_mask = BlockMask.from_kv_blocks(
        counts, indices, full, torch.zeros_like(indices), mask_mod=lambda b, h, q, k: q >= k, seq_lengths=(384, 384)
    )
    same_map(tensors.from_block_mask(block_mask).map, tile_map(Causal(), 384, 384))


def test_tile_maps_as_masks() -> None:
    mask = PerHead([Causal(), Window(20, 300)])
    held = FromTiles(tile_map(mask, 300, 513))
    assert str(held) == "tiles($0)"
    np.testing.assert_array_equal(held.to_dense(300, 513), mask.to_dense(300, 513))
    both = held & ~Prefix(5)
    np.testing.assert_array_equal(both.tile_map(300, 513).to_dense()[0], (mask & ~Prefix(5)).to_dense(300, 513))
    again = tensors.unpack(*tensors.pack(both))
    assert again == both
    same_map(tile_map(again, 300, 513), tile_map(both, 300, 513))
    with pytest.raises(ValueError, match="300 rows and 513 keys"):
        held.tile_map(513, 300)
    content = held.content.host().copy()
    for wrong in (content[:5], content[:-1], np.append(content, 0)):
        with pytest.raises(ValueError, match="content"):
            FromTiles(wrong)
    content[7] = 1
    with pytest.raises(ValueError, match="out of range"):
        FromTiles(content)


def test_pack_traces_into_one_graph() -> None:
    mask = Causal() & Window(3, 0)

    def scores(x: torch.Tensor) -> torch.Tensor:
        text, packed = tensors.pack(mask)
        return x * (len(text) + len(packed))

    compiled = torch.compile(scores, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.ones(3)), torch.full((3,), float(len(str(mask)))))
