"""MHA, GQA and MQA against attention written out in float64; their options, errors and compilation."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import tilewise as tw
from tilewise.caches import KV, DenseCache
from tilewise.nn import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention, RotaryEmbedding
from tilewise.nn.attention import alibi_slopes

B, N, M, DIM = 2, 9, 7, 24

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True, "out_bias": False},
    "output bias": {"out_bias": True},
    "dims": {"head_dim": 10, "v_head_dim": 6},
    "norms": {"qk_norm": 1e-5},
    "rotary": {"rotary": RotaryEmbedding(4, base=100.0)},
    "interleaved": {"rotary": RotaryEmbedding(6, interleaved=True), "qk_norm": 1e-6},
    "alibi": {"alibi": True},
    "relative": {"relative": 3},
    "soft cap": {"softcap": 0.7, "scale": 0.9},
    "sinks": {"sinks": True, "window": (3, None)},
    "causal": {"causal": True, "window": (4, 0)},
}


def randomized(module: nn.Module) -> nn.Module:
    """Parameters that start at zero or one would hide a mistake."""
    for name, parameter in module.named_parameters():
        if name in ("relative", "sinks") or "norm" in name:
            nn.init.normal_(parameter)
    return module


def slopes(heads: int) -> Tensor:
    """The paper's code: a geometric sequence for powers of two; else interleaved from the next power."""

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8.0 / n * (i + 1)) for i in range(n)]

    power = 2 ** (heads.bit_length() - 1)
    return torch.tensor((of_power(power) + of_power(2 * power)[::2])[:heads], dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
def test_slopes_are_the_papers(heads: int) -> None:
    torch.testing.assert_close(alibi_slopes(heads).double(), slopes(heads), atol=0, rtol=1e-7)


def turned(x: Tensor, first: int, rotary: RotaryEmbedding) -> Tensor:
    angle = torch.arange(first, first + x.shape[2]).double()[:, None] * torch.tensor(
        [rotary.base ** (-2 * i / rotary.dim) for i in range(rotary.dim // 2)], dtype=torch.float64
    )
    part, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    a, b = (part[..., ::2], part[..., 1::2]) if rotary.interleaved else part.chunk(2, -1)
    c, d = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    new = torch.stack([c, d], -1).flatten(-2) if rotary.interleaved else torch.cat([c, d], -1)
    return torch.cat([new, rest], -1)


def written_out(
    module: GroupedQueryAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The module's output and weights in float64, from its parameters."""
    state = {name: x.double() for name, x in module.state_dict().items()}
    m, n = k.shape[1], q.shape[1]

    def heads(x: Tensor, name: str, count: int, norm: str | None) -> Tensor:
        y = x.double() @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)
        y = y.reshape(*y.shape[:2], count, -1).transpose(1, 2)
        if norm is not None and f"{norm}.weight" in state:
            assert module.q_norm is not None
            y = y / (y.square().mean(-1, keepdim=True) + module.q_norm.eps).sqrt() * state[f"{norm}.weight"]
        return y

    qh = heads(q, "q_proj", module.heads, "q_norm")
    kh = heads(k, "k_proj", module.kv_heads, "k_norm")
    vh = heads(v, "v_proj", module.kv_heads, None)
    if module.rotary is not None:
        qh, kh = turned(qh, m - n, module.rotary), turned(kh, 0, module.rotary)
    options: dict[str, Any] = {
        "causal": module.causal,
        "window": module.window,
        "softcap": module.softcap,
        "scale": module.scale,
        "mask": mask,
        "relative": state.get("relative"),
        "sink": state.get("sinks"),
        "alibi": None if module.alibi is None else slopes(module.heads),
    }
    out, _ = oracle.attention(qh, kh, vh, **options)
    identity = torch.eye(m, dtype=torch.float64).expand(k.shape[0], module.kv_heads, m, m)
    weights, _ = oracle.attention(qh, kh, identity, **options)
    out = out.transpose(1, 2).flatten(2)
    return out @ state["o_proj.weight"].T + state.get("o_proj.bias", 0.0), weights


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_computes_what_is_written_out(name: str, kv_heads: int) -> None:
    module = GroupedQueryAttention(DIM, 4, kv_heads, **OPTIONS[name])
    randomized(module)
    x = torch.randn(B, N, DIM)
    mask = torch.rand(B, 1, N, N) < 0.8
    with torch.no_grad():
        for given in (None, mask):
            out, weights = module(x, mask=given, need_weights=True)
            exact, exact_weights = written_out(module, x, x, x, given)
            assert out.shape == (B, N, DIM)
            torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=0)
            torch.testing.assert_close(weights.double(), exact_weights, atol=1e-6, rtol=0)
            assert torch.equal(module(x, mask=given), out)


def test_weights_of_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read out in parts of 64 columns, the last of which is narrower; none where there are no keys."""
    module = GroupedQueryAttention(DIM, 4, 2, alibi=True)
    q, k = torch.randn(B, 3, DIM), torch.randn(B, 131, DIM)
    _, at_once = module(q, k, need_weights=True)
    monkeypatch.setattr("tilewise.nn.weights.LARGEST_VALUES", 1)
    _, in_parts = module(q, k, need_weights=True)
    assert in_parts.shape == (B, 4, 3, 131)
    torch.testing.assert_close(in_parts, at_once, atol=1e-6, rtol=0)
    assert module(q, k[:, :0], need_weights=True)[1].shape == (B, 4, 3, 0)


@pytest.mark.parametrize("name", OPTIONS)
def test_cross_attention_with_inputs_of_their_own(name: str) -> None:
    module = GroupedQueryAttention(DIM, 4, 2, k_dim=10, v_dim=14, **OPTIONS[name])
    randomized(module)
    q, k, v = torch.randn(B, N, DIM), torch.randn(B, M, 10), torch.randn(B, M, 14)
    exact, _ = written_out(module, q, k, v)
    torch.testing.assert_close(module(q, k, v).detach().double(), exact, atol=2e-6, rtol=0)


def test_values_default_to_keys() -> None:
    module = MultiHeadAttention(DIM, 4)
    q, k = torch.randn(B, N, DIM), torch.randn(B, M, DIM)
    assert torch.equal(module(q, k), module(q, k, k))


@pytest.mark.parametrize("name", OPTIONS)
def test_one_implementation(name: str) -> None:
    """GQA with H key/value heads is MHA, and with one is MQA: the same state dict, the same bits."""
    x = torch.randn(B, N, DIM)
    for kv_heads, other in ((4, MultiHeadAttention), (1, MultiQueryAttention)):
        gqa = GroupedQueryAttention(DIM, 4, kv_heads, **OPTIONS[name])
        randomized(gqa)
        alone = other(DIM, 4, **OPTIONS[name])
        alone.load_state_dict(gqa.state_dict())
        assert torch.equal(alone(x), gqa(x))
        assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {key.split(".")[0] for key in alone.state_dict()}


def test_gqa_is_mha_with_repeated_key_value_heads() -> None:
    gqa, mha = GroupedQueryAttention(DIM, 6, 2), MultiHeadAttention(DIM, 6)
    state = dict(gqa.state_dict())
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)
    mha.load_state_dict(state)
    x = torch.randn(B, N, DIM)
    torch.testing.assert_close(mha(x), gqa(x), atol=1e-6, rtol=0)


def test_positions_move_the_rotary_embedding() -> None:
    module = MultiHeadAttention(DIM, 4, rotary=RotaryEmbedding(6), causal=True)
    x = torch.randn(B, N, DIM)
    rows = torch.arange(N)
    assert torch.equal(module(x, positions=rows), module(x))
    torch.testing.assert_close(module(x, positions=rows + 1000), module(x), atol=2e-6, rtol=0)
    packed = torch.cat([rows[:4], rows[:5]])
    twice = module(x, positions=packed, mask=tw.masks.Documents((packed == 0).cumsum(0)))
    torch.testing.assert_close(twice[:, :4], module(x[:, :4]), atol=2e-6, rtol=0)
    torch.testing.assert_close(twice[:, 4:], module(x[:, 4:]), atol=2e-6, rtol=0)


def test_any_mask_value() -> None:
    module = MultiHeadAttention(DIM, 4)
    x = torch.randn(B, N, DIM)
    mask = (tw.masks.Causal() & tw.masks.Window(3, 0)) | tw.masks.Prefix(2)
    dense = torch.from_numpy(mask.to_dense(N, N))
    torch.testing.assert_close(module(x, mask=mask), module(x, mask=dense), atol=1e-6, rtol=0)


def test_gradients_reach_every_parameter() -> None:
    module = GroupedQueryAttention(DIM, 4, 2, bias=True, qk_norm=1e-6, relative=3, sinks=True, dtype=torch.float64)
    randomized(module)
    x = torch.randn(1, 5, DIM, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    for name, parameter in module.named_parameters():
        (grad,) = torch.autograd.grad(module(x).square().sum(), parameter)
        # Adding a constant to every key of a head changes no softmax.
        assert (grad.abs().max() > 1e-9) == (name != "k_proj.bias" or module.q_norm is not None)
    subset = [p for p in module.parameters() if p.numel() <= 40]
    assert subset
    weights, biases = module.sinks, module.relative
    assert weights is not None
    assert biases is not None
    assert torch.autograd.gradcheck(
        lambda a, b: torch.func.functional_call(module, {"sinks": a, "relative": b}, (x.detach(),)), (weights, biases)
    )


def test_dropout_drops_in_training_alone() -> None:
    module = MultiHeadAttention(DIM, 4, dropout=0.5)
    x = torch.randn(B, N, DIM)
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    assert not torch.equal(module(x), first)
    module.eval()
    assert torch.equal(module(x), module(x))
    residual = MultiHeadAttention(DIM, 4, residual_dropout=0.5)
    dropped = residual(x) == 0.0
    assert 0.3 < dropped.double().mean() < 0.7
    assert not (residual.eval()(x) == 0.0).any()


def test_autocast_runs_in_its_dtype_also_with_a_cache() -> None:
    module = GroupedQueryAttention(DIM, 4, 2, qk_norm=1e-6, rotary=RotaryEmbedding(6), causal=True).eval()
    x = torch.randn(B, N, DIM)
    cache = DenseCache(KV(2, 6), B, 16, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = module(x)
        steps = torch.cat([module(x[:, :4], cache=cache), module(x[:, 4:], cache=cache)], 1)
    assert full.dtype == steps.dtype == torch.bfloat16
    torch.testing.assert_close(steps, full, atol=2e-2, rtol=0)


@pytest.mark.parametrize("options", [{"rotary": RotaryEmbedding(6)}, {"alibi": True}], ids=["rotary", "alibi"])
def test_from_meta_to_memory_and_to_half(options: dict[str, Any]) -> None:
    """Nothing that the state dict does not hold is lost on the way, or rounded."""
    module = GroupedQueryAttention(DIM, 6, 2, head_dim=6, device="meta", **options)
    real = GroupedQueryAttention(DIM, 6, 2, head_dim=6, **options)
    module = module.to_empty(device="cpu")
    module.load_state_dict(real.state_dict())
    x = torch.randn(B, N, DIM)
    assert torch.equal(module(x), real(x))
    for y in (module.half(), module.double()):
        assert y.alibi is None or torch.equal(y.alibi, alibi_slopes(6))


def test_compiles_whole_in_a_fresh_process() -> None:
    code = """
    import torch
    import tilewise as tw
    from tilewise.caches import KV, DenseCache
    from tilewise.nn import GroupedQueryAttention, MultiHeadLatentAttention, RotaryEmbedding

    torch.manual_seed(0)
    modules = [
        GroupedQueryAttention(24, 4, 2, rotary=RotaryEmbedding(6), qk_norm=1e-6, causal=True, sinks=True),
        GroupedQueryAttention(24, 4, 1, relative=3, bias=True, dropout=0.1, residual_dropout=0.1).eval(),
        MultiHeadLatentAttention(24, 4, q_rank=8, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=6),
    ]
    masks = [None, tw.masks.Window(3, 0), torch.rand(9, 9) < 0.8]
    for module in modules:
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for n in (9, 6, 7):
            for mask in masks[: 3 if n == 9 else 1]:
                x = torch.randn(2, n, 24)
                torch.testing.assert_close(compiled(x, mask=mask), module(x, mask=mask), atol=1e-6, rtol=0)
        compiled(x).sum().backward()
        assert all(p.grad is not None for p in module.parameters())

    module = modules[0].eval()
    with torch.no_grad():
        x = torch.randn(2, 9, 24)
        full = module(x)
        cache = DenseCache(KV(2, 6), 2, 16)
        module(x[:, :4], cache=cache)
        torch._dynamo.reset()
        step = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        for t in range(4, 9):
            torch.testing.assert_close(step(x[:, t : t + 1], cache=cache), full[:, t : t + 1], atol=1e-6, rtol=0)
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert frames == 1, frames
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


X = torch.randn(B, N, DIM)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupedQueryAttention(DIM, 4, 3), "kv_heads: got 3; wants a divisor of the 4 heads"),
        (lambda: GroupedQueryAttention(DIM, 5, 5), "heads: got 5; wants a divisor of dim = 24. Fix: give head_dim"),
        (lambda: GroupedQueryAttention(DIM, 4, 0), "kv_heads: got 0; wants at least 1"),
        (lambda: GroupedQueryAttention(DIM, 4.0, 2), "heads: got float; wants an int"),
        (lambda: MultiHeadAttention(DIM, 4, rotary=RotaryEmbedding(8)), "rotary: got 8 rotated columns"),
        (lambda: MultiHeadAttention(DIM, 4, rotary=RotaryEmbedding(6), alibi=True), "alibi: got set beside rotary"),
        (lambda: MultiHeadAttention(DIM, 4, relative=3, alibi=True), "relative: got set beside alibi"),
        (lambda: MultiHeadAttention(DIM, 4, dropout=1.0), "dropout: got 1.0"),
        (lambda: MultiHeadAttention(DIM, 4, softcap=-1.0), "softcap: got -1.0"),
        (lambda: MultiHeadAttention(DIM, 4, window=3), "window: got 3"),
        (lambda: MultiHeadAttention(DIM, 4, head_size=3), "has no argument 'head_size'"),
        (lambda: MultiHeadAttention(DIM, 4, rotary=6), "rotary: got int; wants a RotaryEmbedding"),
        (lambda: MultiHeadAttention(DIM, 4, out_bias="no"), "out_bias: got no"),
        (lambda: MultiHeadAttention(DIM, 4, backend="flash"), "backend: got 'flash'; wants 'auto' or one of"),
        (lambda: RotaryEmbedding(5), "dim: got 5"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def plain(**options: Any) -> GroupedQueryAttention:
    return GroupedQueryAttention(DIM, 4, 2, **options)


def fresh_cache() -> DenseCache:
    return DenseCache(KV(2, 6), B, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain()(X[0]), "q: got shape"),
        (lambda: plain()(X[..., :5]), "q: got shape"),
        (lambda: plain()(X.int()), "q: got dtype torch.int32"),
        (lambda: plain()(X.half()), r"q: got dtype torch.float16; wants the module's torch.float32. Fix: q = q"),
        (lambda: plain(dtype=torch.bfloat16)(X.bfloat16(), X), "k: got dtype torch.float32; wants the module's"),
        (lambda: plain()(X, cache=tw.caches.RecurrentCache(2, 6, 6, B)), "of keys and values.*Fix: DenseCache"),
        (lambda: plain()(X, mask=torch.ones(B, N, N, dtype=torch.bool)), r"mask for each sequence is mask\[:, None\]"),
        (lambda: plain()(X, X[:1]), "k: got"),
        (lambda: plain()(X, X, X[:, :3]), "v: got"),
        (lambda: plain(k_dim=10)(X, X), "k: got shape"),
        (lambda: plain()(X, positions=torch.arange(N)), "positions: got a tensor; wants None"),
        (lambda: plain(rotary=RotaryEmbedding(6))(X, positions=torch.arange(N - 1)), "positions: got shape"),
        (lambda: plain(rotary=RotaryEmbedding(6))(X, X[:, :3], positions=torch.arange(N)), "beside k"),
        (lambda: plain()(X, X, cache=fresh_cache()), "cache: got a cache beside k or v"),
        (lambda: plain()(X, need_weights=True, cache=fresh_cache()), "need_weights: got True with a cache"),
        (lambda: plain(relative=2)(X, cache=fresh_cache()), "without a relative bias"),
        (lambda: plain()(X, cache=(X, X)), "cache: got tuple"),
        (lambda: plain()(X, cache=DenseCache(KV(2, 6), 1, 16)), "cache: got room for 1 sequences"),
        (lambda: plain()(X, cache=fresh_cache()), "no_grad"),
        (lambda: plain(dropout=0.1)(X, cache=fresh_cache()), "module.eval"),
        (lambda: plain()(X, counts=torch.ones(2, dtype=torch.int32)), "counts: got a tensor without a cache"),
        (lambda: plain()(X, mask=torch.ones(B, 1, N, N, dtype=torch.int64)), "mask.bool"),
        (lambda: plain()(torch.zeros(1, 1 << 15, DIM), need_weights=True), "need_weights: got True for"),
    ],
)
def test_bad_calls(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {"mask": tw.masks.Window(3, 0)}, "mask: over a cache"),
        ({}, {"mask": torch.ones(3, 9, dtype=torch.bool)}, "mask: got shape"),
        ({"backend": "sdpa", "softcap": 1.0}, {}, "backend='sdpa' cannot run"),
        ({"head_dim": 8}, {}, "k: got"),
        ({}, {"counts": [3, 1]}, r"counts: got list; wants an int32 tensor \[B\]"),
    ],
)
def test_a_refused_step_leaves_the_cache_as_it_was(
    options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    cache = fresh_cache()
    with torch.no_grad():
        plain()(X[:, :5], cache=cache)
        before = {name: x.clone() for name, x in cache.state_dict().items()}
        with pytest.raises((ValueError, TypeError, tw.UnsupportedError), match=message):
            plain(**options)(X[:, :3], cache=cache, **given)
    for name, x in cache.state_dict().items():
        assert torch.equal(x[:, :, :5] if x.dim() == 4 else x, before[name][:, :, :5] if x.dim() == 4 else before[name])


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"backend": "sdpa", "softcap": 1.0}, {}, "backend='sdpa' cannot run"),
        ({}, {"mask": tw.masks.Documents([0, 0, 1])}, "ids"),
        ({}, {"mask": "causal"}, "mask: got"),
    ],
)
def test_a_refused_prompt_leaves_the_cache_empty(options: dict[str, Any], given: dict[str, Any], message: str) -> None:
    cache = fresh_cache()
    with torch.no_grad(), pytest.raises((ValueError, TypeError, tw.UnsupportedError), match=message):
        plain(**options)(X[:, :5], cache=cache, **given)
    assert cache.lengths.tolist() == [0] * B


def test_matches_sdpa() -> None:
    """A sanity check that shares nothing with the oracle."""
    module = MultiHeadAttention(DIM, 4, causal=True)
    q, k, v = (
        F.linear(X, p.weight).unflatten(-1, (4, 6)).transpose(1, 2)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(X), F.linear(out, module.o_proj.weight), atol=1e-6, rtol=0)
