"""Linear attention: parallel = chunked = recurrent = the definition, in float64, forward and backward."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from linear_oracle import KINDS, Judged, case, leaves_of
from tilewise.reference.features import (
    FIXED,
    favor_logs,
    random_projection,
    stabilised_keys,
    stabilised_queries,
    taylor,
)
from tilewise.reference.linear import EPSILON, LinearState, chunked, parallel, recurrent
from tilewise.reference.standard import standard_attention

SIZES = (1, 63, 64, 100)
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "parallel": (parallel, {}),
    "recurrent": (recurrent, {}),
    "chunks of 64": (chunked, {"chunk": 64}),
    "chunks of 16": (chunked, {"chunk": 16}),
    "chunks of 33": (chunked, {"chunk": 33, "subchunk": 5}),
}


@lru_cache(maxsize=200)
def judged(kind: str, n: int) -> Judged:
    return Judged(case(kind, n, state=n % 2 == 0, seed=n))


def errors(form: Any, problem: Judged, **options: Any) -> dict[str, float]:
    leaves = leaves_of(problem.given)
    apply = FIXED[problem.given["feature_map"] or "identity"]
    given = {name: x for name, x in leaves.items() if name in ("decay", "bonus", "beta")}
    if "decay" in given and given["decay"].dim() == 1:
        given["decay"] = given["decay"][None, :, None].expand(leaves["q"].shape[:3])
    if "s" in leaves:
        given["state"] = LinearState(leaves["s"], leaves["z"])
    if form is not recurrent:
        given["causal"] = problem.given["causal"]
    q, k = apply(leaves["q"]), apply(leaves["k"])
    result = form(q, k, leaves["v"], **given, normalize=problem.normalized, **options)
    outputs = [result.out, result.state.s, *([result.state.z] if problem.normalized else [])]
    found = torch.autograd.grad(outputs, list(leaves.values()), problem.cotangents, materialize_grads=True)
    return problem.errors(outputs, dict(zip(leaves, found, strict=True)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_the_definition(kind: str, form: str) -> None:
    function, options = FORMS[form]
    if function is recurrent and kind.endswith("full"):
        pytest.skip("a recurrence is causal")
    for n in SIZES:
        found = errors(function, judged(kind, n), **options)
        assert max(found.values()) < 1e-11, (n, found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_tokens(kind: str) -> None:
    problem = Judged(case(kind, 1000, batch=1, heads=1, dim=4, dim_v=3, state=True))
    for name in ("parallel", "recurrent", "chunks of 64", "chunks of 33"):
        form, options = FORMS[name]
        if form is recurrent and kind.endswith("full"):
            continue
        found = errors(form, problem, **options)
        assert max(found.values()) < 1e-10, (name, found)


def test_thousands_of_tokens_one_by_one() -> None:
    found = errors(recurrent, Judged(case("none+gated-delta", 4097, batch=1, heads=1, dim=4, dim_v=3)))
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("gates", [-1e3, -60.0, -1e-9, 0.0, float("-inf")])
def test_extreme_decays_stay_finite_and_agree(gates: float) -> None:
    """A weight's exponent is a difference of sums, which in float32 are as exact as the largest of them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 8, generator=g) for _ in range(3))
    decay = torch.full((1, 2, 200, 8), gates)
    decay[..., 1::3, :] = -1e-3
    exact = recurrent(q.double(), k.double(), v.double(), decay=decay.double()).out
    for form, span, options in ((recurrent, 0, {}), (chunked, 64, {}), (parallel, 200, {"causal": True})):
        out = form(q, k, v, decay=decay, **options).out.double()
        allowed = span * min(-gates, 60.0) * 2**-24 + 2**-20
        assert (out - exact).norm() <= allowed * exact.norm()


@pytest.mark.parametrize("gates", [None, -1e-9, -5.0, -60.0, float("-inf")])
@pytest.mark.parametrize("beta", [0.0, 1e-4, 1.0, 2.0])
def test_the_delta_rule_in_float32_with_one_key_again_and_again(beta: float, gates: float | None) -> None:
    """The triangular system at its worst: every key finds what the others wrote. Its condition number is at most the
    square of 1 + β times the tokens of a chunk; sums of log decays are as exact as the largest of them."""
    g = torch.Generator().manual_seed(0)
    q, v, one, noise = (torch.randn(1, 2, n, 8, generator=g) for n in (200, 200, 1, 200))
    k = torch.nn.functional.normalize(one + 1e-3 * noise, dim=-1)
    options: dict[str, torch.Tensor] = {"beta": torch.full((1, 2, 200), beta)}
    if gates is not None:
        options["decay"] = torch.full((1, 2, 200), gates)
        options["decay"][..., 1::3] = -1e-3
    wide = {name: x.double() for name, x in options.items()}
    exact = recurrent(q.double(), k.double(), v.double(), **wide).out
    span = 0.0 if gates is None else 64 * min(-gates, 60.0)
    out = chunked(q, k, v, **options).out.double()
    allowed = (span + (1 + 64 * beta) ** 2) * 2**-24 + 2**-20
    assert (out - exact).norm() <= allowed * exact.norm()


def test_taylor_is_the_second_order_expansion() -> None:
    q, k = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    s = (q * k).sum(-1) / 7**0.5
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s * s / 2)


def test_orthogonal_directions_are_orthogonal_and_as_long_as_gaussian_ones() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = random_projection(40, 16, generator=g)
    for block in drawn.split(16):
        product = block @ block.mT
        assert (product - product.diag().diag()).abs().max() < 1e-12
    lengths = random_projection(16 * 500, 16, generator=g).square().sum(-1)
    assert abs(lengths.mean().item() - 16) < 0.3
    assert abs(lengths.var().item() - 32) < 4


def test_the_causal_stabiliser_streams_and_changes_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, 2, 90, 8, generator=g, dtype=torch.float64) for _ in range(3))
    directions = random_projection(24, 8, generator=g)
    logs_q, logs_k = favor_logs(q, directions), favor_logs(k, directions)
    scores = (logs_q[:, :, :, None] + logs_k[:, :, None]).logsumexp(-1)
    scores = scores.masked_fill(~torch.ones(90, 90, dtype=torch.bool).tril(), float("-inf"))
    features, decay, shift = stabilised_keys(logs_k, True, None)
    assert features.max() <= 1
    assert (decay <= 0).all()
    whole = chunked(stabilised_queries(logs_q), features, v, decay=decay, normalize=True)
    assert whole.den is not None
    exact = scores.softmax(-1) @ v * (1 - EPSILON / whole.den[..., None])
    torch.testing.assert_close(whole.out, exact)
    first, decay, before = stabilised_keys(logs_k[:, :, :40], True, None)
    start = chunked(stabilised_queries(logs_q[:, :, :40]), first, v[:, :, :40], decay=decay, normalize=True)
    rest, decay, after = stabilised_keys(logs_k[:, :, 40:], True, before)
    last = chunked(
        stabilised_queries(logs_q[:, :, 40:]), rest, v[:, :, 40:], decay=decay, normalize=True, state=start.state
    )
    torch.testing.assert_close(torch.cat((start.out, last.out), 2), whole.out)
    torch.testing.assert_close(after, shift)


def test_favor_converges_to_softmax_attention() -> None:
    """Monte Carlo: the error falls as 1/√features."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (0.5 * torch.randn(1, 1, 24, 8, generator=g, dtype=torch.float64) for _ in range(3))
    exact = standard_attention(q, k, v, causal=True).out
    counts, means = (16, 64, 256, 1024), []
    for features in counts:
        found = []
        for _ in range(40):
            directions = random_projection(features, 8, generator=g)
            keys, decay, _ = stabilised_keys(favor_logs(k, directions), True, None)
            out = chunked(stabilised_queries(favor_logs(q, directions)), keys, v, decay=decay, normalize=True).out
            found.append((out - exact).square().mean())
        means.append(torch.stack(found).mean().sqrt().log())
    x, y = torch.tensor(counts, dtype=torch.float64).log(), torch.stack(means)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert abs(slope.item() + 0.5) < 0.1
