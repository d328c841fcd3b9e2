"""A call like one made before skips its checks and the dispatcher: it must give the same, and still be refused, seen
and transformed where that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise


def standard(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors of a shape whose causal call has been made."""
    q, k, v = torch.randn(3, 2, 4, 17, 24).unbind()
    tilewise.attention(q, k, v, causal=True)
    return q, k, v


def test_the_same_again(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = (torch.randn_like(x) for x in qkv)
    torch.testing.assert_close(tilewise.attention(q, k, v, causal=True), standard(q, k, v))
    torch.testing.assert_close(tilewise.attention(q, k, v), standard(q, k, v, causal=False))
    out, lse = tilewise.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out, standard(q, k, v))
    assert lse.shape == q.shape[:3]


def test_other_strides_and_the_other_layout(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = (torch.randn(2, 17, 4, 24) for _ in qkv)
    flipped = [x.transpose(1, 2) for x in (q, k, v)]
    expected = standard(flipped[0], flipped[1], flipped[2])
    for _ in range(2):
        out = tilewise.attention(q, k, v, causal=True, layout="bshd")
        torch.testing.assert_close(out.transpose(1, 2), expected)
        assert out.is_contiguous()
        torch.testing.assert_close(tilewise.attention(*flipped, causal=True), expected)
    columns = torch.randn(2, 4, 24, 17).transpose(2, 3)
    torch.testing.assert_close(
        tilewise.attention(columns, k=columns, v=columns, causal=True), standard(columns, columns, columns)
    )


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qkv"])
def test_gradients(qkv: tuple[Tensor, ...], wanted: str) -> None:
    leaves = [x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", qkv, strict=True)]
    wants = [x for x in leaves if x.requires_grad]
    expected = torch.autograd.grad(standard(leaves[0], leaves[1], leaves[2]).square().sum(), wants)
    for _ in range(2):
        torch.testing.assert_close(
            torch.autograd.grad(tilewise.attention(*leaves, causal=True).square().sum(), wants), expected
        )


def test_what_was_wrong_is_still_wrong(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    for bad in (
        lambda: tilewise.attention(q, k, v.double(), causal=True),
        lambda: tilewise.attention(q, k, v[:, :, 1:], causal=True),
        lambda: tilewise.attention(q, k, [1.0], causal=True),  # type: ignore[arg-type]
        lambda: tilewise.attention(q, k, v, causal="yes"),  # type: ignore[arg-type]
        lambda: tilewise.attention(q, k, v, causal=True, window=[1]),  # type: ignore[arg-type]
        lambda: tilewise.attention(q, k, v, causal=True, scale=float("nan")),
        lambda: tilewise.attention(q, k, v, causal=True, softcap=torch.ones(2)),  # type: ignore[arg-type]
    ):
        for _ in range(2):
            with pytest.raises((ValueError, TypeError)):
                bad()


class Names(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_operator(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    with Names() as names:
        tilewise.attention(q, k, v, causal=True)
    assert any(name.startswith("tilewise.attention") for name in names.seen)
    with torch.profiler.profile() as profile:
        tilewise.attention(q, k, v, causal=True)
    assert any(event.key == "tilewise::attention" for event in profile.key_averages())


def test_transforms_and_lazily_negated_tensors(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    negated = torch._neg_view(q)
    torch.testing.assert_close(tilewise.attention(negated, k, v, causal=True), standard(-q, k, v))
    mapped = torch.func.vmap(lambda x: tilewise.attention(x, k, v, causal=True))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(mapped, torch.stack([standard(q, k, v), standard(2 * q, k, v)]))
    grad = torch.func.grad(lambda x: tilewise.attention(x, k, v, causal=True).square().sum())(q)
    leaf = q.detach().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(standard(leaf, k, v).square().sum(), leaf)[0])


def test_autocast_inference_and_forward_mode(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tilewise.attention(q, k, v, causal=True).dtype == torch.bfloat16
    with torch.inference_mode():
        torch.testing.assert_close(tilewise.attention(q, k, v, causal=True), standard(q, k, v))
    q = q.clone()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        tilewise.attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v, causal=True)


def test_double_backward_is_refused_the_second_time_too(qkv: tuple[Tensor, ...]) -> None:
    q = qkv[0].detach().requires_grad_()
    for _ in range(2):
        out = tilewise.attention(q, q, q, causal=True)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()
