"""The contract of decoding backends: a few queries at the end of each sequence against the keys that a cache holds."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tilewise.reference.softmax import accumulator_dtype
from tilewise.spec import DecodeSpec


class DecodeOperands(NamedTuple):
    """The tensors of one decoding call. Where the keys lie is told as in `ops.views.KVView`."""

    q: Tensor
    """[B, H, T, D], or packed: [1, H, tokens, D] with `cu_seqlens_q`."""
    k: Tensor
    v: Tensor | None
    lengths: Tensor
    page_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    start: Tensor | None = None
    sink: Tensor | None = None
    """[H]."""
    alibi: Tensor | None = None
    """[1|B, H] float32."""
    tree: Tensor | None = None
    """[1|B, T, T] bool: which of the last T tokens each query may see; those before them it may."""
    cu_seqlens_q: Tensor | None = None
    """[B + 1] int32."""


class DecodeBackend(Protocol):
    """One implementation of decoding; see `base.Backend`."""

    name: str

    def why_not(self, spec: DecodeSpec) -> str | None: ...

    def configure(self, spec: DecodeSpec) -> Any: ...

    def forward(self, operands: DecodeOperands, spec: DecodeSpec, config: Any) -> tuple[Tensor, Tensor]:
        """out [B, H, T, Dv] in q's dtype, contiguous as `empty_decoded` makes it, and lse [B, H, T] in float32."""
        ...


def empty_decoded(q: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse for q [B, H, T, D]. Memory order is [B, T, H, Dv]: what an output projection reads."""
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v_dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=accumulator_dtype(q.dtype))


def token_of_slot(slots: Tensor, lengths: Tensor, capacity: int, ring: bool) -> Tensor:
    """Which token lies in each slot [M] of each sequence, [B, M]; a ring's slot that holds none has one below 0."""
    if not ring:
        return slots.expand(lengths.shape[0], -1)
    last = lengths.long()[:, None] - 1
    return last - torch.remainder(last - slots, capacity)
