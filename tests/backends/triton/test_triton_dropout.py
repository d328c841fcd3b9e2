"""Dropout in the kernels is the fixed function of SPEC 1.5, bit by bit, in every kernel and tile shape."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE

import oracle
import tilewise
from budget import worst
from tilewise.backends.base import Needs, Operands
from tilewise.backends.triton import TRITON
from tilewise.backends.triton.configs import Tile, TileSet
from tilewise.spec import AttentionSpec

pytestmark = pytest.mark.usefixtures("kernels")

TILES = [TileSet(*(Tile(64, 32, 4, 1),) * 4), TileSet(*(Tile(32, 64, 4, 1),) * 4), TileSet(*(Tile(16, 16, 4, 1),) * 4)]


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("seed", [0, 7, (1 << 40) + 12345, (1 << 62) - 1, -3])
def test_kept_elements_are_philox(seed: int, tiles: TileSet) -> None:
    batch, heads, n, m, p = 2, 2, 19, 30, 0.35
    q = torch.zeros(batch, heads, n, 8, device=DEVICE)
    k = torch.zeros(batch, heads, m, 8, device=DEVICE)
    v = torch.eye(m, device=DEVICE).expand(batch, heads, m, m).contiguous()
    spec = AttentionSpec(batch, heads, heads, n, m, 8, m, "float32", "cpu", 1.0, dropout=p)
    operands = Operands(q, k, v, seed=torch.tensor([seed], device=DEVICE))
    config = TRITON.configure(spec)._replace(tiles=tiles)
    out, lse = TRITON.forward(operands, spec, config)
    keep = oracle.philox_keep(seed, p, batch, heads, n, m)
    assert torch.equal(out.cpu() != 0, keep)
    assert worst(out.cpu(), keep / (1 - p) / m) < 1e-6
    # With dO = 1 the column sums of Z∘P/(1 − p) are dV.
    dout = torch.ones_like(out)
    grads = TRITON.backward(dout, None, operands, out, lse, spec, config, Needs())
    assert grads.v is not None
    assert worst(grads.v[..., 0].cpu(), (keep / (1 - p) / m).sum(2)) < 1e-5


def test_a_probability_next_to_one_keeps_next_to_nothing() -> None:
    q = torch.randn(1, 2, 33, 8, device=DEVICE)
    for backend in ("triton", "standard"):
        assert not tilewise.attention(q, q, q, dropout=1 - 1e-11, backend=backend).any()


@pytest.mark.parametrize("features", [{}, {"causal": True}, {"window": (9, 3), "softcap": 2.0}])
def test_gradients_with_dropout(features: dict) -> None:
    batch, heads, n, m, dim, p, seed = 1, 2, 40, 50, 16, 0.2, 99
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, size, dim, generator=g, dtype=torch.float64) for size in (n, m, m))
    dout = torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64)
    bias = torch.randn(1, 1, n, m, generator=g, dtype=torch.float64)
    keep = oracle.philox_keep(seed, p, batch, heads, n, m)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    exact, _ = oracle.attention(q, k, v, bias=bias, keep=keep, dropout=p, **features)
    expected = torch.autograd.grad(exact, leaves, dout)
    spec = AttentionSpec(
        batch, heads, heads, n, m, dim, dim, "float32", "cpu", dim**-0.5, dropout=p, bias=(1, 1, n, m), **features
    )
    q, k, v, bias = (x.detach().float().to(DEVICE) for x in leaves)
    operands = Operands(q, k, v, bias=bias, seed=torch.tensor([seed], device=DEVICE))
    config = TRITON.configure(spec)
    out, lse = TRITON.forward(operands, spec, config)
    assert worst(out.cpu(), exact) < 1e-5
    grads = TRITON.backward(dout.float().to(DEVICE), None, operands, out, lse, spec, config, Needs(bias=True))
    for ours, reference in zip(grads[:4], expected, strict=True):
        assert ours is not None
        assert worst(ours.cpu(), reference) < 2e-5
