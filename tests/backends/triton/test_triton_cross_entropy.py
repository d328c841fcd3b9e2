"""The cross-entropy kernel against the PyTorch path in float64: interpreted on a CPU, at full size on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from aot import compiling, resources

from tilewise.backends import cross_entropy as eager
from tilewise.backends.triton.cross_entropy import softmax_gradient
from tilewise.ops.cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(rows: int, columns: int, dtype: torch.dtype, spread: float) -> None:
    g = torch.Generator().manual_seed(columns)
    logits = (spread * torch.randn(rows, columns, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(columns, (rows,), generator=g).to(DEVICE)
    targets[::3] = -7
    if rows > 2:
        logits[2] = float("-inf")
        logits[2, targets[2].clamp(min=0)] = 1.0
    exact, before = logits.double(), logits.clone()
    exact_losses = eager.softmax_gradient(exact, targets, -7, gradient=True)
    losses = softmax_gradient(logits, targets, -7, gradient=False)
    assert torch.equal(logits, before)
    assert torch.equal(softmax_gradient(logits, targets, -7, gradient=True), losses)
    # e^x and ln x to 2 roundings, and V of them summed lane by lane.
    eps = 2.0**-23
    assert (losses.double() - exact_losses).abs().max() <= 8 * eps * (1 + before.float()[before.isfinite()].abs().max())
    size = 1 + before.float()[before.isfinite()].abs().max()
    assert (logits.double() - exact).abs().max() <= 8 * eps * size + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 63), (5, 65), (3, 4097), (4, 9001)], ids=str)
def test_kernel_is_what_pytorch_does(sizes: tuple[int, int], dtype: torch.dtype, kernels: None) -> None:
    for spread in (1.0, 100.0):
        check(*sizes, dtype, spread)


def test_targets_may_be_a_column_and_the_ignored_class_any_integer(kernels: None) -> None:
    """Launched again with other integers: what the first launch remembered holds for them too."""
    logits, table = torch.randn(9, 65, device=DEVICE), torch.randint(65, (9, 3), device=DEVICE)
    expected = torch.nn.functional.cross_entropy(logits, table[:, 1], reduction="none")
    for ignore in (-100, 1 << 40, -100, int(table[4, 1])):
        losses = softmax_gradient(logits, table[:, 1], ignore, gradient=False)
        torch.testing.assert_close(losses, expected.masked_fill(table[:, 1] == ignore, 0.0))


def test_a_target_that_is_no_class_shows(kernels: None) -> None:
    logits = torch.randn(3, 65, device=DEVICE)
    losses = softmax_gradient(logits, torch.tensor([0, 65, -1], device=DEVICE), -100, gradient=False)
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vocabulary_of_gpt2(dtype: torch.dtype) -> None:
    check(1000, 50257, dtype, 4.0)


@pytest.mark.gpu
def test_operator_on_a_gpu() -> None:
    x = torch.randn(3000, 256, device="cuda").requires_grad_()
    weight = torch.randn(50257, 256, device="cuda").mul_(0.05).requires_grad_()
    targets = torch.randint(50257, (3000,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, chunk=700)
    exact = torch.nn.functional.cross_entropy(x.double() @ weight.double().t(), targets)
    assert abs(loss.item() - exact.item()) <= 2**-9 * exact.item()
    grads, true = torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(exact, (x, weight))
    for ours, theirs in zip(grads, true, strict=True):
        assert (ours - theirs).norm() <= 2**-7 * theirs.norm()


@pytest.mark.parametrize("arch", [80, 90, 120], ids=lambda arch: f"compile-sm_{arch}")
def test_compile_spills_nothing(arch: int, compiler: None) -> None:
    for columns, dtype in ((256, torch.float32), (50257, torch.bfloat16), (50257, torch.float32)):
        logits = torch.empty(64, columns, dtype=dtype, device="meta")
        with compiling(arch) as compiled:
            softmax_gradient(logits, torch.empty(64, dtype=torch.int64, device="meta"), -100, gradient=True)
        report = resources(compiled[0])
        assert report.spills == 0, report[:4]
