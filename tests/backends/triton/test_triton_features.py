"""Features of SPEC 1.5 in pairs and many at once, forward and every gradient, against the float64 oracle."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, ON_GPU, assert_within_on_device, triton

from budget import assert_within
from cases import FEATURES, cotangents, make_case

pytestmark = pytest.mark.usefixtures("kernels")

EXCLUSIVE = ({"q_offset", "offsets"}, {"bias", "relative"})
PAIRS = [pair for pair in combinations(FEATURES, 2) if set(pair) not in EXCLUSIVE]
SIZES = [(1, 1), (2, 1), (1, 63), (63, 64), (64, 65), (65, 113), (113, 40), (129, 150), (140, 128)]
SMALL = [(1, 1), (2, 1), (1, 13), (33, 30), (20, 33)]
SEEDS = 200 if ON_GPU else 20


def sizes(features: set[str], seed: int) -> tuple[int, int]:
    n, m = (SMALL if "dropout" in features else SIZES)[seed % (5 if "dropout" in features else 9)]
    return (n * 5, m * 3) if ON_GPU and "dropout" not in features else (n, m)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair(pair: tuple[str, str]) -> None:
    seed = PAIRS.index(pair)
    n, m = sizes(set(pair), seed)
    case = make_case(
        set(pair), n=n, m=m, batch=2 if ON_GPU else 1 + seed % 2, heads=4 if ON_GPU else 2, seed=seed, device=DEVICE
    )
    dout, dlse = cotangents(case, seed)
    assert_within(triton(), case, torch.float32, dout, dlse if seed % 3 else None, f"{pair} {n}×{m}")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_many_at_once(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    features = {name for name in FEATURES if torch.rand(1, generator=g) < 0.4}
    for pair in EXCLUSIVE:
        if pair <= features:
            features.discard(min(pair))
    n, m = sizes(features, seed)
    dims = (1, 8, 40, 59, 64, 80, 96, 111) if not ON_GPU else (1, 8, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256)
    dim, dtype = dims[seed % len(dims)], DTYPES[seed % len(DTYPES)]
    case = make_case(
        features, n=n, m=m, batch=2 if ON_GPU else 1, heads=4 if ON_GPU else 2, dim=dim, seed=seed, device=DEVICE
    )
    dout, dlse = cotangents(case, seed)
    assert_within_on_device(case, dtype, dout, dlse, f"{sorted(features)} {n}×{m} D={dim} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128, 256, 512] if ON_GPU else [16, 64])
@pytest.mark.parametrize("features", [set(), {"causal"}, {"window", "gqa"}, {"mask", "sink"}, {"bias", "softcap"}])
def test_dtypes(features: set[str], dim: int, dtype: torch.dtype) -> None:
    n, m = (257, 400) if ON_GPU else (65, 70)
    case = make_case(features, n=n, m=m, batch=1, heads=2, dim=dim)
    dout, dlse = cotangents(case)
    assert_within_on_device(case, dtype, dout, dlse)
    if not (ON_GPU and dtype == torch.float32):
        assert_within(triton("bshd"), case, dtype, dout, None)
