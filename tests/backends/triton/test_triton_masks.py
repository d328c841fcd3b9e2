"""Tile maps in the kernels, forward and backward, against the oracle under the same mask written out densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_cases import ON_GPU, triton

from budget import Case, assert_within
from cases import cotangents, make_case
from tilewise.masks import Causal, Dense, Dilated, Documents, Global, Mask, PerHead, Prefix, Random, Strided, Window

pytestmark = pytest.mark.usefixtures("kernels")

N, M, HEADS = (350, 700, 4) if ON_GPU else (150, 290, 2)
IDS = np.repeat(np.arange(-(-M // 60)), 60)[:M]
MASKS: list[Mask] = [
    Causal(),
    Causal() | Prefix(200),
    Causal() & (Window(25, 0) | Global([0, 1])),
    Window(40, 3),
    Dilated(9, 8),
    Strided(7) & Causal(),
    Random(2, block=32, seed=5),
    Documents(IDS[-N:], IDS),
    Dense(np.random.default_rng(0).random((1, HEADS, N, M)) < 0.1),
    PerHead([Causal(), Window(3, 3), Prefix(5), ~Causal()][:HEADS]),
    ~(Causal() | Global([170])),
    Prefix(0),
    Prefix(128),
]
"""With full, partial and skipped tiles, empty rows, several runs a row, and maps that differ by head."""


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: str(mask)[:40])
@pytest.mark.parametrize("extra", [{"gqa"}, {"gqa", "sink", "softcap"}] if ON_GPU else [{"gqa"}])
def test_mask(mask: Mask, extra: set[str]) -> None:
    plain = make_case(extra, n=N, m=M, heads=HEADS, batch=1, dim=16)
    dense = torch.from_numpy(np.ascontiguousarray(mask.to_dense(N, M, heads=HEADS)))
    dense = dense.reshape((1,) * (4 - dense.dim()) + dense.shape) if dense.dim() < 4 else dense
    case = Case(plain.tensors, {**plain.options, "mask": dense})
    call = triton()
    dout, dlse = cotangents(case)
    assert_within(
        lambda *args, **options: call(*args, **{**options, "mask": mask}), case, torch.float32, dout, dlse, str(mask)
    )


@pytest.mark.parametrize("features", [{"mask", "relative"}, {"mask", "bias", "causal"}, {"mask", "window", "q_offset"}])
def test_dense_masks_with_biases(features: set[str]) -> None:
    case = make_case(features, n=130, m=150, heads=2, batch=1)
    dout, dlse = cotangents(case)
    assert_within(triton(), case, torch.float32, dout, dlse, f"{features}")
