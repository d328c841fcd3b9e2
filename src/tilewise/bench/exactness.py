"""How exact a result is and how exact it has to be: the float64 output of a problem, and the error allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewise.bench.inputs import Inputs
from tilewise.reference.standard import causal_allowed, default_scale, standard_attention

_MATRICES = 4
"""float64 matrices of scores, at most, that the reference holds at once."""


def exact_and_budget(inputs: Inputs, causal: bool) -> tuple[Tensor, float]:
    """The float64 output [B, H, N, D], and the largest absolute error allowed in the inputs' dtype.

    The budget is twice the error that standard attention makes in that dtype when PyTorch computes it, plus one unit in
    the last place of the largest output. Works head by head, so it holds one head's scores at a time.
    """
    exact_heads: list[Tensor] = []
    plain_error = 0.0
    for head in range(inputs.q.shape[1]):
        q, k, v = (t[:, head : head + 1] for t in inputs)
        exact = standard_attention(q.double(), k.double(), v.double(), causal=causal).out
        plain_error = max(plain_error, largest_error(_plain(q, k, v, causal), exact))
        exact_heads.append(exact)
    exact = torch.cat(exact_heads, dim=1)
    return exact, 2 * plain_error + unit_in_last_place(exact.abs().max().item(), inputs.q.dtype)


def reference_bytes(length: int) -> float:
    """What `exact_and_budget` holds at its peak, all but the tensors of size N: matrices of one head's scores."""
    return _MATRICES * 8.0 * length * length


def largest_error(out: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from `exact`; infinite if anything is NaN."""
    return (out.double() - exact).abs().nan_to_num(nan=math.inf).max().item()


def unit_in_last_place(value: float, dtype: torch.dtype) -> float:
    """The distance from `value` > 0 to the next number of `dtype`: `ε·2^⌊log₂ value⌋`."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)) if value > 0 else 0.0


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Standard attention in the inputs' dtype with nothing but PyTorch's own operators."""
    s = q @ k.mT * default_scale(q.shape[-1])
    if causal:
        s = s.masked_fill(~causal_allowed(s.shape[-2], s.shape[-1], s.device), -math.inf)
    return torch.softmax(s, dim=-1) @ v
