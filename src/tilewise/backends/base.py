"""The contract that every backend fulfils, and the table in which they stand.

A backend is a module-level object with a name, a `why_not(spec)` sentence and the two halves of the op. It gets
tensors, the spec and its own config; it never sees modules, masks as objects or environment variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from tilewise.reference.softmax import accumulator_dtype
from tilewise.spec import AttentionSpec

BACKEND_NAMES = ("hopper", "triton", "tiled", "sdpa", "standard")
"""Every name a user may ask for, known from the first day."""


class Operands(NamedTuple):
    """The tensors of one attention call, in the layout that backends see.

    Dense: q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, Dv], any strides with a contiguous last dim. bias has any
    strides; the others are contiguous.
    Packed: the same with B = 1 and N, M the token totals; `cu_seqlens_*` [batch + 1] int32 delimit the sequences.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    """[1|B, 1|H, 1|N, 1|M], floating point, added to the scaled (and soft-capped) scores."""
    relative: Tensor | None = None
    """[H, 2R+1]: `relative[h, clip(p − j, −R, R) + R]` is added to the score of row position p and key j."""
    alibi: Tensor | None = None
    """[1|B, H] float32 slopes: `−slope·|p − j|` is added."""
    sink: Tensor | None = None
    """[H]: one more logit per head whose value row is zero."""
    q_offset: Tensor | None = None
    """[B] int32: the position of query row 0 of each sequence."""
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seed: Tensor | None = None
    """[1] int64: the key of the dropout generator (see philox.py)."""
    mask_tensors: tuple[Tensor, ...] = ()
    """The tensors that the placeholders $0, $1, … of `spec.mask` stand for."""


class Gradients(NamedTuple):
    """Gradients of the differentiable operands, None where not asked for. Shapes and dtypes as the operands'."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    relative: Tensor | None = None
    sink: Tensor | None = None


class Needs(NamedTuple):
    """Which of the operands want a gradient, in the order of `Gradients`."""

    q: bool = True
    k: bool = True
    v: bool = True
    bias: bool = False
    relative: bool = False
    sink: bool = False


class Backend(Protocol):
    """One implementation of one op. `config` is whatever `configure` returned for this spec (tile shapes, say)."""

    name: str

    def why_not(self, spec: AttentionSpec) -> str | None:
        """One true sentence on why this backend cannot serve `spec` here, or None if it can."""
        ...

    def configure(self, spec: AttentionSpec) -> Any: ...

    def forward(self, operands: Operands, spec: AttentionSpec, config: Any) -> tuple[Tensor, Tensor]:
        """out [B, H, N, Dv] in q's dtype, and lse [B, H, N] in float32 (float64 for float64 inputs)."""
        ...

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        config: Any,
        needs: Needs,
    ) -> Gradients: ...


def ordered_strides(x: Tensor, last: int) -> tuple[int, ...]:
    """Strides of gap-free memory for x's first three dims and `last` columns, in the order of x's own strides.

    So an output or gradient of a [B, S, H, D] caller's transposed view is contiguous again for that caller. Expanded
    dims (stride 0) come outermost, as in a contiguous tensor.
    """
    try:
        return _strides_in_order(x.shape[:3], x.stride()[:3], last)
    except TypeError:  # the symbols of a traced shape cannot be looked up
        return _strides_in_order.__wrapped__(x.shape[:3], x.stride()[:3], last)


@lru_cache(maxsize=4096)
def _strides_in_order(sizes: Sequence[int], strides: Sequence[int], last: int) -> tuple[int, ...]:
    found, step = [0, 0, 0, 1], last
    for dim in sorted(range(3), key=lambda d: (strides[d] or math.inf, -d)):
        found[dim] = step
        step *= max(1, sizes[dim])
    return tuple(found)


def empty_ordered(x: Tensor, last: int) -> Tensor:
    """Uninitialised [..., last] in x's dtype with `ordered_strides`."""
    return x.new_empty_strided((*x.shape[:3], last), ordered_strides(x, last))


def empty_output(operands: Operands) -> tuple[Tensor, Tensor]:
    """Uninitialised out in q's memory order, and a contiguous lse."""
    q = operands.q
    lse = q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
    return empty_ordered(q, operands.v.shape[-1]), lse
