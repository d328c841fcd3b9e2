"""The triton backend called like the oracle, on whatever device runs kernels here."""

from __future__ import annotations

import torch
from torch import Tensor

from budget import Attention, Case, budgets, evaluate, worst
from cases import ours

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)


def triton(layout: str = "bhsd") -> Attention:
    """tilewise.attention on the triton backend with the oracle's signature, for tensors on the CPU."""
    return ours("triton", layout, DEVICE)


def assert_within_on_device(case: Case, dtype: torch.dtype, dout: Tensor, dlse: Tensor | None, label: str = "") -> None:
    """budget.assert_within, with `err_std` measured on this device too, where its matrix products round otherwise.

    A GPU sums a row of products in one chain, a CPU in many short ones: standard attention errs more on the former.
    """
    rounded = Case(
        {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.tensors.items()}, case.options, case.keep
    )
    dout = dout.to(dtype)
    exact, allowed = budgets(rounded, dtype, dout, dlse)
    here = evaluate(ours("standard", device=DEVICE), rounded, None, dout, dlse)
    actual = evaluate(triton(), rounded, None, dout, dlse)
    allowed["out"] = max(allowed["out"], 2 * worst(here.out, exact.out))
    allowed["lse"] = max(allowed["lse"], 2 * worst(here.lse, exact.lse))
    for name, grad in here.grads.items():
        allowed[name] = max(allowed[name], 3 * worst(grad, exact.grads[name]))
    measured = {"out": worst(actual.out, exact.out), "lse": worst(actual.lse, exact.lse)}
    measured |= {name: worst(actual.grads[name], exact.grads[name]) for name in exact.grads}
    over = {name: (error, allowed[name]) for name, error in measured.items() if not error <= allowed[name]}
    assert not over, f"{label}: error over budget {over}"
