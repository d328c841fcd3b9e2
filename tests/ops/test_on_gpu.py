"""The same problems as on the CPU, on a GPU: every pair of features and many at once, on every backend that can."""

from __future__ import annotations

import pytest
import torch

import tilewise
from budget import assert_within
from cases import PAIRS, cotangents, make_case, ours, random_features, sizes_for

pytestmark = pytest.mark.gpu

BACKENDS = ("standard", "tiled", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair(pair: tuple[str, str], backend: str) -> None:
    features, seed = set(pair), PAIRS.index(pair)
    n, m = sizes_for(features, seed)
    case = make_case(features, n=n, m=m, seed=seed, device="cuda")
    dout, dlse = cotangents(case, seed)
    assert_within(ours(backend, device="cuda"), case, torch.float32, dout, dlse, f"{pair} {n}x{m}")


RANDOM_SETS = {"standard": 24, "tiled": 24, "triton": 200}


@pytest.mark.parametrize(
    ("backend", "seed"), [(name, seed) for name, count in RANDOM_SETS.items() for seed in range(count)]
)
def test_many_at_once(backend: str, seed: int) -> None:
    features = random_features(100 + seed)
    n, m = sizes_for(features, seed)
    dim = (1, 8, 40, 59, 64, 80, 96, 128)[seed % 8]
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    case = make_case(features, n=n, m=m, dim=dim, seed=seed, device="cuda")
    dout, dlse = cotangents(case, seed)
    label = f"{sorted(features)} {n}x{m} D={dim} {dtype}"
    assert_within(ours(backend, device="cuda"), case, dtype, dout, dlse, label)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [set(), {"causal"}, {"gqa"}])
def test_pytorchs_own(features: set[str], dtype: torch.dtype) -> None:
    for n in (1, 64, 129):
        for dim in (8, 64, 128):
            case = make_case(features, n=n, m=n, dim=dim)
            dout, dlse = cotangents(case)
            assert_within(ours("sdpa", device="cuda"), case, dtype, dout, dlse, f"N={n} D={dim}")


def test_a_call_can_be_captured() -> None:
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    for backend in ("sdpa", "triton"):
        expected = attend(q, backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q, backend)
        graph.replay()
        torch.testing.assert_close(out, expected)


def attend(q: torch.Tensor, backend: str) -> torch.Tensor:
    return tilewise.attention(q, q, q, causal=True, backend=backend)
