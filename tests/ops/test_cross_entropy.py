"""Linear layer and cross-entropy in chunks, against PyTorch with all logits at once in float64."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from tilewise.ops.cross_entropy import linear_cross_entropy

SIZES = [(1, 1, 1), (63, 8, 5), (65, 17, 113), (113, 40, 64), (1000, 16, 2)]
"""(T, dim, V)."""


def inputs(t: int, dim: int, v: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(t)
    x, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((t, dim), (v, dim), (v,)))
    targets = torch.randint(v, (t,), generator=g)
    targets[::3] = -100 if t > 1 else targets[::3]
    return *(each.to(dtype).requires_grad_() for each in (x, weight, bias)), targets


def plainly(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, reduction: str) -> Tensor:
    logits = (x @ weight.t() + bias).to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 1, 64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_loss_and_gradients_in_float64(sizes: tuple[int, int, int], chunk: int | None, reduction: str) -> None:
    x, weight, bias, targets = inputs(*sizes)
    exact = plainly(x, weight, bias, targets, reduction)
    loss = linear_cross_entropy(x, weight, targets, bias=bias, chunk=chunk, reduction=reduction)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3.0 * loss, (x, weight, bias)),
        torch.autograd.grad(3.0 * exact, (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_no_worse_than_all_logits_at_once(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, targets = inputs(*sizes, dtype)
    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    exact = plainly(*wide, targets, "mean")  # type: ignore[call-arg]
    standard = plainly(x, weight, bias, targets, "mean")
    loss = linear_cross_entropy(x, weight, targets, bias=bias, chunk=32)
    eps = torch.finfo(dtype).eps
    assert abs(loss.item() - exact.item()) <= 2 * abs(standard.item() - exact.item()) + eps * exact.item()
    grads, base = torch.autograd.grad(loss, (x, weight, bias)), torch.autograd.grad(standard, (x, weight, bias))
    for ours, theirs, true in zip(grads, base, torch.autograd.grad(exact, wide), strict=True):
        assert ours.dtype == dtype
        allowed = 3 * (theirs.double() - true).abs().max() + 2 * eps * true.abs().max()
        assert (ours.double() - true).abs().max() <= allowed


def test_shapes_and_unused_gradients() -> None:
    x, weight, _, targets = inputs(60, 8, 11)
    whole = linear_cross_entropy(x, weight, targets)
    shaped = linear_cross_entropy(x.view(3, 4, 5, 8), weight, targets.view(3, 4, 5))
    assert torch.equal(whole, shaped)
    (dweight,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, targets), weight)
    torch.testing.assert_close(dweight, torch.autograd.grad(whole, weight)[0])
    assert not linear_cross_entropy(x.detach(), weight.detach(), targets).requires_grad
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    assert nothing.item() == 0.0
    assert not torch.autograd.grad(nothing, x)[0].any()


def test_huge_logits() -> None:
    x, weight, bias, targets = inputs(33, 8, 50, torch.float32)
    loss = linear_cross_entropy(1e4 * x, weight, targets, bias=bias)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, weight, bias)))


def test_as_a_torch_operator() -> None:
    x, weight, bias, targets = inputs(20, 8, 11)
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, chunk=7), (x, weight, bias)
    )
    for tensors in ((x, weight, bias), (x.detach(), weight, None)):
        needs = [each is not None and each.requires_grad for each in tensors]
        args = (*tensors, targets, -100, True, 7, torch.float64, needs)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        opcheck(torch.ops.tilewise.linear_cross_entropy.default, args, test_utils=tests)
    script = textwrap.dedent(
        """
        import torch
        from tilewise.ops.cross_entropy import linear_cross_entropy
        def f(x, w, t): return linear_cross_entropy(x.sin(), w, t) * 2
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 9, 8, requires_grad=True); w = torch.randn(11, 8, requires_grad=True)
        t = torch.randint(11, (2, 9))
        torch.testing.assert_close(compiled(x, w, t), f(x, w, t))
        for a, b in zip(torch.autograd.grad(compiled(x, w, t), (x, w)), torch.autograd.grad(f(x, w, t), (x, w))):
            torch.testing.assert_close(a, b)
        print("compiled and equal")
        """
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "compiled and equal" in run.stdout, run.stderr[-2000:]


def test_autocast() -> None:
    """Computed in bfloat16; the weights' gradient is gathered and returned in float32."""
    x, weight, bias, targets = inputs(113, 40, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, bias=bias)
    grads = torch.autograd.grad(loss, (x, weight, bias))
    exact = plainly(x, weight, bias, targets, "mean")
    assert loss.item() != exact.item()
    assert all(g.dtype == torch.float32 for g in (loss, *grads))
    for ours, true in zip((loss, *grads), (exact, *torch.autograd.grad(exact, (x, weight, bias))), strict=True):
        assert (ours - true).norm() <= 2**-7 * true.norm()


def test_memory_is_that_of_a_chunk() -> None:
    """32 MiB of logits never exist: the largest tensor made is the gradient of the inputs."""
    x = torch.randn(8192, 16, requires_grad=True)
    weight = torch.randn(1024, 16, requires_grad=True)
    targets = torch.randint(1024, (8192,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(x, weight, targets, chunk=256).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 8192 * 16 * 4 <= largest <= 2 * 256 * 1024 * 4


def test_bad_input() -> None:
    x, weight, bias, targets = inputs(20, 8, 11)
    for arguments, options, message in [
        ((x, weight.t(), targets), {}, r"weight: got shape \[8, 11\].*Fix: weight.t\(\)"),
        ((x, weight.float(), targets), {}, "weight: got dtype torch.float32"),
        ((x, weight, targets.int()), {}, "targets: got dtype torch.int32"),
        ((x, weight, targets[:3]), {}, r"targets: got shape \[3\]"),
        ((x, weight, targets.clamp(min=0) + 11), {}, "targets: got class 1"),
        ((x, weight, targets), {"bias": bias[:3]}, r"bias: got shape \[3\]"),
        ((x, weight, targets), {"reduction": "none"}, "reduction: got 'none'"),
        ((x, weight, targets), {"chunk": 0}, "chunk: got 0"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            linear_cross_entropy(*arguments, **options)  # type: ignore[arg-type]
