"""Every pair of features, forward and backward, on the PyTorch backends against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilewise
from budget import assert_within
from cases import PAIRS, SIZES, cotangents, make_case, ours, random_features, sizes_for

BACKENDS = ("standard", "tiled", "tiles")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair(pair: tuple[str, str], backend: str) -> None:
    features = set(pair)
    seed = PAIRS.index(pair)
    for size in (sizes_for(features, seed), (70, 90) if "dropout" not in features else (17, 22)):
        case = make_case(features, n=size[0], m=size[1], seed=seed)
        dout, dlse = cotangents(case, seed)
        assert_within(ours(backend), case, torch.float32, dout, dlse, f"{pair} {size}")
        assert_within(ours(backend), case, torch.float32, dout, None, f"{pair} {size} without dlse")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)], ids=str)
def test_sizes_of_zero(sizes: tuple[int, int, int, int], backend: str) -> None:
    batch, heads, n, m = sizes
    options: list[dict[str, Any]] = [
        {"causal": True},
        {"mask": torch.ones(batch, heads, n, m, dtype=torch.bool)},
        {"mask": tilewise.masks.Causal() | tilewise.masks.Window(1, 1)},
        {"bias": torch.zeros(batch, heads, n, m)},
        {"bias": tilewise.biases.Relative(torch.zeros(heads, 5))},
        {"alibi": torch.ones(heads)},
        {"alibi": torch.ones(batch, heads), "softcap": 2.0},
        {"sink": torch.zeros(heads), "dropout": 0.5},
        {"q_offset": torch.zeros(batch, dtype=torch.int32), "window": (1, 1)},
    ]
    for given in options:
        q = torch.randn(batch, heads, n, 8, requires_grad=True)
        k = torch.randn(batch, max(heads, 1), m, 8, requires_grad=True)
        out, lse = tilewise.attention(q, k, k, return_lse=True, backend=backend, **given)
        assert out.shape == q.shape
        assert (out == 0).all()
        assert (lse == (0.0 if "sink" in given else float("-inf"))).all()
        out.sum().backward()
        assert q.grad is not None
        assert k.grad is not None
        assert not k.grad.any()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("seed", range(40))
def test_many_at_once(seed: int, backend: str) -> None:
    features = random_features(seed)
    n, m = sizes_for(features, seed)
    dim = (1, 8, 40, 59, 64, 80, 96, 111)[seed % 8]
    dtype = (torch.float32, torch.float64, torch.float16, torch.bfloat16)[seed % 4]
    case = make_case(features, n=n, m=m, dim=dim, seed=seed)
    dout, dlse = cotangents(case, seed)
    assert_within(ours(backend), case, dtype, dout, dlse, f"{sorted(features)} {n}x{m} D={dim} {dtype}")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [set(), {"causal"}, {"window", "gqa"}, {"mask", "sink"}, {"bias", "softcap"}])
def test_dtypes(features: set[str], dtype: torch.dtype, backend: str) -> None:
    case = make_case(features, n=129, m=200, dim=64)
    dout, dlse = cotangents(case)
    assert_within(ours(backend), case, dtype, dout, dlse)
    assert_within(ours(backend, "bshd"), case, dtype, dout, None)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"], indirect=True)
@pytest.mark.parametrize(
    "features", [set(), {"causal"}, {"mask"}, {"window"}, {"gqa", "q_offset", "causal"}, {"empty"}]
)
def test_where_all_three_can(features: set[str], backend: str) -> None:
    for n, m in SIZES:
        case = make_case(features, n=n, m=m)
        dout, dlse = cotangents(case)
        assert_within(ours(backend), case, torch.float32, dout, dlse, f"{n}x{m}")
        assert_within(ours(backend), case, torch.bfloat16, dout, None, f"{n}x{m} bf16")


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"], indirect=True)
@pytest.mark.parametrize("dim", [192, 256, 512])
def test_wide_heads(dim: int, backend: str) -> None:
    case = make_case({"causal", "gqa"}, n=65, m=65, dim=dim, batch=1)
    dout, _ = cotangents(case)
    assert_within(ours(backend), case, torch.float32, dout)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"], indirect=True)
@pytest.mark.parametrize("magnitude", [30.0, 1e3])
def test_huge_logits(magnitude: float, backend: str) -> None:
    case = make_case({"causal"}, n=113, m=113, dim=40)
    case.tensors["q"].mul_(magnitude)
    dout, dlse = cotangents(case)
    assert_within(ours(backend), case, torch.float32, dout, dlse, huge_logits=True)
