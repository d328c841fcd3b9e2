"""Attention weights, for those who want to look at them: the one place where they exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.errors import bad_value
from tilewise.ops.dense import attention

LARGEST_WEIGHTS = 1 << 28
"""Entries of [B, H, N, M] up to which `need_weights` is served: 1 GiB in float32."""

LARGEST_VALUES = 1 << 26
"""Entries that the values which read the weights out may have, repeated for every head."""


def check_weights(batch: int, heads: int, n: int, m: int) -> None:
    """Raises ValueError where [B, H, N, M] is more than anyone can look at."""
    entries = batch * heads * n * m
    if not torch.compiler.is_compiling() and entries > LARGEST_WEIGHTS:
        got = f"True for {batch} × {n} queries and {m} keys, {entries:,} weights"
        raise bad_value("need_weights", got, f"at most {LARGEST_WEIGHTS:,}", "ask for fewer queries at a time")


def weights_of(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """[B, H, N, M]: attention whose values are the columns of the identity, so many at a time that they stay small."""
    m = k.shape[2]
    width = max(64, LARGEST_VALUES // max(1, q.shape[0] * q.shape[1] * m))
    keys = torch.arange(m, device=k.device)
    parts = []
    for start in range(0, m, width):
        columns = (keys[:, None] == keys[start : start + width]).to(k.dtype)
        parts.append(attention(q, k, columns.expand(*k.shape[:2], -1, -1), **options))
    return torch.cat(parts, dim=-1) if parts else q.new_zeros(*q.shape[:3], 0)
