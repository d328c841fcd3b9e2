"""`linear_attention` on the PyTorch backends: exactness, states, packing, layouts, errors, and as a torch operator."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import linear_oracle
import tilewise
from linear_oracle import KINDS, Judged, case, leaves_of
from tilewise.backends.linear import Segments, TorchLinear
from tilewise.nn import FavorFeatures
from tilewise.ops.dispatch import choose
from tilewise.ops.linear import _prepare, explain_linear, linear_attention
from tilewise.ops.linear_library import linear_backward_op, linear_op, linear_route
from tilewise.reference.linear import LinearState

BACKENDS = ("standard", "tiled")


@lru_cache(maxsize=100)
def judged(kind: str, n: int) -> Judged:
    return Judged(case(kind, n, state=n % 2 == 0, seed=n))


def errors(problem: Judged, **options: Any) -> dict[str, float]:
    leaves = leaves_of(problem.given)
    given = dict(leaves)
    state = LinearState(given.pop("s"), given.pop("z")) if "s" in given else None
    out, last = linear_attention(**given, **problem.options, state=state, return_state=True, **options)
    outputs = [out, last.s, *([] if last.z is None else [last.z])]
    grads = torch.autograd.grad(outputs, list(leaves.values()), problem.cotangents, materialize_grads=True)
    return problem.errors(outputs, dict(zip(leaves, grads, strict=True)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind: str, backend: str) -> None:
    for n in (1, 63, 64, 130):
        found = errors(judged(kind, n), backend=backend)
        assert max(found.values()) < 1e-11, (n, found)


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments, the last of them of one token, and chunks of several sizes, in and over segments."""
    problem = Judged(case(kind, 4097, batch=1, heads=1, dim=4, dim_v=3, state=True))
    found = errors(problem, backend="tiled")
    assert max(found.values()) < 1e-10, found
    for segments in (Segments(4096, 33), Segments(1000, 128)):
        monkeypatch.setattr(TorchLinear, "configure", lambda self, spec, chosen=segments: chosen)
        for cache in (choose, linear_route):
            cache.cache_clear()
        found = errors(problem, backend="tiled")
        assert max(found.values()) < 1e-10, (segments, found)


@pytest.fixture(autouse=True)
def plans_of_this_test() -> Iterator[None]:
    """Plans outlive a test that changes how they are made."""
    yield
    for cache in (choose, linear_route):
        cache.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Everything is computed in float32, so half precision only rounds what goes in and out."""
    given = case("elu", 100)
    half = {name: given[name].to(dtype) for name in ("q", "k", "v")}
    exact = linear_oracle.linear_attention(**half, causal=True)[0]
    out = linear_attention(**half, causal=True)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= (torch.finfo(dtype).eps + 2e-6) * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("full")])
def test_packed_sequences_are_sequences(kind: str, backend: str) -> None:
    lengths = (1, 70, 0, 64, 3)
    parts = [case(kind, n, batch=1, seed=i) for i, n in enumerate(lengths)]
    names = [name for name, x in parts[0].items() if isinstance(x, Tensor) and x.dim() > 2]
    packed = {name: torch.cat([part[name] for part in parts], 2).requires_grad_() for name in names}
    options = {name: x for name, x in parts[0].items() if name not in names}
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    size = 73 if kind == "taylor" else 8
    s, z = torch.randn(5, 2, size, 12, dtype=torch.float64), torch.rand(5, 2, size, dtype=torch.float64)
    leaves = [*packed.values(), s.requires_grad_(), z.requires_grad_()]
    out, last = linear_attention(
        **packed, **options, state=LinearState(s, z), return_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    alone = [
        linear_oracle.linear_attention(
            **{name: x[:, :, cu_seqlens[i] : cu_seqlens[i + 1]] for name, x in packed.items()},
            **options, s=s[i : i + 1], z=z[i : i + 1],
        )
        for i in range(5)
    ]  # fmt: skip
    exact, exact_s = torch.cat([x[0] for x in alone], 2), torch.cat([x[1] for x in alone])
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(last.s, exact_s)
    cotangents = [torch.randn_like(out), torch.randn_like(last.s)]
    ours = torch.autograd.grad([out, last.s], leaves, cotangents, materialize_grads=True)
    theirs = torch.autograd.grad([exact, exact_s], leaves, cotangents, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("delta")])
def test_the_delta_rule_on_any_device(kind: str, device: str) -> None:
    """In float64, where a GPU's matrix products round as a CPU's do; no kernel of ours runs there."""
    problem = judged(kind, 130)
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in leaves_of(problem.given).items()}
    given = dict(leaves)
    state = LinearState(given.pop("s"), given.pop("z"))
    out, last = linear_attention(**given, **problem.options, state=state, return_state=True)
    cotangents = [x.to(device) for x in problem.cotangents]
    grads = torch.autograd.grad([out, last.s], list(leaves.values()), cotangents, materialize_grads=True)
    found = problem.errors([out, last.s], dict(zip(leaves, grads, strict=True)))
    assert max(found.values()) < 1e-11, found


def test_a_state_goes_on_where_it_stopped() -> None:
    for kind in ("elu", "none+gla", "none+rwkv", "none+retention", "none+gated-delta"):
        given = case(kind, 90)
        whole, last = linear_attention(**given, return_state=True)
        cut = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.dim() > 2}
        rest = {name: x for name, x in given.items() if name not in cut}
        first = {name: x[:, :, :33] for name, x in cut.items()}
        second = {name: x[:, :, 33:] for name, x in cut.items()}
        a, state = linear_attention(**first, **rest, return_state=True)
        b, end = linear_attention(**second, **rest, state=state, return_state=True)
        torch.testing.assert_close(torch.cat((a, b), 2), whole)
        torch.testing.assert_close(end.s, last.s)


@pytest.mark.parametrize("causal", [True, False])
def test_favor_streams_packs_and_has_gradients(causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    features = FavorFeatures(8, 32, generator=g).double()
    q, k, v = (torch.randn(2, 2, 60, 8, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    phi_q, phi_k = features(q), features(k)
    allowed = torch.ones(60, 60, dtype=torch.bool).tril() if causal else torch.ones(60, 60, dtype=torch.bool)
    weights = (phi_q @ phi_k.mT).masked_fill(~allowed, 0.0)
    exact = weights / weights.sum(-1, keepdim=True) @ v
    out = linear_attention(q, k, v, causal=causal, feature_map=features)
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-4)  # the denominator's epsilon
    dout = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (out, exact)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    head, state = linear_attention(
        *(x[:, :, :25] for x in (q, k, v)), causal=causal, feature_map=features, return_state=True
    )
    tail = linear_attention(*(x[:, :, 25:] for x in (q, k, v)), causal=causal, feature_map=features, state=state)
    if causal:
        torch.testing.assert_close(torch.cat((head, tail), 2), out)
        packed = [torch.cat((x[:1], x[1:, :, :40]), 2) for x in (q, k, v)]
        cu_seqlens = torch.tensor([0, 60, 100], dtype=torch.int32)
        both = linear_attention(*packed, causal=True, feature_map=features, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(both[:, :, :60], out[:1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[:, :, 60:], out[1:, :, :40], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_favor_at_every_size(causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    features = FavorFeatures(4, 16, generator=g).double()
    for n in (1, 63, 64, 100, 1000):
        q, k, v = (torch.randn(1, 1, n, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
        scores = (features.log_features(q)[..., :, None, :] + features.log_features(k)[..., None, :, :]).logsumexp(-1)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1) if causal else torch.zeros(n, n, dtype=torch.bool)
        exact = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        dout = torch.randn(exact.shape, generator=g, dtype=torch.float64)
        expected = [exact, *torch.autograd.grad(exact, (q, k, v), dout)]
        for backend in BACKENDS:
            out = linear_attention(q, k, v, causal=causal, feature_map=features, backend=backend)
            for a, b in zip([out, *torch.autograd.grad(out, (q, k, v), dout)], expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the denominator's epsilon


def test_features_too_small_for_a_float_are_stabilised() -> None:
    g = torch.Generator().manual_seed(0)
    features = FavorFeatures(16, 64, generator=g)
    q, k, v = (30 * torch.randn(1, 1, 50, 16, generator=g) for _ in range(3))
    assert not features(k).any()
    out = linear_attention(q, k, v, causal=True, feature_map=features)
    assert out.isfinite().all()
    assert out[:, :, 0].any()


def test_layouts_strides_and_modules_as_feature_maps() -> None:
    given = case("elu", 40)
    q, k, v = (given[name].float() for name in ("q", "k", "v"))
    feature_map = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Softplus())
    out = linear_attention(q, k, v, causal=True, feature_map=feature_map)
    expected = linear_attention(feature_map(q), feature_map(k), v, causal=True, feature_map=None)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in feature_map.parameters())
    beta = torch.rand(2, 2, 40)
    delta = linear_attention(q, k, v, causal=True, feature_map=lambda x: x / x.norm(dim=-1, keepdim=True), beta=beta)
    swapped = [x.transpose(1, 2) for x in (q, k / k.norm(dim=-1, keepdim=True), v, beta)]
    swapped[0] = swapped[0] / swapped[0].norm(dim=-1, keepdim=True)
    other = linear_attention(*swapped[:3], causal=True, feature_map=None, beta=swapped[3], layout="bshd")
    torch.testing.assert_close(other.transpose(1, 2), delta)
    decay = torch.nn.functional.logsigmoid(torch.randn(2, 2, 40, 8))
    gated = linear_attention(q, k, v, causal=True, feature_map=None, decay=decay)
    swapped = [x.transpose(1, 2).contiguous() for x in (q, k, v, decay)]
    other = linear_attention(*swapped[:3], causal=True, feature_map=None, decay=swapped[3], layout="bshd")
    assert other.is_contiguous()
    torch.testing.assert_close(other.transpose(1, 2), gated)


def test_scale_and_normalisation_are_what_they_say() -> None:
    given = case("elu+gla", 30)
    for normalize in (True, False):
        for scale in (0.5, -2.0):
            exact = linear_oracle.linear_attention(**given, normalize=normalize, scale=scale)[0]
            torch.testing.assert_close(linear_attention(**given, normalize=normalize, scale=scale), exact)
    silent = linear_attention(*(-torch.ones(1, 1, 4, 8) for _ in range(3)), causal=True, feature_map="relu")
    assert torch.equal(silent, torch.zeros_like(silent))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_and_no_sequences(kind: str, backend: str) -> None:
    for n, batch in ((0, 2), (5, 0)):
        leaves = leaves_of(case(kind, n, batch=batch))
        options = {name: x for name, x in case(kind, n, batch=batch).items() if name not in leaves}
        out, state = linear_attention(**leaves, **options, return_state=True, backend=backend)
        assert out.shape == (batch, 2, n, 12)
        assert not state.s.any()
        (out.sum() + state.s.sum()).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for name, x in leaves.items() if name in "qkv")


def wider_each_time(first: int) -> Any:
    sizes = count(first)
    return lambda x: x[..., : next(sizes)]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"causal": False, "decay": torch.zeros(2)}, ValueError, "decay without causal order"),
    ({"decay": torch.ones(2)}, ValueError, "above 0"),
    ({"decay": torch.zeros(3)}, ValueError, "decay"),
    ({"bonus": torch.zeros(2, 8)}, ValueError, "decay per key channel"),
    ({"beta": torch.ones(2, 2, 10), "causal": False, "feature_map": None}, ValueError, "beta without causal"),
    ({"beta": torch.ones(2, 2, 10), "normalize": True, "feature_map": None}, ValueError, "normalize=True"),
    ({"beta": torch.ones(2, 2, 10)}, ValueError, "'elu' with a beta"),
    ({"beta": torch.ones(2, 2, 10), "feature_map": FavorFeatures(8)}, ValueError, "given in logs"),
    ({"beta": torch.ones(2, 10), "feature_map": None}, ValueError, r"\[B, H, N\] = \[2, 2, 10\]"),
    ({"beta": 1.0, "feature_map": None}, TypeError, "beta"),
    (
        {"beta": torch.ones(2, 2, 10), "decay": torch.zeros(2, 2, 10, 8), "feature_map": None},
        tilewise.UnsupportedError,
        "not one a key channel",
    ),
    (
        {"beta": torch.ones(2, 2, 10), "bonus": torch.zeros(2, 8), "feature_map": None},
        ValueError,
        "a bonus",
    ),
    (
        {"beta": torch.ones(2, 2, 10), "feature_map": None, "backend": "triton"},
        tilewise.UnsupportedError,
        "no kernel for the delta rule",
    ),
    ({"feature_map": "favor"}, ValueError, "FavorFeatures"),
    ({"feature_map": "softmax"}, ValueError, "feature_map"),
    ({"feature_map": 3}, TypeError, "feature_map"),
    ({"feature_map": lambda x: x.sum(-1)}, ValueError, "features of shape"),
    ({"k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 8)}, ValueError, "state="),
    ({"k": torch.zeros(2, 1, 10, 8), "v": torch.zeros(2, 1, 10, 8)}, ValueError, "repeat_interleave"),
    ({"state": torch.zeros(2)}, TypeError, "LinearState"),
    ({"state": LinearState(torch.zeros(2, 2, 7, 8))}, ValueError, "state"),
    ({"state": LinearState(torch.zeros(2, 2, 8, 8))}, ValueError, "z of a normalised"),
    ({"state": LinearState(torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 9))}, ValueError, "z of shape"),
    ({"state": LinearState(None, torch.zeros(2, 2, 8))}, TypeError, "state.s"),  # type: ignore[arg-type]
    ({"state": LinearState(torch.zeros(2, 2, 8, 8), [1])}, TypeError, "state.z"),  # type: ignore[arg-type]
    (
        {
            "feature_map": FavorFeatures(8, 16),
            "state": LinearState(torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16), torch.zeros(2, 3)),
        },
        ValueError,
        "shift of shape",
    ),
    ({"feature_map": FavorFeatures(4)}, ValueError, "head dim 8; wants 4"),
    ({"feature_map": lambda x: x.int()}, TypeError, "floating-point features"),
    ({"feature_map": lambda x: x[..., :0]}, ValueError, r"\[2, 2, 10, 0\] for q"),
    ({"feature_map": wider_each_time(3)}, ValueError, "3 features for q and 4 for k"),
    ({"cu_seqlens": torch.tensor([0, 10], dtype=torch.int32)}, ValueError, "B = 1"),
    ({"backend": "sdpa"}, tilewise.UnsupportedError, "softmax"),
    ({"backend": "fast"}, ValueError, "backend"),
    ({"layout": "hbsd"}, ValueError, "layout"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given: dict[str, Any] = {name: torch.randn(2, 2, 10, 8) for name in ("q", "k", "v")}
    with pytest.raises(kind, match=message):
        linear_attention(**{**given, "causal": True, **change})


def test_taylor_is_refused_where_it_would_be_huge() -> None:
    x = torch.randn(1, 1, 4, 33)
    with pytest.raises(ValueError, match="1123 features"):
        linear_attention(x, x, x, causal=True, feature_map="taylor")


def test_explain() -> None:
    q = torch.randn(1, 2, 100, 16)
    plan = explain_linear(q, q, q, causal=True, decay=torch.zeros(2))
    assert plan.backend == "tiled"
    assert set(plan.rejected) == {"hopper", "triton", "sdpa", "standard"}
    assert "token decay" in str(plan)
    assert plan.as_dict()["op"] == "linear"
    delta = explain_linear(q, q, q, causal=True, feature_map=None, beta=torch.ones(1, 2, 100))
    assert "delta rule" in str(delta)
    assert delta.rejected["triton"] == "it has no kernel for the delta rule"
    on_gpu = choose(replace(delta.spec, device="sm_90"), "auto", "linear")
    assert (on_gpu.backend, on_gpu.rejected["triton"]) == ("tiled", "it has no kernel for the delta rule")
    with pytest.raises(TypeError, match="window"):
        explain_linear(q, q, q, causal=True, window=(1, 1))


def arguments(**options: Any) -> Any:
    given = {
        "feature_map": "elu", "normalize": None, "decay": None, "bonus": None, "beta": None, "scale": None,
        "state": None, "return_state": True, "cu_seqlens": None, "layout": "bhsd", "backend": "auto", **options,
    }  # fmt: skip
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 4, generator=g).requires_grad_() for _ in range(3))
    return _prepare(q, k, v, True, *given.values()).arguments


def test_opcheck() -> None:
    decay = (-torch.rand(2, 2, 9, 4)).requires_grad_()
    state = LinearState(torch.randn(2, 2, 4, 4).requires_grad_(), torch.rand(2, 2, 4).requires_grad_())
    delta = {"feature_map": None, "beta": torch.rand(2, 2, 9).requires_grad_(), "decay": -torch.rand(2)}
    for given in ({}, {"decay": decay, "state": state}, {"state": state, "backend": "standard"}, delta):
        opcheck(linear_op, tuple(arguments(**given)))


def test_opcheck_backward() -> None:
    call = arguments(decay=-torch.rand(2, 2, 9))
    call = call._replace(q=call.q.detach(), k=call.k.detach(), v=call.v.detach())
    out, den, s, _ = linear_op(*call)
    opcheck(
        linear_backward_op,
        (torch.randn_like(out), torch.randn_like(s), None, out, den, [True] * 4 + [False] * 3, *call),
    )


def test_double_backward_is_refused() -> None:
    q = torch.randn(1, 1, 5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(linear_attention(q, q, q, causal=True).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


TRANSFORMED = ["elu", "elu+full", "taylor", "none+retention", "none+rwkv", "none+gated-delta"]


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_transforms(kind: str) -> None:
    given = case(kind, 70, batch=1)
    rest = {name: x for name, x in given.items() if name != "q"}

    def loss(q: Tensor) -> Tensor:
        return linear_attention(q, **rest).square().sum()

    q = given["q"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(q), q)
    many = torch.stack((given["q"], 2 * given["q"]))
    torch.testing.assert_close(torch.func.grad(loss)(given["q"]), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(many)[0], expected)
    torch.testing.assert_close(torch.func.vmap(loss)(many)[1], loss(many[1]))
    if "decay" in rest:
        found = torch.func.vmap(lambda decay: linear_attention(**{**given, "decay": decay}))(
            rest["decay"].expand(2, *rest["decay"].shape)
        )
        torch.testing.assert_close(found[1], linear_attention(**given))


# PyTorch's own first jvp in a process warns about a part of itself.
@pytest.mark.parametrize("kind", TRANSFORMED)
def test_what_would_be_silently_zero_is_refused(kind: str) -> None:
    given = case(kind, 20, batch=1)
    rest = {name: x for name, x in given.items() if name != "q"}

    def loss(q: Tensor) -> Tensor:
        return linear_attention(q, **rest).square().sum()

    with pytest.raises(NotImplementedError, match="reverse mode only"):
        torch.func.jvp(loss, (given["q"],), (given["q"],))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(given["q"])


def test_shapes_without_data() -> None:
    """Under fake tensors no value can be looked at."""
    for kind in TRANSFORMED:
        given = case(kind, 20)
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in given.items()}
            assert linear_attention(**fake).shape == (2, 2, 20, 12)


def test_compile_in_a_fresh_process() -> None:
    script = textwrap.dedent(
        """
        import torch, tilewise as tw
        def f(q, k, v, decay):
            out, state = tw.linear_attention(q, k, v, causal=True, feature_map=None, decay=decay, return_state=True)
            unit = k / k.norm(dim=-1, keepdim=True)
            delta = tw.linear_attention(q, unit, v, causal=True, feature_map=None, beta=decay[..., 0].exp())
            return out.sin().sum() + state.s.sum() + tw.linear_attention(q, k, v, causal=False).sum() + delta.sum()
        g = torch.compile(f, fullgraph=True, dynamic=True)
        for n in (40, 57):
            x = [torch.randn(1, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
            decay = torch.nn.functional.logsigmoid(torch.randn(1, 2, n, 8).double()).requires_grad_()
            a, b = f(*x, decay), g(*x, decay)
            torch.testing.assert_close(a, b)
            for y, z in zip(torch.autograd.grad(a, [*x, decay]), torch.autograd.grad(b, [*x, decay])):
                torch.testing.assert_close(y, z)
        print("same")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_autocast_casts() -> None:
    q = torch.randn(1, 2, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_attention(q, q, q, causal=True).dtype == torch.bfloat16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["elu", "delta"])
def test_memory_of_training_64k_tokens(kind: str) -> None:
    """Less than three times the inputs and gradients, measured from outside as the growth of the resident peak."""
    script = textwrap.dedent(
        """
        import resource, sys, torch, tilewise as tw
        torch.set_num_threads(1)
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        def run(n):
            x = [torch.randn(1, 1, n, 64, requires_grad=True) for _ in range(3)]
            given = {}
            if sys.argv[1] == "delta":
                x[1].data /= x[1].data.norm(dim=-1, keepdim=True)
                beta, decay = torch.rand(1, 1, n, requires_grad=True), (-torch.rand(1, 1, n)).requires_grad_()
                given = {"feature_map": None, "beta": beta, "decay": decay}
            tw.linear_attention(*x, causal=True, **given).backward(torch.randn(1, 1, n, 64))
        run(4096)
        before = peak()
        run(65536)
        print((peak() - before) / (7 * 65536 * 64 * 4))
        """
    )
    done = subprocess.run([sys.executable, "-c", script, kind], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3.0
