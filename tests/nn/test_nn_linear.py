"""Linear attention as modules: what they compute, decoding with a state, padding, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

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
    "delta": lambda: tnn.GatedDeltaNet(16, 2, v_head_dim=6),
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


@pytest.mark.parametrize("name", MODULES)
def test_no_tokens_are_no_tokens(name: str) -> None:
    module, x = make(name), tokens()
    cache = module.make_cache(3)
    assert module(x[:, :0], cache=cache).shape == (3, 0, 16)
    parts = [module(part, cache=cache) for part in (x[:, :10], x[:, :0], x[:, 10:])]
    torch.testing.assert_close(torch.cat(parts, 1), module(x))
    assert module(x[:0]).shape == (0, 21, 16)


@pytest.mark.parametrize("name", MODULES)
def test_a_backward_may_come_after_the_cache_moved_on(name: str) -> None:
    """Each call's gradients are those from the state that it began with; the state itself is a constant."""
    module, x = make(name), tokens()
    cache = module.make_cache(3)
    outputs, alone = [], []
    for part in x.split((10, 1, 10), 1):
        other = module.make_cache(3)
        other.load_state_dict(cache.state_dict())
        alone.append(torch.autograd.grad(module(part, cache=other).sum(), list(module.parameters())))
        outputs.append(module(part, cache=cache).sum())
    together = torch.autograd.grad(sum(outputs), list(module.parameters()))
    for found, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, sum(parts))


class Counter(TorchDispatchMode):
    """What a call does: every operation with the sizes of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        self.seen.append((str(func), [list(x.shape) for x in tensors]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODULES)
def test_a_token_costs_the_same_after_a_thousand_and_a_million(name: str) -> None:
    module, x = make(name), tokens(1)
    cache = module.make_cache(3)
    done = []
    for length in (1_000, 1_000_000):
        with torch.no_grad():
            module(x, cache=cache)
            cache.update(cache.state, length - cache.max_length, cache.tail)
            with Counter() as counter:
                module(x, cache=cache)
        done.append((counter.seen, cache.nbytes))
        assert len(counter.seen) > 10
    assert done[0] == done[1]


@pytest.mark.parametrize("name", ["linear", "relu", "retention", "gla", "rwkv6", "delta"])
def test_padding_on_the_left_is_left_out(name: str) -> None:
    """Where nothing came before, the padding's inputs do not matter: not through a shift, nor a convolution."""
    module, x = make(name), tokens()
    mask = torch.ones(3, 1, 1, 21, dtype=torch.bool)
    mask[..., :6] = False
    other = x.clone()
    other[:, :6] = 50.0
    torch.testing.assert_close(module(other, mask=mask)[:, 6:], module(x[:, 6:]))


@pytest.mark.parametrize("name", ["linear", "relu", "retention", "gla", "rwkv6", "delta"])
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


def test_gated_deltanet_is_its_formula() -> None:
    """Token by token, as the paper writes it, with the convolution as a sum over the last four tokens."""
    module, x = make("delta"), tokens(7, 1)[0]
    conv, state, rows = module.conv, torch.zeros(2, 8, 6, dtype=torch.float64), []
    inputs = torch.cat([p(x) for p in (module.q_proj, module.k_proj, module.v_proj)], -1)
    for i, now in enumerate(x):
        mixed = F.silu(torch.stack([inputs[i - j] * conv[:, 3 - j] for j in range(4) if j <= i]).sum(0))
        q, k, v = mixed[:16].view(2, 8), mixed[16:32].view(2, 8), mixed[32:].view(2, 6)
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        alpha = (-module.decay_rate.exp() * F.softplus(module.decay_proj(now) + module.decay_bias)).exp()
        beta = torch.sigmoid(module.beta_proj(now))
        found = alpha[:, None] * torch.einsum("hk,hkd->hd", k, state)
        state = alpha[:, None, None] * state + torch.einsum("h,hk,hd->hkd", beta, k, v - found)
        out = torch.einsum("hk,hkd->hd", q, state) / 8**0.5
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight
        rows.append(module.o_proj(out.flatten() * F.silu(module.gate_proj(now))))
    torch.testing.assert_close(module(x[None])[0], torch.stack(rows))


@pytest.mark.parametrize("n", [1, 65, 200])
def test_gated_deltanet_is_transformers(n: int) -> None:
    """The linear layer of Qwen3-Next with random weights, output and gradients."""
    pytest.importorskip("transformers", reason="compares with Transformers")
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    torch.manual_seed(n)
    config = Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=1e-5,
        linear_num_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=8, linear_value_head_dim=6,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    ours = tnn.GatedDeltaNet(32, 4, head_dim=8, v_head_dim=6)
    with torch.no_grad():
        for x in theirs.parameters():
            x.add_(0.3 * torch.randn_like(x))
        rows = theirs.in_proj_qkvz.weight.view(4, 28, 32).split((8, 8, 6, 6), 1)
        rows += theirs.in_proj_ba.weight.view(4, 2, 32).split((1, 1), 1)
        into = (ours.q_proj, ours.k_proj, ours.v_proj, ours.gate_proj, ours.beta_proj, ours.decay_proj)
        for layer, part in zip(into, rows, strict=True):
            layer.weight.copy_(part.flatten(0, 1))
        pairs = [
            (ours.conv, theirs.conv1d.weight[:, 0]), (ours.decay_rate, theirs.A_log),
            (ours.decay_bias, theirs.dt_bias), (ours.norm.weight, theirs.norm.weight),
            (ours.o_proj.weight, theirs.out_proj.weight),
        ]  # fmt: skip
        for mine, other in pairs:
            mine.copy_(other)
    x = torch.randn(2, n, 32, requires_grad=True)
    results = []
    for module in (ours, theirs):
        out = module(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, module.norm.weight))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


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
    with pytest.raises(ValueError, match="head dim 8; wants 16"):
        tnn.LinearAttention(16, 2, feature_map=tnn.FavorFeatures(16))(x.float())
    with pytest.raises(ValueError, match="tail of 0 numbers"):
        make("delta")(x, cache=make("gla").make_cache(3))
    with pytest.raises(ValueError, match="conv_size"):
        tnn.GatedDeltaNet(16, 2, conv_size=1)
    with pytest.raises(ValueError, match="state: got no z"):
        causal(x, cache=RecurrentCache(2, 8, 8, 3, dtype=torch.float64))
