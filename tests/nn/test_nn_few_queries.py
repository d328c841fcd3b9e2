"""A few rows against all tokens: against attention in float64, in every dtype, and where nothing is seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tilewise import nn as tnn
from tilewise.nn.few_queries import attend_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def exact(queries: Tensor, tokens: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    s = queries @ tokens.mT * scale
    s = s if bias is None else s + bias
    if mask is None:
        return torch.softmax(s, -1) @ tokens
    weights = torch.exp(s - s.amax(-1, keepdim=True)) * mask
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300) @ tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_against_float64(dtype: torch.dtype, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=g).to(dtype) for size in ((2, 6, 24), (2, 301, 24), (2, 6, 1), (2, 6, 24))]
    *given, dout = (x.to(device) for x in given)
    mask = (torch.rand(2, 1, 301, generator=g) > 0.4).to(device)
    mask[1] = False
    leaves = [x.clone().requires_grad_() for x in given]
    wide = [x.double().requires_grad_() for x in given]
    out = attend_tokens(leaves[0], leaves[1], mask, leaves[2], 0.5)
    expected = exact(wide[0], wide[1], mask, wide[2], 0.5)
    assert out.dtype == dtype
    assert out[1].abs().max() == 0
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    wanted = [expected, *torch.autograd.grad(expected, wide, dout.double())]
    # P and dS are rounded once each before their products, the results once after; Δ's terms are sums of 24.
    allowed = 8 * torch.finfo(dtype).eps
    for name, ours, theirs in zip(("out", "dq", "dx"), found, wanted, strict=False):
        assert (ours.double() - theirs).norm() <= allowed * theirs.norm(), name
    assert found[3].abs().max() <= allowed  # a number that a whole row shares changes nothing


def test_its_gradients() -> None:
    g = torch.Generator().manual_seed(1)
    q, x = (torch.randn(2, n, 5, generator=g, dtype=torch.float64, requires_grad=True) for n in (3, 7))
    assert torch.autograd.gradcheck(lambda q, x: attend_tokens(q, x, None, None, 0.7), (q, x))


def test_what_is_not_a_number_stays_so() -> None:
    x = torch.randn(1, 9, 4)
    x[0, 3, 2] = math.nan
    assert attend_tokens(torch.randn(1, 2, 4), x, torch.ones(1, 1, 9, dtype=torch.bool), None, 1.0).isnan().all()


def test_under_vmap_and_autocast() -> None:
    q, x = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 20, 8)
    one_by_one = torch.stack([attend_tokens(a, b, None, None, 1.0) for a, b in zip(q, x, strict=True)])
    torch.testing.assert_close(torch.vmap(lambda a, b: attend_tokens(a, b, None, None, 1.0))(q, x), one_by_one)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attend_tokens(q[0], x[0], None, None, 1.0), one_by_one[0])


@pytest.mark.parametrize("places", [(0, 1), (5, 30)], ids=str)
def test_longformer_without_gradients_is_the_same(places: tuple[int, ...]) -> None:
    module = tnn.LongformerAttention(32, 4, window=8, global_tokens=places)
    x = torch.randn(2, 50, 32)
    with torch.no_grad():
        alone = module(x)
    torch.testing.assert_close(module(x), alone)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo itself does
def test_longformer_compiled() -> None:
    module = tnn.LongformerAttention(32, 4, window=8, global_tokens=(0,))
    x = torch.randn(2, 50, 32, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True)(x)
    expected = module(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled, expected)))


def test_its_second_derivatives() -> None:
    g = torch.Generator().manual_seed(2)
    q, x = (torch.randn(2, n, 4, generator=g, dtype=torch.float64, requires_grad=True) for n in (2, 5))
    mask = torch.rand(2, 1, 5, generator=g) > 0.3
    assert torch.autograd.gradgradcheck(lambda q, x: attend_tokens(q, x, mask, None, 0.7), (q, x))


def test_only_what_is_wanted_is_computed() -> None:
    q, x = torch.randn(1, 2, 4), torch.randn(1, 9, 4)
    for wanting in (q, x):
        wanting.requires_grad_()
        (grad,) = torch.autograd.grad(attend_tokens(q, x, None, None, 1.0).sum(), wanting)
        assert grad.shape == wanting.shape
        wanting.requires_grad_(requires_grad=False)


def test_small_gradients_in_float16_keep_their_digits() -> None:
    """dS is rounded before it is scaled: a weight is 1/N, and float16 ends at 6e-8."""
    g = torch.Generator().manual_seed(3)
    q, x = torch.randn(1, 4, 64, generator=g).half(), torch.randn(1, 16384, 64, generator=g).half()
    dout = (1e-2 * torch.randn(1, 4, 64, generator=g)).half()
    leaves = [t.clone().requires_grad_() for t in (q, x)]
    wide = [t.double().requires_grad_() for t in (q, x)]
    (found,) = torch.autograd.grad(attend_tokens(*leaves, None, None, 0.125), leaves[0], dout)
    (wanted,) = torch.autograd.grad(exact(*wide, None, None, 0.125), wide[0], dout.double())
    assert (found - wanted).norm() <= torch.finfo(torch.float16).eps * wanted.norm()


def test_longformer_takes_meta_tensors_and_masks_of_every_shape() -> None:
    module = tnn.LongformerAttention(32, 4, window=8, global_tokens=(0,), device="meta")
    assert module(torch.empty(1, 200, 32, device="meta")).shape == (1, 200, 32)
    module = tnn.LongformerAttention(32, 4, window=8, global_tokens=(0,))
    x, mask = torch.randn(3, 40, 32), torch.rand(1, 1, 1, 40) > 0.3
    torch.testing.assert_close(module(x, mask=mask), module(x, mask=mask.expand(3, 1, 1, 40)))


@pytest.mark.parametrize("name", ["global_q_proj.weight", "global_k_proj.bias", "global_v_proj.bias"])
def test_longformer_under_vmap_over_one_weight(name: str) -> None:
    module = tnn.LongformerAttention(16, 2, window=4, global_tokens=(0,), bias=True)
    x, weight = torch.randn(1, 20, 16), module.get_parameter(name).detach()
    several = torch.stack([weight, 2 * weight, -weight])

    def call(value: Tensor) -> Tensor:
        return torch.func.functional_call(module, {name: value}, (x,))

    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(call)(several), torch.stack([call(value) for value in several]))
