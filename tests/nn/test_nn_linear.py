"""Linear attention as modules: what they compute, decoding with a state, padding, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilewise.nn as tnn
from linear_oracle import linear_attention as oracle
from tilewise.caches import DenseCache, RecurrentCache
from tilewise.caches.contents import KV
from tilewise.errors import UnsupportedError
from tilewise.masks import Causal, Window

MODULES = {
    "linear": lambda: tnn.LinearAttention(16, 2, causal=True),
    "relu": lambda: tnn.LinearAttention(16, 2, causal=True, feature_map="relu"),
    "taylor": lambda: tnn.LinearAttention(16, 2, causal=True, feature_map="taylor"),
    "favor": lambda: tnn.LinearAttention(16, 2, causal=True, feature_map=tnn.FavorFeatures(8, 24)),
    "learned": lambda: tnn.LinearAttention(
        16, 2, causal=True, feature_map=nn.Sequential(nn.Linear(8, 6), nn.Softplus())
    ),
    "retention": lambda: tnn.Retention(16, 2),
    "gla": lambda: tnn.GatedLinearAttention(16, 2),
    "rwkv6": lambda: tnn.RWKV6TimeMix(16, 2, mix_rank=4, decay_rank=4),
}


def make(name: str) -> Any:
    torch.manual_seed(1)
    return MODULES[name]().double()


def tokens(n: int = 21, batch: int = 3) -> Tensor:
    return torch.randn(batch, n, 16, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("name", MODULES)
def test_decoding_is_the_whole_sequence(name: str) -> None:
    """Prefill, single tokens and a few at once, with a cache that never grows."""
    module, x = make(name), tokens()
    whole = module(x)
    cache = module.make_cache(3)
    size = cache.nbytes
    parts = [module(part, cache=cache) for part in x.split((10, 1, 1, 1, 5, 3), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.lengths.tolist() == [21] * 3
    assert cache.nbytes == size


@pytest.mark.parametrize("name", MODULES)
def test_a_token_sees_only_its_past_and_everything_has_a_gradient(name: str) -> None:
    module, x = make(name), tokens().requires_grad_()
    out = module(x)
    (grad,) = torch.autograd.grad(out[:, 9].sum(), x, retain_graph=True)
    assert not grad[:, 10:].any()
    assert grad[:, :10].abs().sum((0, 2)).all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("name", ["linear", "relu", "retention", "gla"])
def test_padding_is_left_out(name: str) -> None:
    module, x = make(name), tokens()
    mask = torch.ones(3, 1, 1, 21, dtype=torch.bool)
    mask[1, ..., 12:] = False
    out = module(x, mask=mask)
    other = x.clone()
    other[1, 12:] = 5.0
    torch.testing.assert_close(module(other, mask=mask)[1, :12], out[1, :12])
    torch.testing.assert_close(module(x[1:2, :12]), out[1:2, :12])
    torch.testing.assert_close(module(x, mask=Causal()), module(x))


def test_linear_attention_is_the_formula() -> None:
    module, x, y = tnn.LinearAttention(16, 2, v_head_dim=5).double(), tokens(), tokens(13)
    for k in (x, y):
        heads = [
            p(z).unflatten(-1, (2, -1)).transpose(1, 2)
            for p, z in ((module.q_proj, x), (module.k_proj, k), (module.v_proj, k))
        ]
        out = oracle(*heads, causal=False)[0].transpose(1, 2).flatten(2)
        torch.testing.assert_close(module(x, k), module.o_proj(out))
    hidden = torch.ones(3, 1, 1, 13, dtype=torch.bool)
    hidden[..., 8:] = False
    torch.testing.assert_close(module(x, y, mask=hidden), module(x, y[:, :8]))


def test_retention_and_gla_are_their_formulas() -> None:
    x = tokens()
    for module in (tnn.Retention(16, 2).double(), tnn.GatedLinearAttention(16, 2).double()):
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
        if isinstance(module, tnn.Retention):
            decay = (1 - 2.0 ** -torch.tensor([5.0, 6.0], dtype=torch.float64)).log()
            assert module.rotary is not None
            q, k = module.rotary(q), module.rotary(k)
        else:
            gates = module.decay_up(module.decay_down(x)).unflatten(-1, (2, -1)).transpose(1, 2)
            decay = gates.sigmoid().log() / 16
        out = oracle(q, k, v, causal=True, feature_map=None, decay=decay, scale=q.shape[-1] ** -0.5)[0].transpose(1, 2)
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight
        torch.testing.assert_close(
            module(x), module.o_proj(out.flatten(2) * F.silu(module.gate_proj(x))), rtol=1e-5, atol=1e-6
        )


def test_rwkv6_is_its_formula() -> None:
    """Token by token, as the paper writes it."""
    module, x = make("rwkv6"), tokens(6, 1)
    mix, state, rows = module.mix, torch.zeros(2, 8, 8, dtype=torch.float64), []
    before = torch.zeros(16, dtype=torch.float64)
    nn.init.normal_(module.bonus)
    for now in x[0]:
        base = now + (before - now) * mix[5]
        low = torch.tanh(module.mix_down(base)).view(5, 4)
        r, k, v, g, w = (now + (before - now) * (mix[i] + low[i] @ module.mix_up[i]) for i in range(5))
        w = (-(module.decay_base + module.decay_up(torch.tanh(module.decay_down(w)))).exp()).exp().view(2, 8)
        r, k, v = (p(z).view(2, 8) for p, z in ((module.r_proj, r), (module.k_proj, k), (module.v_proj, v)))
        pair = k[:, :, None] * v[:, None]
        out = torch.einsum("hk,hkd->hd", r, state + module.bonus[:, :, None] * pair)
        state = w[:, :, None] * state + pair
        out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, keepdim=True, unbiased=False) + 2e-5).sqrt()
        out = out.flatten() * module.norm.weight + module.norm.bias
        rows.append(module.o_proj(out * F.silu(module.gate_proj(g))))
        before = now
    torch.testing.assert_close(module(x)[0], torch.stack(rows))


def test_favor_features_are_drawn_anew_and_unbiased() -> None:
    features = tnn.FavorFeatures(8, 16, generator=torch.Generator().manual_seed(0))
    before = features.projection.clone()
    assert "projection" in features.state_dict()
    features.redraw()
    assert not torch.equal(features.projection, before)
    q, k = 0.5 * torch.randn(2, 8), 0.5 * torch.randn(2, 8)
    drawn = []
    for _ in range(400):
        features.redraw()
        drawn.append((features(q) * features(k)).sum(-1))
    estimate, exact = torch.stack(drawn), ((q * k).sum(-1) / 8**0.5).exp()
    assert ((estimate.mean(0) - exact).abs() < 5 * estimate.std(0) / 20).all()
    assert tnn.FavorFeatures(64).projection.shape == (266, 64)


def test_errors() -> None:
    x = tokens()
    causal, full = make("linear"), tnn.LinearAttention(16, 2).double()
    with pytest.raises(UnsupportedError, match="any mask"):
        causal(x, mask=Window(3, 0))
    with pytest.raises(UnsupportedError, match="'elu' and 'relu'"):
        make("taylor")(x, mask=torch.ones(3, 1, 1, 21, dtype=torch.bool))
    with pytest.raises(TypeError, match="make_cache"):
        causal(x, cache=DenseCache(KV(2, 8), 3, 30))
    with pytest.raises(ValueError, match="not causal"):
        full(x, cache=full.make_cache(3))
    with pytest.raises(ValueError, match="room for 2"):
        causal(x, cache=causal.make_cache(2))
    with pytest.raises(ValueError, match="rotary"):
        causal(x, positions=torch.arange(21))
    with pytest.raises(ValueError, match="token's own past"):
        make("rwkv6")(x, x)
    with pytest.raises(ValueError, match="divisor"):
        tnn.Retention(16, 3)
    with pytest.raises(ValueError, match="state: got no z"):
        causal(x, cache=RecurrentCache(2, 8, 8, 3, dtype=torch.float64))
