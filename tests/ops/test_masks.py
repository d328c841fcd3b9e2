"""Attention under every named mask, forward and backward, against the oracle with the mask written down plainly."""

from __future__ import annotations

import mask_oracle
import numpy as np
import pytest
import torch
from mask_oracle import Problem, both, either, neither, per_head

import tilewise
from budget import Case, assert_within
from cases import cotangents, make_case, ours

N, M, HEADS = 150, 300, 4
IDS = np.repeat(np.arange(30), 10)
NAMED = {
    "causal": mask_oracle.causal(-20),
    "causal per sequence": mask_oracle.causal([5, -150]),
    "window": mask_oracle.window(40, 3),
    "dilated": mask_oracle.dilated(9, 8),
    "strided": mask_oracle.strided(7),
    "global": mask_oracle.global_([0, 170, 171]),
    "prefix": mask_oracle.prefix(33),
    "random": mask_oracle.random_blocks(2, 32, 5, per_head=True),
    "random tokens": mask_oracle.random_tokens(6, 5, per_head=True),
    "documents": mask_oracle.documents(IDS[-N:], IDS),
    "tree": mask_oracle.tree([-1, 0, 0, 1, 1, 2, 5]),
    "dense": mask_oracle.dense(np.random.default_rng(0).random((2, HEADS, N, M)) < 0.1),
    "empty": mask_oracle.prefix(0),
    "empty rows": both(mask_oracle.causal(-100), mask_oracle.window(20, 0)),
    "prefix-lm": either(mask_oracle.causal(0), mask_oracle.prefix(180)),
    "not causal": neither(mask_oracle.causal(0)),
    "per head": per_head(
        [
            mask_oracle.causal(0),
            mask_oracle.window(3, 3),
            mask_oracle.prefix(5),
            mask_oracle.random_blocks(1, 64, 0, per_head=True),
        ]
    ),
    "longformer": either(mask_oracle.window(30, 30), mask_oracle.global_([150, 299])),
    "causal & (window | global)": both(
        mask_oracle.causal(0), either(mask_oracle.window(25, 0), mask_oracle.global_([0, 1]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["standard", "tiled", "tiles"], indirect=True)
@pytest.mark.parametrize("extra", [set(), {"gqa", "sink", "softcap"}])
@pytest.mark.parametrize("name", NAMED)
def test_named_mask(name: str, extra: set[str], backend: str) -> None:
    mask, answer = NAMED[name]
    plain = make_case(extra, n=N, m=M, heads=HEADS)
    problem = Problem(N, M, (M - N, M - N), HEADS)
    case = Case(plain.tensors, {**plain.options, "mask": answer(problem)})
    call = ours(backend)

    def with_value(*args: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        return call(*args, **{**options, "mask": mask})

    dout, dlse = cotangents(case)
    assert_within(with_value, case, torch.float32, dout, dlse, name)


def test_constructors_are_their_combinations() -> None:
    longformer = tilewise.masks.Longformer(64, [0])
    bigbird = tilewise.masks.BigBird(64, 3, 1, 2, seed=1)
    q, k, v = (torch.randn(1, 4, 512, 16) for _ in range(3))
    for mask in (longformer, bigbird):
        allowed = torch.from_numpy(mask.to_dense(512, 512, heads=4))
        expected = tilewise.attention(q, k, v, allowed.expand(1, 4, 512, 512), backend="standard")
        torch.testing.assert_close(tilewise.attention(q, k, v, mask), expected)


def test_a_mask_with_an_offset_tensor() -> None:
    case = make_case({"offsets", "window"}, n=N, m=M)
    dout, dlse = cotangents(case)
    value = {"mask": tilewise.masks.Causal(), "causal": False}

    def with_value(*args: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        return ours("tiled")(*args, **{**options, **value})

    exact = Case(case.tensors, {**case.options, "causal": True})
    assert_within(with_value, exact, torch.float32, dout, dlse)


def test_a_written_to_mask_is_another_mask() -> None:
    q = torch.randn(1, 2, 200, 8)
    mask = torch.rand(200, 200) < 0.5
    mask[:, 0] = True
    first = tilewise.attention(q, q, q, mask)
    mask.logical_not_()
    mask[:, 0] = True
    second = tilewise.attention(q, q, q, mask)
    torch.testing.assert_close(second, tilewise.attention(q, q, q, mask.clone(), backend="standard"))
    assert not torch.allclose(first, second)


def test_a_mask_that_does_not_fit_says_so() -> None:
    q = torch.randn(1, 2, 20, 8)
    with pytest.raises(ValueError, match="ids"):
        tilewise.attention(q, q, q, tilewise.masks.Documents(torch.zeros(19, dtype=torch.int64)))
    with pytest.raises(ValueError, match="tokens"):
        tilewise.attention(q, q, q, tilewise.masks.Global([20]))
