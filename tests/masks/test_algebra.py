"""Masks as values: equality, hashing, laws of the algebra, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mask_oracle
import numpy as np
import pytest
import torch

from tilewise.masks import (
    BigBird,
    Causal,
    Dense,
    Dilated,
    Documents,
    Global,
    Longformer,
    Mask,
    PerHead,
    Prefix,
    Random,
    RandomTokens,
    Strided,
    Tree,
    Window,
    tile_map,
)
from tilewise.masks.sampling import draw_distinct
from tilewise.masks.tensors import to_block_mask


def same_arrays(a: Mask, b: Mask, n: int, m: int, **options: Any) -> None:
    """Both masks compile to the same arrays: a tile map is canonical."""
    one, other = tile_map(a, n, m, **options), tile_map(b, n, m, **options)
    for name in ("run_ptr", "run_start", "run_stop", "part_ptr", "part_col", "part_id", "bits"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{name}: {a} and {b}")


@pytest.mark.parametrize("seed", range(8))
def test_laws(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(5):
        problem = mask_oracle.problem_of(rng)._replace(offset=(rng.randint(-200, 300),), heads=2)
        a, b, c = (mask_oracle.expression(rng, problem, 1).mask for _ in range(3))
        n, m = problem.n, problem.m
        options: dict[str, Any] = {"offset": problem.offset[0], "heads": 2}
        for mask in (a, b, c):
            # Bring all to one number of heads, so that canonical maps can be compared array by array.
            assert mask.heads in (None, 2)
        apart = PerHead([Window(None, None), Window(None, None)])
        a, b, c = a & apart, b & apart, c & apart
        everything = Window(None, None) & apart
        same_arrays(~(a & b), ~a | ~b, n, m, **options)
        same_arrays(~(a | b), ~a & ~b, n, m, **options)
        same_arrays(a & (b | c), (a & b) | (a & c), n, m, **options)
        same_arrays(a | (a & b), a, n, m, **options)
        same_arrays(a & (a | b), a, n, m, **options)
        same_arrays(a | ~a, everything, n, m, **options)
        same_arrays(a & ~a, ~everything, n, m, **options)
        same_arrays(a & b, b & a, n, m, **options)
        assert a & a == a
        assert a | a == a
        assert ~~a == a
        assert a & b == b & a
        assert hash(a & b) == hash(b & a)
        assert (a & b) & c == a & (b & c)


ALIKE: list[tuple[Callable[[], Mask], Callable[[], Mask]]] = [
    (Causal, lambda: Causal(0)),
    (lambda: Causal([1, 2]), lambda: Causal(np.array([1, 2], np.int32))),
    (lambda: Causal(torch.tensor([1, 2], dtype=torch.int32)), lambda: Causal([1, 2])),
    (lambda: Window(3, None), lambda: Window(np.int64(3), None)),
    (lambda: Global(5), lambda: Global([5, 5])),
    (lambda: Global([0, 2, 1]), lambda: Global(range(3))),
    (lambda: Documents([0, 0, 1]), lambda: Documents(np.array([0, 0, 1]), torch.tensor([0, 0, 1]))),
    (lambda: Longformer(4, [0]), lambda: Global(0) | Window(2, 2)),
    (lambda: BigBird(64, 3, 1, 2, seed=5), lambda: Window(96, 96) | Global(range(64)) | Random(2, 64, 5)),
    (lambda: BigBird(64, 2, 0, 0), lambda: Window(64, 64)),
    (lambda: Tree([-1, 0]), lambda: Tree(torch.tensor([-1, 0]))),
    (lambda: PerHead([Causal(), Window(1, 1)]), lambda: PerHead((Causal(), Window(1, 1)))),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_equal_by_meaning(one: Callable[[], Mask], other: Callable[[], Mask]) -> None:
    assert one() == other()
    assert hash(one()) == hash(other())
    assert one() is not other()


def test_different_masks_differ() -> None:
    content = np.arange(6) % 2 == 0
    masks = [
        Causal(), Causal(1), Causal([0]), Window(0, 0), Window(0, None), Dilated(1, 2), Dilated(2, 1), Strided(2),
        Prefix(2), Global(2), Random(2), Random(2, seed=1), Random(2, per_head=False), RandomTokens(2),
        Documents([0, 1]), Documents([0, 1], [1, 0]), Tree([-1, 0]), Tree([-1, -1]), ~Causal(), Causal() & Window(0, 0),
        Causal() | Window(0, 0), PerHead([Causal()]), PerHead([Causal(), Causal()]), Dense(content), Dense(content),
    ]  # fmt: skip
    assert len(set(masks)) == len(masks)
    assert Causal() != "causal()"


def test_values_do_not_change() -> None:
    mask = Causal()
    with pytest.raises(AttributeError, match="values"):
        mask.offset = 3  # pyright: ignore[reportAttributeAccessIssue]
    ids = np.zeros(10, np.int64)
    documents = Documents(ids)
    ids[5:] = 1
    assert documents == Documents(np.zeros(10, np.int64))
    content = np.ones((4, 4), bool)
    dense = Dense(content)
    content[:] = False
    assert dense.to_dense(4, 4).all()


def used_masks() -> list[Mask]:
    masks: list[Mask] = [
        Causal(2), Causal([1, 2]), Causal() & Window(4, 1) | ~Global([1]), PerHead([Causal(), Window(1, 1)]),
        Documents([0, 0, 1, 1]), Tree([-1, 0, 0, 1]), Dense(np.eye(4) > 0), Dense(torch.eye(4) > 0),
    ]  # fmt: skip
    for mask in masks:
        hash(mask), str(mask)  # which a mask keeps
    return masks


def test_masks_go_to_other_processes() -> None:
    """Where strings hash to other numbers, and addresses mean other memory."""
    code = "import pickle, sys, test_algebra as t; sys.stdout.buffer.write(pickle.dumps(t.used_masks()))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "77"},
        stdout=subprocess.PIPE,
        check=True,
    )
    for mask, again in zip(used_masks(), pickle.loads(there.stdout), strict=True):  # noqa: S301 - our own bytes
        assert str(mask) == str(again)
        assert (mask.to_dense(4, 4) == again.to_dense(4, 4)).all()
        dense = isinstance(mask, Dense)
        assert (mask == again) == (hash(mask) == hash(again)) == (not dense)


def through_bytes(mask: Dense) -> Dense:
    return pickle.loads(pickle.dumps(mask))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("content", [np.eye(9) > 0, torch.eye(9) > 0], ids=["numpy", "torch"])
@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, through_bytes])
def test_a_copy_of_a_dense_mask_looks_at_its_own_memory(remake: Callable[[Dense], Dense], content: Any) -> None:
    mask = Dense(content)
    again = remake(mask)
    assert (again.to_dense(9, 9) == np.eye(9)).all()
    assert tile_map(again, 9, 9).visible == 9
    if remake is not copy.copy:
        assert again != mask
        assert again.content.identity != mask.content.identity


def test_dense_follows_its_tensor() -> None:
    tensor = torch.rand(1, 1, 20, 30) > 0.5
    assert Dense(tensor) == Dense(tensor)
    assert Dense(tensor[0]) == Dense(tensor[0])
    assert Dense(tensor) != Dense(tensor.clone())
    assert Dense(tensor).content != Dense(tensor.clone()).content
    before = Dense(tensor)
    assert tile_map(before, 20, 30).visible == int(tensor.sum())
    tensor.fill_(True)
    assert before != Dense(tensor)
    with pytest.raises(ValueError, match="written to since"):
        before.to_dense(20, 30)
    assert tile_map(Dense(tensor), 20, 30).visible == 600


def test_shapes_follow_the_mask() -> None:
    assert Causal().to_dense(3, 5).shape == (3, 5)
    assert PerHead([Causal(), Window(1, 1)]).to_dense(3, 5).shape == (2, 3, 5)
    assert Documents(np.zeros((4, 3), int), np.zeros(5, int)).to_dense(3, 5).shape == (4, 1, 3, 5)
    assert Causal().to_dense(3, 5, offset=[0, 1, 2]).shape == (3, 1, 3, 5)
    assert Random(1).to_dense(3, 5, heads=6).shape == (6, 3, 5)
    assert Random(1, per_head=False).to_dense(3, 5, heads=6).shape == (3, 5)
    assert Causal().to_dense(3, 5, heads=6).shape == (3, 5)


def test_alignment() -> None:
    np.testing.assert_array_equal(Causal().to_dense(2, 4), np.tri(2, 4, 2, dtype=bool))
    np.testing.assert_array_equal(Causal().to_dense(2, 4, offset=0), np.tri(2, 4, 0, dtype=bool))
    np.testing.assert_array_equal(Causal(-1).to_dense(4, 4), np.tri(4, 4, -1, dtype=bool))
    chain = [-1, *range(6)]
    np.testing.assert_array_equal(Tree(chain).to_dense(9, 12), Causal().to_dense(9, 12))


def test_sparsity_counts_pairs() -> None:
    for mask, n, m in ((Causal(), 1000, 1000), (Window(100, 3) | Global(7), 300, 513), (~Prefix(77), 129, 200)):
        assert mask.sparsity(n, m) == pytest.approx(1 - mask.to_dense(n, m).mean(), abs=1e-12)


def test_draws_are_distinct_spread_and_pure() -> None:
    rows = np.arange(4000)
    drawn = np.stack(draw_distinct(np, 3, rows, 0, 5, 40))
    assert ((drawn >= 0) & (drawn < 40)).all()
    assert (np.diff(np.sort(drawn, axis=0), axis=0) > 0).all()
    counts = np.bincount(drawn.reshape(-1), minlength=40)
    # 4000·5/40 = 500 are expected; the standard deviation is √(4000·(1/8)·(7/8)) ≈ 21, and 40 counts stay within 4.5.
    assert np.abs(counts - 500).max() < 4.5 * 21
    for row in (0, 1, 3999):
        assert set(drawn[:, row].tolist()) == mask_oracle.drawn(3, row, 0, 5, 40)
    assert not np.array_equal(drawn, np.stack(draw_distinct(np, 4, rows, 0, 5, 40)))
    assert not np.array_equal(drawn, np.stack(draw_distinct(np, 3, rows, 1, 5, 40)))
    np.testing.assert_array_equal(drawn, torch.stack(draw_distinct(torch, 3, torch.from_numpy(rows), 0, 5, 40)).numpy())
    assert len(draw_distinct(np, 0, rows, 0, 9, 4)) == 4
    # What a seed means is part of the format: a mask kept with a checkpoint must mean the same tomorrow.
    np.testing.assert_array_equal(drawn[:, :3].T, GOLDEN)


GOLDEN = np.array([[2, 34, 15, 20, 4], [15, 28, 7, 1, 30], [18, 0, 9, 37, 16]])


def test_random_blocks_do_not_depend_on_where_a_chunk_starts() -> None:
    mask = Random(3, 32, seed=2)
    whole = mask.to_dense(500, 500, heads=2)
    np.testing.assert_array_equal(mask.to_dense(100, 500, offset=250, heads=2), whole[:, 250:350])
    assert (whole.reshape(2, 500, -1)[:, ::32].sum(axis=2) >= 2 * 32).all()
    assert not np.array_equal(whole[0], whole[1])


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Window(-1, 0), ValueError, "left: got -1"),
    (lambda: Window(0, -5), ValueError, "right: got -5"),
    (lambda: Window(0.5, 0), TypeError, "left: got float"),  # pyright: ignore[reportArgumentType]
    (lambda: Window(True, 0), TypeError, "left: got bool"),
    (lambda: Dilated(4, 0), ValueError, "step: got 0"),
    (lambda: Dilated(-4, 1), ValueError, "window: got -4"),
    (lambda: Dilated(1 << 20, 1 << 20), ValueError, "below 2³¹"),
    (lambda: Strided(0), ValueError, "step: got 0"),
    (lambda: Tree([1, 0]), ValueError, "parents: got parents.0. = 1; wants −1, since the first node is a root"),
    (lambda: Causal().to_dense(2.0, 3), TypeError, "n: got float; wants an int"),  # pyright: ignore[reportArgumentType]
    (lambda: Causal().show(3, 0), ValueError, "m: got 0; wants at least 1"),
    (lambda: to_block_mask(Causal(), 0, 3), ValueError, "n: got 0; wants at least 1"),
    (lambda: Prefix(-1), ValueError, "n: got -1"),
    (lambda: Global([]), ValueError, "tokens: got no tokens"),
    (lambda: Global([3, -1]), ValueError, "tokens: got -1"),
    (lambda: Global([5]).to_dense(5, 5), ValueError, "tokens: got token 5 with 5 keys"),
    (lambda: Global([5]).tile_map(9, 5), ValueError, "tokens: got token 5 with 5 keys"),
    (lambda: Random(-1), ValueError, "blocks: got -1"),
    (lambda: Random(1, 0), ValueError, "block: got 0"),
    (lambda: RandomTokens(-1), ValueError, "n: got -1"),
    (lambda: Documents([0.5]), TypeError, "q_ids: got float64"),
    (lambda: Documents(torch.zeros(3)), TypeError, "q_ids: got torch.float32"),
    (lambda: Documents(np.zeros((1, 2, 3), int)), ValueError, r"q_ids: got shape \[1, 2, 3\]"),
    (lambda: Documents([0, 1]).tile_map(3, 3), ValueError, "q_ids: got 2 ids"),
    (lambda: Documents([0, 1]).tile_map(2, 3), ValueError, "k_ids: got 2 ids.*give `k_ids`"),
    (lambda: Documents(np.zeros((2, 4), int), np.zeros((3, 4), int)), ValueError, "2 and 3 sequences"),
    (lambda: Tree([]), ValueError, "parents: got no nodes"),
    (lambda: Tree([-1, 1]), ValueError, r"parents\[1\] = 1"),
    (lambda: Tree([-1, 0, 5]), ValueError, r"parents\[2\] = 5"),
    (lambda: Tree([-2]), ValueError, r"parents\[0\] = -2"),
    (lambda: Tree([-1, 0, 1]).tile_map(2, 9), ValueError, "3 nodes with 2 query rows"),
    (lambda: Dense(np.zeros((3, 3))), TypeError, "content: got a float64 array.*bias"),
    (lambda: Dense(torch.zeros(3, 3)), TypeError, "content: got a torch.float32 tensor.*bias"),
    (lambda: Dense(np.zeros((1, 1, 1, 3, 3), bool)), ValueError, "content: got shape"),
    (lambda: Dense(np.zeros((3, 4), bool)).tile_map(4, 3), ValueError, "transpose"),
    (lambda: Causal([1, 2]).tile_map(4, 4, offset=[1, 2, 3]), ValueError, "2 and 3 sequences"),
    (lambda: Causal([[1, 2]]), ValueError, "offset: got shape"),
    (lambda: Causal("3"), TypeError, "offset: got"),
    (lambda: Causal().tile_map(-1, 4), ValueError, "n: got -1"),
    (lambda: PerHead([]), ValueError, "masks: got no masks"),
    (lambda: PerHead([PerHead([Causal()])]), ValueError, "already names 1 heads"),
    (lambda: PerHead([Causal(), np.ones((2, 2), bool)]), TypeError, "masks: got ndarray"),  # pyright: ignore[reportArgumentType]
    (lambda: PerHead([Causal()] * 2) & PerHead([Causal()] * 3), ValueError, "2 and 3 heads"),
    (lambda: PerHead([Causal()] * 2).tile_map(4, 4, heads=3), ValueError, "heads: got 3"),
    (lambda: Longformer(3, [0]), ValueError, "window: got 3"),
    (lambda: BigBird(0, 1, 1, 1), ValueError, "block: got 0"),
    (lambda: RandomTokens(64).tile_map(1 << 20, 1 << 20), ValueError, "67,108,864 partial tiles"),
    (lambda: tile_map(np.ones((2, 2), bool), 2, 2), TypeError, "mask: got ndarray"),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("act", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(act: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_only_masks_combine() -> None:
    with pytest.raises(TypeError):
        Causal() & 3  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError, match=r"mask: got Tensor; wants a mask. Fix: wrap a boolean tensor in `Dense`"):
        Causal() & torch.ones(2, 2, dtype=torch.bool)  # pyright: ignore[reportOperatorIssue]
    for act in (lambda: Causal() and Window(1, 1), lambda: not Causal(), lambda: bool(Causal() | Window(1, 1))):
        with pytest.raises(TypeError, match=r"truth value; wants `&`, `|` and `~`"):
            act()
    with pytest.raises(TypeError):
        torch.ones(2, 2, dtype=torch.bool) | Causal()  # pyright: ignore[reportOperatorIssue]
