"""`merge`: the one operation that tiles, splits, pages, ring steps and sinks share."""

from __future__ import annotations

from torch import Tensor

from tilewise.errors import bad_value
from tilewise.ops import checks
from tilewise.reference import softmax


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys into attention over both: (o₁, lse₁) ⊕ (o₂, lse₂).

    `lse = ln(e^lse₁ + e^lse₂)`, `o = o₁·e^(lse₁−lse) + o₂·e^(lse₂−lse)`. Associative and commutative; (0, −∞), a row
    that saw nothing, is the neutral element. Differentiable.

    Args:
        o1, o2: [..., Dv] outputs.
        lse1, lse2: [...] natural logs of the softmax denominators, of o1's shape without its last dim.

    Returns:
        o in o1's dtype and lse in lse1's.

    Raises:
        ValueError, TypeError: shapes or devices that disagree, tensors that are not floating point.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018), equation 4.
    """
    for name, tensor in (("o1", o1), ("lse1", lse1), ("o2", o2), ("lse2", lse2)):
        checks.is_float(name, tensor)
        if tensor.device != o1.device:
            raise bad_value(name, f"device {tensor.device}", f"o1's device {o1.device}")
    if o1.dim() == 0:
        raise bad_value("o1", "a single number", "shape [..., Dv]")
    if o2.shape != o1.shape:
        raise bad_value("o2", f"shape {list(o2.shape)}", f"o1's shape {list(o1.shape)}")
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if lse.shape != o1.shape[:-1]:
            raise bad_value(name, f"shape {list(lse.shape)}", f"o1's shape without its last dim, {list(o1.shape[:-1])}")
    return softmax.merge(o1, lse1, o2, lse2)
