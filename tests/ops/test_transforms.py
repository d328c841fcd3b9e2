"""torch.func and compiled graphs beyond the plain call: what works is right, what does not says so."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

import tilewise
from tilewise.reference import standard_attention


def attend(q: Tensor) -> Tensor:
    return tilewise.attention(q, q, q, causal=True, sink=torch.ones(q.shape[1]))


def expected_gradient(q: Tensor) -> Tensor:
    q = q.clone().requires_grad_()
    return torch.autograd.grad(attend(q).square().sum(), q)[0]


def test_functional_gradients() -> None:
    q = torch.randn(1, 2, 140, 8)
    torch.testing.assert_close(torch.func.grad(lambda x: attend(x).square().sum())(q), expected_gradient(q))
    out, pullback = torch.func.vjp(attend, q)
    torch.testing.assert_close(pullback(2 * out)[0], expected_gradient(q))


def test_vmap_and_gradients_a_sample() -> None:
    q = torch.randn(3, 1, 2, 20, 8)
    torch.testing.assert_close(torch.func.vmap(attend)(q), torch.stack([attend(x) for x in q]))
    a_sample = torch.func.vmap(torch.func.grad(lambda x: attend(x).square().sum()))(q)
    torch.testing.assert_close(a_sample, torch.stack([expected_gradient(x) for x in q]))


# PyTorch's own first jvp in a process warns about a part of itself.
def test_forward_mode_is_refused_and_the_reference_takes_it() -> None:
    q = torch.randn(1, 2, 10, 8)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation: tilewise attention has reverse mode"):
        torch.func.jvp(attend, (q,), (q,))
    _, tangent = torch.func.jvp(lambda x: standard_attention(x, x, x).out, (q,), (q,))
    assert tangent.abs().max() > 0


def test_inductor_may_reuse_the_memory_of_a_mask() -> None:
    """Two masks that live one after another in one buffer of a compiled graph are two masks."""
    script = textwrap.dedent(
        """
        import torch, tilewise as tw
        from tilewise.backends import tiled
        tiled.DENSE_ELEMENTS = 0  # tile maps, not dense masks
        def f(q, near, far):
            rows = torch.arange(q.shape[2])
            distance = rows[:, None] - rows[None]
            out = tw.attention(q, q, q, mask=(distance >= 0) & (distance < near))
            return tw.attention(out, q, q, mask=(distance >= 0) & (distance < far))
        q, near, far = torch.randn(1, 2, 140, 16), torch.tensor(4), torch.tensor(30)
        torch.testing.assert_close(torch.compile(f)(q, near, far), f(q, near, far))
        print("equal")
        """
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "equal" in run.stdout


def test_defaults_and_changing_numbers_compile() -> None:
    q = torch.randn(1, 2, 20, 8)
    plain = torch.compile(lambda x: tilewise.attention(x, x, x), fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(plain(q), tilewise.attention(q, q, q))

    def scaled(x: Tensor, scale: float) -> Tensor:
        return tilewise.attention(x, x, x, scale=scale, softcap=1 + scale)

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(q, scale), scaled(q, scale))


@pytest.mark.parametrize(
    "mask",
    [
        tilewise.masks.Causal() & tilewise.masks.Window(9, 0),
        tilewise.masks.Documents([0] * 50 + [1] * 90),
        tilewise.masks.Tree([-1, 0, 0, 1]),
        tilewise.masks.Dense(torch.ones(140, 140, dtype=torch.bool).tril()),
        tilewise.masks.Causal(torch.tensor([3])),
    ],
    ids=str,
)
def test_captured_masks_compile(mask: tilewise.masks.Mask) -> None:
    q = torch.randn(1, 2, 140, 8)
    compiled = torch.compile(lambda x: tilewise.attention(x, x, x, mask), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), tilewise.attention(q, q, q, mask))
