"""MLA: written out in float64, its two forms, gradients, options and errors. Decoding is in test_nn_decoding.py,
DeepSeek's own layers in test_nn_convert.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import tilewise as tw
from tilewise.caches import KV, DenseCache, Latent
from tilewise.nn import MultiHeadLatentAttention, RotaryEmbedding, YaRN

B, N, DIM, HEADS = 2, 11, 24, 3
SIZES: dict[str, Any] = {"kv_rank": 10, "nope_dim": 7, "rope_dim": 4, "v_dim": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compressed": {"q_rank": 9, "bias": True},
    "window": {"window": (3, 0)},
    "both ways": {"causal": False},
    "yarn": {"rotary": RotaryEmbedding(4, interleaved=True, scaling=YaRN(4.0, 8, mscale=0.7, mscale_all_dim=1.3))},
}


def make(name: str, **more: Any) -> MultiHeadLatentAttention:
    torch.manual_seed(2)
    module = MultiHeadLatentAttention(DIM, HEADS, **SIZES, **OPTIONS[name], **more)
    for parameter_name, parameter in module.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.normal_(parameter)
    return module


def written_out(module: MultiHeadLatentAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """SPEC 1.9, head by head, in float64."""
    w = {name: p.double() for name, p in module.state_dict().items()}
    x = x.double()

    def project(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def normalized(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    scaling = module.rotary.scaling
    frequencies = [10000.0 ** (-2 * i / 4) for i in range(2)]
    factor = temperature = 1.0
    if scaling is not None:
        assert isinstance(scaling, YaRN)
        frequencies, factor = scaling.frequencies(4, 10000.0), scaling.attention_factor
        temperature = (0.1 * 1.3 * torch.tensor(4.0).double().log().item() + 1) ** 2
    angles = torch.arange(N).double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.full_like(angles, factor), angles)).flatten(-2)

    q = (
        project(x, "q_proj")
        if module.q_rank is None
        else project(normalized(project(x, "q_a_proj"), "q_a_norm"), "q_b_proj")
    )
    compressed = project(x, "kv_a_proj")
    c_kv, k_pe = normalized(compressed[..., :10], "kv_a_norm"), turned(compressed[..., 10:])
    kv = project(c_kv, "kv_b_proj")
    outs = []
    for h in range(HEADS):
        q_h, kv_h = q[..., 11 * h : 11 * (h + 1)], kv[..., 12 * h : 12 * (h + 1)]
        q_h = torch.cat([q_h[..., :7], turned(q_h[..., 7:])], -1)
        k_h = torch.cat([kv_h[..., :7], k_pe], -1)
        out, _ = oracle.attention(
            q_h[:, None],
            k_h[:, None],
            kv_h[:, None, :, 7:],
            causal=module.causal,
            window=module.window,
            mask=mask,
            scale=11**-0.5 * temperature,
        )
        outs.append(out[:, 0])
    return project(torch.cat(outs, -1), "o_proj")


@pytest.mark.parametrize("name", OPTIONS)
def test_both_forms_compute_what_is_written_out(name: str) -> None:
    module, x = make(name), torch.randn(B, N, DIM)
    mask = torch.rand(B, 1, N, N) < 0.8
    for given in (None, mask):
        exact = written_out(module, x, given)
        for absorbed in (None, False, True):
            torch.testing.assert_close(module(x, mask=given, absorbed=absorbed).double(), exact, atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_both_forms_have_the_same_gradients(name: str) -> None:
    module, x = make(name, dtype=torch.float64), torch.randn(B, N, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    expanded, absorbed = (
        torch.autograd.grad(module(x, absorbed=form).square().sum(), leaves) for form in (False, True)
    )
    exact = torch.autograd.grad(written_out(module, x).square().sum(), x)[0]
    torch.testing.assert_close(expanded[0], exact)
    for a, b in zip(expanded, absorbed, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_mask_values_and_positions() -> None:
    module, x = make("plain"), torch.randn(B, N, DIM)
    places = torch.cat([torch.arange(4), torch.arange(7)])
    packed = module(x, mask=tw.masks.Documents((places == 0).cumsum(0)), positions=places)
    torch.testing.assert_close(packed[:, :4], module(x[:, :4]), atol=2e-6, rtol=0)
    torch.testing.assert_close(packed[:, 4:], module(x[:, 4:]), atol=2e-6, rtol=0)


def test_dropout_and_autocast() -> None:
    module, x = make("compressed", dropout=0.5, residual_dropout=0.5), torch.randn(B, N, DIM)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    cache = DenseCache(Latent(10, 4), B, 16, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = module(x)
        steps = torch.cat([module(part, cache=cache) for part in x.split([6, 5], 1)], 1)
    assert full.dtype == steps.dtype == torch.bfloat16
    torch.testing.assert_close(steps, full, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads: got 0"),
        ({"kv_rank": 2.5}, "kv_rank: got float"),
        ({"q_rank": 0}, "q_rank: got 0"),
        ({"rope_dim": 5}, "dim: got 5"),
        ({"rotary": RotaryEmbedding(6)}, "rotary: got 6 rotated columns; wants rope_dim = 4"),
        ({"causal": 1}, "causal: got int"),
        ({"dropout": 2.0}, "dropout: got 2.0"),
        ({"rotary": 4}, "rotary: got int; wants a RotaryEmbedding"),
        ({"backend": "flash"}, "backend: got 'flash'"),
        ({"eps": 0.0}, "eps: got 0.0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MultiHeadLatentAttention(**{"dim": DIM, "heads": HEADS, **SIZES, **options})


X = torch.randn(B, N, DIM)


@pytest.mark.parametrize("absorbed", [False, True])
def test_a_refused_prompt_leaves_the_cache_empty(absorbed: bool) -> None:
    module, cache = make("plain", backend="sdpa"), DenseCache(Latent(10, 4), B, 16)
    with torch.no_grad(), pytest.raises(tw.UnsupportedError, match="wants D = Dv"):
        module(X, cache=cache, absorbed=absorbed)
    assert cache.lengths.tolist() == [0] * B


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(X[0]), "q: got shape"),
        (lambda m: m(X[..., :3]), "q: got shape"),
        (lambda m: m(X, counts=torch.ones(B, dtype=torch.int32)), "counts: got a tensor without a cache"),
        (lambda m: m(X, positions=torch.arange(N - 1)), "positions: got shape"),
        (lambda m: m(X, cache=DenseCache(Latent(10, 4), 1, 16)), "cache: got room for 1 sequences"),
        (lambda m: m(X, cache=DenseCache(Latent(10, 4), B, 16)), "no_grad"),
        (lambda m: torch.no_grad()(m)(X, cache=DenseCache(Latent(12, 4), B, 16)), "k: got"),
        (lambda m: torch.no_grad()(m)(X, cache=DenseCache(KV(1, 14), B, 16)), "v: got"),
        (lambda m: torch.no_grad()(m)(X, cache=DenseCache(Latent(10, 4), B, 8)), "the cache is full"),
        (lambda m: m(X.half()), "q: got dtype torch.float16; wants the module's torch.float32"),
        (lambda m: m(X, cache=(X, X)), r"cache: got tuple.*Fix: DenseCache\(Latent\(10, 4\), batch, capacity\)"),
    ],
)
def test_bad_calls(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(make("plain"))
