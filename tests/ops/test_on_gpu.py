"""The same problems as on the CPU, on a GPU: every pair of features and many at once, on PyTorch's backends; and
`triton` under graphs, compiled graphs and checkpoints.

`triton` meets every pair and 200 sets of features in backends/triton/test_triton_features.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

import tilewise
from budget import assert_within
from cases import PAIRS, cotangents, make_case, ours, random_features, sizes_for
from tilewise.ops.arguments import build
from tilewise.ops.library import attention_op

pytestmark = pytest.mark.gpu

BACKENDS = ("standard", "tiled")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair(pair: tuple[str, str], backend: str) -> None:
    features, seed = set(pair), PAIRS.index(pair)
    n, m = sizes_for(features, seed)
    case = make_case(features, n=n, m=m, seed=seed, device="cuda")
    dout, dlse = cotangents(case, seed)
    assert_within(ours(backend, device="cuda"), case, torch.float32, dout, dlse, f"{pair} {n}x{m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(24))
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


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_offsets_under_a_mask_may_change_between_replays(backend: str) -> None:
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    offset = torch.zeros(1, device="cuda", dtype=torch.int32)

    def call() -> torch.Tensor:
        return tilewise.attention(q, q, q, mask=tilewise.masks.Window(20, 0), q_offset=offset, backend=backend)

    first = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    offset.fill_(150)
    graph.replay()
    assert torch.equal(out, call())
    assert not torch.equal(out, first)


def attend(q: torch.Tensor, backend: str) -> torch.Tensor:
    return tilewise.attention(q, q, q, causal=True, backend=backend)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graphs(dynamic: bool) -> None:
    def loss(q: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        out = tilewise.attention(q, q, q, causal=True, sink=sink, backend="triton")
        return out.float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for n in (130, 257):
        q = torch.randn(1, 4, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        sink = torch.randn(4, device="cuda", requires_grad=True)
        expected = torch.autograd.grad(loss(q, sink), (q, sink))
        found = torch.autograd.grad(compiled(q, sink), (q, sink))
        for have, want in zip(found, expected, strict=True):
            torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)


def test_opcheck() -> None:
    # Three tensors: the gradients of one that is all three are added in another order when traced.
    q, k, v = (torch.randn(1, 4, 70, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in "qkv")
    arguments = build(q, k, v, causal=True, dropout=0.2, backend="triton").seeded()
    torch.library.opcheck(attention_op, tuple(arguments))


def test_checkpointing_repeats_the_dropout_mask() -> None:
    q = torch.randn(2, 4, 129, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def drop(q: torch.Tensor) -> torch.Tensor:
        return tilewise.attention(q, q, q, dropout=0.3, backend="triton")

    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(drop(q).float().square().sum(), q)
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(drop, q, use_reentrant=False)
    (found,) = torch.autograd.grad(out.float().square().sum(), q)
    assert torch.equal(found, expected)
