"""Second derivatives through `torch.func`, where a kernel that records nothing would silently answer zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tilewise as tw
from tilewise.ops.rotary import rotary


def test_attention_refuses_them() -> None:
    q, k = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 9, 8)

    def first(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: tw.attention(q, k, k, layout="bhsd").square().sum())(q).sum()

    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(first)(q)


def test_the_rotation_has_them() -> None:
    """Of Σ (Rx)⁴ with a rotation R: the gradient's own gradient along ones is 12·Rᵀ((Rx)²∘(R·1))."""
    x = torch.randn(1, 2, 7, 8, dtype=torch.float64)

    def first(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: rotary(x, layout="bhsd").pow(4).sum())(x).sum()

    found = torch.func.grad(first)(x)
    turned, ones = rotary(x, layout="bhsd"), rotary(torch.ones_like(x), layout="bhsd")
    torch.testing.assert_close(found, rotary(12 * turned.square() * ones, layout="bhsd", inverse=True))
