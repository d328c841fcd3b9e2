"""Standard attention, whole and in six steps, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import budget
import oracle
from tilewise.reference.standard import six_step_attention, standard_attention

SIZES = [(1, 1), (2, 63), (63, 2), (65, 64), (113, 65)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(n: int, m: int, heads: int = 4, kv_heads: int = 2, d: int = 40, dv: int = 24) -> dict[str, Tensor]:
    shapes = {"q": (2, heads, n, d), "k": (2, kv_heads, m, d), "v": (2, kv_heads, m, dv)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def as_oracle(function: Any) -> budget.Attention:
    """The oracle's argument names for a reference."""
    return lambda mask=None, **rest: function(**rest, allowed=mask)


def six_steps(**arguments: Any) -> tuple[Tensor, Tensor]:
    return six_step_attention(**arguments)[0]


@pytest.mark.parametrize("function", [standard_attention, six_steps])
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_oracle(function: Any, n: int, m: int, causal: bool, dtype: torch.dtype) -> None:
    tensors = inputs(n, m)
    mask = torch.rand(2, 1, n, m) < 0.6
    mask[:, :, 0] = False
    bias = torch.randn(1, 4, 1, m)
    case = budget.Case({**tensors, "mask": mask, "bias": bias}, {"causal": causal, "scale": 0.2})
    budget.assert_within(as_oracle(function), case, dtype, torch.randn(2, 4, n, 24), torch.randn(2, 4, n))


@pytest.mark.parametrize("function", [standard_attention, six_steps])
def test_gradients(function: Any) -> None:
    tensors = {name: x.double().requires_grad_() for name, x in inputs(5, 7, 2, 1, 4, 3).items()}
    bias = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: function(q=q, k=k, v=v, bias=bias, causal=True), (*tensors.values(), bias)
    )


@pytest.mark.parametrize("function", [standard_attention, six_steps])
def test_a_row_that_sees_nothing(function: Any) -> None:
    tensors = {name: x.requires_grad_() for name, x in inputs(7, 3).items()}
    out, lse = function(**tensors, causal=True)
    assert out[:, :, :4].eq(0).all()
    assert lse[:, :, :4].eq(-float("inf")).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 4:].sum(), list(tensors.values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][:, :, :4].eq(0).all()


def test_no_keys() -> None:
    tensors = inputs(3, 0)
    for out, lse in (standard_attention(**tensors), six_steps(**tensors)):
        assert out.eq(0).all()
        assert lse.eq(-float("inf")).all()


def test_the_softmax_gradient_is_not_p_times_one_minus_p() -> None:
    """`P∘(1−P)` is the diagonal of the Jacobian; the gradient is `P∘(dP − rowsum(dP∘P))`."""
    q, k, v = (x.double() for x in inputs(5, 6, 1, 1, 4, 3).values())
    s = (q @ k.mT * 0.5).requires_grad_()
    p = torch.softmax(s, dim=-1)
    dout = torch.randn(2, 1, 5, 3, dtype=torch.float64)
    (ds,) = torch.autograd.grad(p @ v, s, dout)
    dp = dout @ v.mT
    right = p * (dp - (dp * p).sum(-1, keepdim=True))
    assert torch.allclose(ds, right, rtol=0, atol=64 * torch.finfo(torch.float64).eps * dp.abs().max().item())
    assert (ds - p * (1 - p) * dp).abs().max() > 0.1 * ds.abs().max()
    jacobian = torch.autograd.functional.jacobian(lambda row: torch.softmax(row, dim=-1), s[0, 0, 0].detach())
    assert torch.allclose(jacobian.diagonal(), (p * (1 - p))[0, 0, 0].detach())


def test_the_oracle_agrees_that_delta_is_dout_times_out() -> None:
    """`rowsum(dP∘P) = rowsum(dO∘O)`: what lets the backward find delta without a tile of P."""
    q, k, v = (x.double() for x in inputs(9, 11, 1, 1).values())
    identity = torch.eye(11, dtype=torch.float64).expand(2, 1, 11, 11)
    p, _ = oracle.attention(q, k, identity)
    dout = torch.randn(2, 1, 9, 24, dtype=torch.float64)
    left, right = ((dout @ v.mT) * p).sum(-1), (dout * (p @ v)).sum(-1)
    bound = 64 * torch.finfo(torch.float64).eps * (dout.abs() @ v.abs().mT).max().item()
    assert torch.allclose(left, right, rtol=0, atol=bound)
