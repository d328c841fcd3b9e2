"""Tile maps against matrices written down plainly (mask_oracle.py), their canonical form, and their transpose."""

from __future__ import annotations

import dataclasses
import random

import mask_oracle
import numpy as np
import pytest
from mask_oracle import Case, Problem

from tilewise.masks import TileMap


def widen(matrix: np.ndarray, problem: Problem) -> np.ndarray:
    return np.broadcast_to(matrix, (problem.batch, problem.heads, problem.n, problem.m))


def arguments(problem: Problem) -> dict[str, object]:
    one = len(set(problem.offset)) == 1
    return {"offset": problem.offset[0] if one else list(problem.offset), "heads": problem.heads}


def check_form(tiles: TileMap) -> None:
    """What kernels rely on: runs apart and in order, partial tiles ascending, bits cleared outside, none equal."""
    rows, n, m = tiles.rows, tiles.n, tiles.m
    for ptr, count in ((tiles.run_ptr, len(tiles.run_start)), (tiles.part_ptr, len(tiles.part_col))):
        assert ptr.shape == (rows + 1,)
        assert ptr[0] == 0
        assert ptr[-1] == count
        assert (np.diff(ptr) >= 0).all()
    for r in range(rows):
        runs = slice(tiles.run_ptr[r], tiles.run_ptr[r + 1])
        start, stop = tiles.run_start[runs], tiles.run_stop[runs]
        assert (start < stop).all()
        assert (start[1:] > stop[:-1]).all(), "neighbouring runs are one run"
        columns = tiles.part_col[tiles.part_ptr[r] : tiles.part_ptr[r + 1]]
        assert (np.diff(columns) > 0).all()
        covered = np.zeros(tiles.k_tiles + 1, np.int64)
        for a, b in zip(start, stop, strict=True):
            covered[a:b] += 1
        covered[columns] += 1
        assert covered.max(initial=0) <= 1
        if m % 128 and len(stop):
            assert stop[-1] <= m // 128, "the last column tile is partial where m is no multiple of 128"
    assert len({tile.tobytes() for tile in tiles.bits}) == len(tiles.bits)
    first_use = [int(np.flatnonzero(tiles.part_id == k)[0]) for k in range(len(tiles.bits))]
    assert first_use == sorted(first_use)
    bits = np.unpackbits(tiles.bits.view(np.uint8), axis=-1, bitorder="little").astype(bool)
    assert bits.any(axis=(1, 2)).all(), "an empty tile is skipped"
    row = np.repeat(np.arange(rows), np.diff(tiles.part_ptr)) % max(1, tiles.q_tiles)
    for t, c, k in {(int(t), int(c), int(k)) for t, c, k in zip(row, tiles.part_col, tiles.part_id, strict=True)}:
        height, width = min(128, n - 128 * t), min(128, m - 128 * c)
        assert not bits[k, height:].any()
        assert not bits[k, :, width:].any()
        assert width < 128 or not bits[k, :height].all(), "a full tile is in a run"
    assert tiles.full_tiles + tiles.partial_tiles + tiles.skipped_tiles == rows * tiles.k_tiles


def check(case: Case, problem: Problem) -> None:
    want = case.answer(problem).numpy()
    got = case.mask.to_dense(problem.n, problem.m, **arguments(problem))
    np.testing.assert_array_equal(widen(got, problem), want, err_msg=f"predicate of {case.mask} in {problem}")
    tiles = case.mask.tile_map(problem.n, problem.m, **arguments(problem))
    assert isinstance(tiles, TileMap)
    check_form(tiles)
    dense = tiles.to_dense()
    np.testing.assert_array_equal(widen(dense, problem), want, err_msg=f"tile map of {case.mask} in {problem}")
    assert tiles.visible == dense.sum()
    turned = tiles.transpose()
    check_form(turned)
    np.testing.assert_array_equal(turned.to_dense(), dense.swapaxes(2, 3), err_msg=f"transpose of {case.mask}")
    for field in dataclasses.fields(TileMap):
        again, first = getattr(turned.transpose(), field.name), getattr(tiles, field.name)
        np.testing.assert_array_equal(again, first, err_msg=f"{field.name} after two transposes of {case.mask}")


@pytest.mark.parametrize("kind", mask_oracle.LEAVES)
def test_every_mask_on_its_own(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(25):
        problem = mask_oracle.problem_of(rng)
        check(mask_oracle.leaf(kind, rng, problem, headed=True), problem)


@pytest.mark.parametrize("seed", range(15))
def test_random_expressions(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        problem = mask_oracle.problem_of(rng)
        check(mask_oracle.expression(rng, problem, depth=3), problem)
