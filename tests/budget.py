"""How large an error may be: SPEC section 8, computed once for everybody.

The budget of a case follows from its own inputs: from the error that standard attention makes in the same dtype, and,
for gradients, from κ, the size of the terms that cancel in `P∘(dP − Δ + dLSE)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import oracle

DIFFERENTIABLE = ("q", "k", "v", "bias", "relative", "sink")
Attention = Callable[..., tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """Inputs of one attention call: tensors by name and the plain options, as oracle.attention takes them."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    keep: Tensor | None = None


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]


def evaluate(attention: Attention, case: Case, dtype: torch.dtype | None, dout: Tensor, dlse: Tensor | None) -> Result:
    """Run `attention` on the case's tensors (floating ones cast to `dtype` if given), forward and backward."""
    leaves: dict[str, Tensor] = {}
    for name, tensor in case.tensors.items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        leaf = tensor.detach()
        leaves[name] = leaf.requires_grad_() if name in DIFFERENTIABLE else leaf
    out, lse = attention(**leaves, **case.options)
    outputs, cotangents = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs.append(lse)
        cotangents.append(dlse.to(lse.dtype))
    wanted = [name for name in leaves if name in DIFFERENTIABLE]
    grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], cotangents, allow_unused=True)
    filled = {
        name: torch.zeros_like(leaves[name]) if grad is None else grad for name, grad in zip(wanted, grads, strict=True)
    }
    return Result(out.detach(), lse.detach(), filled)


def worst(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error; infinite where one is NaN, or where infinities do not match."""
    actual, exact = actual.double(), exact.double()
    error = (actual - exact).abs().masked_fill(actual == exact, 0.0).nan_to_num(nan=float("inf"))
    return error.max().item() if error.numel() else 0.0


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _condition(case: Case, exact: Result, dout: Tensor, dlse: Tensor | None) -> dict[str, float]:
    """κ of each gradient, in float64."""
    t = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors.items()}
    q, k, v = t["q"], t["k"], t["v"]
    group = q.shape[1] // k.shape[1]
    k_full, v_full = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = case.options.get("scale")
    scale = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    identity = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    options = {name: x for name, x in case.options.items() if name not in ("keep", "dropout", "scale")}
    extra = {name: x for name, x in t.items() if name not in ("q", "k", "v")}
    p, _ = oracle.attention(q, k, identity, **extra, **options, scale=case.options.get("scale"))
    drop = 1.0 / (1.0 - case.options.get("dropout", 0.0))
    dout = dout.double().abs()
    inner = dout @ v_full.abs().transpose(-1, -2) * drop + (dout * exact.out.abs()).sum(-1, keepdim=True)
    if dlse is not None:
        inner = inner + dlse.double().abs()[..., None]
    e = p * inner
    per_group = (k.shape[0], k.shape[1], group, *e.shape[2:])

    def over_group(x: Tensor) -> Tensor:
        return x.reshape(*per_group[:3], *x.shape[2:]).sum(2)

    kappa = {
        "q": scale * _largest(e @ k_full.abs()),
        "k": scale * _largest(over_group(e.transpose(-1, -2) @ q.abs())),
        "v": _largest(over_group(p.transpose(-1, -2) @ dout)) * drop,
    }
    if "bias" in t:
        kappa["bias"] = _largest(e.sum_to_size(t["bias"].shape))
    if "relative" in t:
        kappa["relative"] = _largest(e.sum((0, 2, 3)))
    if "sink" in t:
        sink_row = (dout * exact.out.abs()).sum(-1) + (dlse.double().abs() if dlse is not None else 0.0)
        kappa["sink"] = _largest(sink_row.sum((0, 2)))
    return kappa


def _logit_size(case: Case) -> float:
    """max scale·|q||k|ᵀ: what is summed into a logit; ε times it is how far two orders of summation may differ."""
    q, k = case.tensors["q"].double().abs(), case.tensors["k"].double().abs()
    scale = case.options.get("scale")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return _largest(q @ k.transpose(-1, -2)) * abs(q.shape[-1] ** -0.5 if scale is None else scale)


def budgets(
    case: Case, dtype: torch.dtype, dout: Tensor, dlse: Tensor | None = None, *, huge_logits: bool = False
) -> tuple[Result, dict[str, float]]:
    """The exact float64 result and the largest allowed error of "out", "lse" and each gradient in `dtype`.

    `huge_logits` adds what recomputation costs when a softmax is nearly one-hot: P = e^{S − LSE} with an S that another
    tile shape summed in another order is off by ε·scale·|q||k|ᵀ relatively, where standard attention, which stored P,
    has an exact 1. For logits of ordinary size that is within 4·ε·κ.
    """
    with_keep = Case(case.tensors, {**case.options, **({"keep": case.keep} if case.keep is not None else {})})
    exact = evaluate(oracle.attention, with_keep, torch.float64, dout, dlse)
    # Against a float64 oracle float64 attention seems exact: its error is that of float32, scaled by the precisions.
    is_double = dtype == torch.float64
    standard = evaluate(oracle.attention, with_keep, torch.float32 if is_double else dtype, dout, dlse)
    eps = torch.finfo(dtype).eps
    eps_acc = torch.finfo(torch.float64 if is_double else torch.float32).eps
    unit = eps / torch.finfo(torch.float32).eps if is_double else 1.0
    allowed = {
        "out": 2 * unit * worst(standard.out, exact.out) + eps * _largest(exact.out),
        "lse": 2 * unit * worst(standard.lse, exact.lse) + 2 * eps_acc * max(1.0, _largest(exact.lse)),
    }
    recomputed = _logit_size(case) if huge_logits else 0.0
    for name, kappa in _condition(with_keep, exact, dout, dlse).items():
        low = eps * kappa if dtype in (torch.float16, torch.bfloat16) else 0.0
        allowed[name] = (
            3 * unit * worst(standard.grads[name], exact.grads[name]) + (4 + recomputed) * eps_acc * kappa + low
        )
    return exact, allowed


def assert_within(
    attention: Attention,
    case: Case,
    dtype: torch.dtype,
    dout: Tensor,
    dlse: Tensor | None = None,
    label: str = "",
    *,
    huge_logits: bool = False,
) -> None:
    """Check out, lse and every gradient of `attention` in `dtype` against the oracle.

    Inputs are first rounded to dtype, so that the budget holds the arithmetic's error only.
    """
    rounded = Case(
        {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.tensors.items()}, case.options, case.keep
    )
    dout = dout.to(dtype)
    exact, allowed = budgets(rounded, dtype, dout, dlse, huge_logits=huge_logits)
    actual = evaluate(attention, rounded, None, dout, dlse)
    measured = {"out": worst(actual.out, exact.out), "lse": worst(actual.lse, exact.lse)}
    measured |= {name: worst(actual.grads[name], exact.grads[name]) for name in exact.grads}
    over = {name: (error, allowed[name]) for name, error in measured.items() if not error <= allowed[name]}
    assert not over, f"{label}: error over budget {over}"
