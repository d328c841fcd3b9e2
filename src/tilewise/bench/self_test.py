"""One small problem that tells whether a backend computes the right thing on this machine."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

import tilewise
from tilewise.bench.exactness import exact_and_budget, largest_error
from tilewise.bench.inputs import Inputs
from tilewise.reference.standard import standard_attention

GRADIENT_LIMIT = {torch.float32: 1e-4, torch.float16: 1e-2}
"""Of the largest gradient: far above rounding at this size, and far below what any mistake makes."""


class SelfTest(NamedTuple):
    """Errors against float64 and what is allowed; gradients as a share of the largest one."""

    error: float
    error_allowed: float
    gradient: float
    gradient_allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.error_allowed and self.gradient <= self.gradient_allowed

    def __str__(self) -> str:
        return (
            f"error {self.error:.1e} of {self.error_allowed:.1e} allowed, "
            f"gradients {self.gradient:.1e} of {self.gradient_allowed:.1e}"
        )


def small_case(device: torch.device) -> Inputs:
    """q [2, 4, 65, 40], k and v [2, 4, 113, 40], lengths that fill no tile; float32 on a CPU, else float16."""
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 65, 40), (2, 4, 113, 40), (2, 4, 113, 40))
    return Inputs(*(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes))


def self_test(case: Inputs, backend: str) -> SelfTest:
    """Causal attention of `case` on `backend`, forward and backward, against float64.

    Raises:
        UnsupportedError: the backend cannot run here.
    """
    exact, allowed = exact_and_budget(case, causal=True)
    leaves = [tensor.clone().requires_grad_() for tensor in case]
    out = cast("Tensor", tilewise.attention(*leaves, causal=True, layout="bhsd", backend=backend))
    gradients = torch.autograd.grad(out.sum(), leaves)
    wide = [tensor.double().requires_grad_() for tensor in case]
    wanted = torch.autograd.grad(standard_attention(*wide, causal=True).out.sum(), wide)
    shares = [largest_error(got, want) / want.abs().max().item() for got, want in zip(gradients, wanted, strict=True)]
    return SelfTest(largest_error(out.detach(), exact), allowed, max(shares), GRADIENT_LIMIT[case.q.dtype])
