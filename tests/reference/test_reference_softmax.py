"""Three softmaxes agree, with huge logits and empty rows, and the merge is an algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilewise.reference.softmax import (
    merge,
    merge_sink,
    online_attention,
    online_softmax,
    partial_attention,
    safe_softmax,
)

INF = float("inf")
EPS = torch.finfo(torch.float64).eps
UNDERFLOW = 746.0
"""e^−746 is 0 in float64: no larger difference of logits can matter, nor its rounding."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def relative_bound(x: Tensor, blocks: int = 1) -> float:
    """Relative error of one softmax entry: a rounding of `x − m` counts by its size, once in the exponent and, over all
    rescalings of the online form, once more; the sum adds one rounding a term, each block a few."""
    finite = x[x.isfinite()]
    spread = min((finite.max() - finite.min()).item(), UNDERFLOW) if finite.numel() else 0.0
    return EPS * (2 * spread + x.shape[-1] + 6 * blocks + 8)


def logits(kind: str, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    x = torch.randn(rows, cols, dtype=torch.float64, generator=generator)
    match kind:
        case "huge":
            return x * 1e4
        case "rising":
            return x + torch.arange(cols) * 10.0
        case "holes":
            x = x.masked_fill(torch.rand(rows, cols, generator=generator) < 0.5, -INF)
            x[0] = -INF
            return x
        case _:
            return x


@pytest.mark.parametrize("kind", ["normal", "huge", "rising", "holes"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2), (3, 63), (3, 64), (3, 65), (2, 113)])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_three_softmaxes_agree(kind: str, rows: int, cols: int, block: int) -> None:
    x = logits(kind, rows, cols)
    exact = torch.softmax(x, dim=-1).nan_to_num(0.0)
    allowed = exact * relative_bound(x, math.ceil(cols / block)) + torch.finfo(torch.float64).tiny
    for p in (safe_softmax(x), online_softmax(x, block)):
        assert (p - exact).abs().le(allowed).all()
    # The third way: the values of the identity, in parts, merged from both ends.
    identity = torch.eye(cols, dtype=torch.float64)
    part = partial_attention(x[:, :block], identity[:block])
    for start in range(block, cols, block):
        part = merge(*partial_attention(x[:, start : start + block], identity[start : start + block]), *part)
    blocks = math.ceil(cols / block)
    assert (part.out - exact).abs().le(exact * blocks * relative_bound(x, blocks) + 1e-300).all()
    seen = ~(x == -INF).all(-1)
    lse = torch.logsumexp(x[seen], dim=-1)
    assert (part.lse[seen] - lse).abs().le(blocks * (relative_bound(x, blocks) + 4 * EPS * lse.abs())).all()
    assert (part.lse[~seen] == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = logits("normal", 3, 113).to(dtype)
    exact = torch.softmax(x.double(), dim=-1)
    for p in (safe_softmax(x), online_softmax(x, 16)):
        assert p.dtype == dtype
        # One rounding to dtype, and in float32 the accumulated ones of the row; fp16 results may be subnormal.
        relative = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps * (2 * 10 + 113 + 50)
        assert (p.double() - exact).abs().le(exact * relative + torch.finfo(dtype).smallest_normal * 2**-10).all()


@pytest.mark.parametrize("block", [1, 7, 64])
def test_online_attention_is_one_pass_over_values_too(block: int) -> None:
    x, v = logits("holes", 5, 65), torch.randn(65, 3, dtype=torch.float64)
    out, lse = online_attention(x, v, block)
    p = torch.softmax(x, dim=-1).nan_to_num(0.0)
    assert (out - p @ v).abs().le(p @ v.abs() * (relative_bound(x, 65) + 65 * EPS)).all()
    assert out[0].eq(0).all()
    assert lse[0] == -INF


def test_no_keys_at_all() -> None:
    x, v = torch.zeros(2, 3, 0), torch.zeros(2, 0, 4)
    for out, lse in (online_attention(x, v), partial_attention(x, v)):
        assert out.shape == (2, 3, 4)
        assert out.eq(0).all()
        assert lse.eq(-INF).all()
    assert safe_softmax(x).shape == online_softmax(x).shape == x.shape


def test_a_block_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="block: got 0; wants at least 1"):
        online_softmax(torch.zeros(1, 3), 0)


parts = st.one_of(st.floats(-1000.0, 1000.0), st.sampled_from([-INF, 0.0, -5e3, 5e3]))


def values(lse: list[float], seed: int) -> tuple[Tensor, Tensor]:
    """Partials that obey the contract: a part that saw nothing is 0."""
    lse_tensor = torch.tensor(lse, dtype=torch.float64)
    out = torch.randn(len(lse), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return out.masked_fill((lse_tensor == -INF)[:, None], 0.0), lse_tensor


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(parts, parts), min_size=1, max_size=5), st.integers(0, 1000))
def test_merge_is_commutative_to_the_bit(pairs: list[tuple[float, float]], seed: int) -> None:
    a, b = values([x for x, _ in pairs], seed), values([y for _, y in pairs], seed + 1)
    ab, ba = merge(*a, *b), merge(*b, *a)
    assert torch.equal(ab.out, ba.out)
    assert torch.equal(ab.lse, ba.lse)
    assert not ab.out.isnan().any()
    both_empty = (a[1] == -INF) & (b[1] == -INF)
    assert torch.equal(ab.lse == -INF, both_empty)
    assert ab.out[both_empty].eq(0).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(parts, parts, parts), min_size=1, max_size=5), st.integers(0, 1000))
def test_merge_is_associative(triples: list[tuple[float, float, float]], seed: int) -> None:
    a, b, c = (values([t[i] for t in triples], seed + i) for i in range(3))
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    # A weight e^(lse − m) is off by the rounding of its exponent, at most 746 in size, in each of two merges.
    weight = 2 * (UNDERFLOW + 8) * EPS
    largest = torch.stack([x[0].abs() for x in (a, b, c)]).amax(dim=0)
    assert (left.out - right.out).abs().le(2 * weight * largest).all()
    finite = left.lse.isfinite()
    assert torch.equal(finite, right.lse.isfinite())
    # lse itself is rounded at its own size, and the rounded inner lse shifts a weight by as much.
    size = torch.stack([x[1].masked_fill(x[1] == -INF, 0).abs() for x in (a, b, c)]).amax(dim=0)
    assert (left.lse - right.lse)[finite].abs().le((2 * weight + 4 * EPS * size)[finite]).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(parts, min_size=1, max_size=5), st.integers(0, 1000))
def test_nothing_is_the_neutral_element(lse: list[float], seed: int) -> None:
    a = values(lse, seed)
    merged = merge(*a, torch.zeros_like(a[0]), torch.full_like(a[1], -INF))
    assert torch.equal(merged.out, a[0])
    assert torch.equal(merged.lse, a[1])


def test_merge_keeps_the_precision_of_float32_partials() -> None:
    o1, o2 = torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(3, 5)
    lse1, lse2 = torch.randn(3), torch.randn(3)
    out, lse = merge(o2, lse2, o1, lse1)
    assert out.dtype == lse.dtype == torch.float32
    w = torch.softmax(torch.stack([lse1, lse2]).double(), dim=0)[..., None]
    assert torch.allclose(out.double(), w[0] * o1.double() + w[1] * o2.double(), rtol=0, atol=16 * 2**-23)


def test_a_sink_is_one_more_logit_with_a_value_of_zero() -> None:
    s = logits("holes", 2 * 3 * 5, 7).reshape(2, 3, 5, 7)
    v, sink = torch.randn(2, 3, 7, 4, dtype=torch.float64), torch.tensor([0.3, -INF, 50.0], dtype=torch.float64)
    out, lse = merge_sink(*partial_attention(s, v), sink)
    with_sink = torch.cat([s, sink[None, :, None, None].expand(2, 3, 5, 1)], dim=-1)
    p = torch.softmax(with_sink, dim=-1)[..., :-1].nan_to_num(0.0)
    assert torch.allclose(out, p @ v, rtol=0, atol=200 * EPS * v.abs().max().item())
    assert torch.allclose(lse, torch.logsumexp(with_sink, dim=-1), rtol=200 * EPS, atol=200 * EPS)
    # Head 1 has a sink that is not there; a row that sees nothing then stays empty.
    empty = (s[:, 1] == -INF).all(-1)
    assert lse[:, 1][empty].eq(-INF).all()


def test_gradients() -> None:
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(safe_softmax, (x,))
    assert torch.autograd.gradcheck(lambda x: online_softmax(x, 4), (x,))
    assert torch.autograd.gradcheck(lambda x, v: online_attention(x, v, 4), (x, v))
    assert torch.autograd.gradcheck(partial_attention, (x, v))
    o1, o2 = (torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lse1, lse2 = (torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(merge, (o1, lse1, o2, lse2))
    sink = torch.randn(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_sink, (o1, lse1, sink))


def test_an_empty_part_sends_back_zeros_and_no_nan() -> None:
    x = torch.tensor([[-INF, -INF], [0.0, -INF]], dtype=torch.float64, requires_grad=True)
    v = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    part = partial_attention(x, v)
    out, lse = merge(*part, torch.zeros_like(part.out), torch.full_like(part.lse, -INF))
    (out.sum() + lse[1]).backward()
    assert x.grad is not None
    assert v.grad is not None
    assert torch.equal(x.grad, torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    assert torch.equal(v.grad[:, 0], torch.tensor([1.0, 0.0], dtype=torch.float64))
