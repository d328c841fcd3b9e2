"""The dense cache: every sequence owns its capacity from the start."""

from __future__ import annotations

import torch

from tilewise.caches.base import SlotCache
from tilewise.caches.contents import KV


class DenseCache(SlotCache):
    """`batch` sequences of up to `capacity` tokens each, preallocated.

    Args:
        contents: what one token is: `KV(kv_heads, head_dim)`, `Latent(kv_rank, rope_dim)`, `Int8(kv_heads, head_dim)`.
        batch: B, sequences.
        capacity: tokens of each.
        dtype: of the tensors that are appended (and of what is stored, except in `Int8`).
        device: where everything lies.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        contents: KV,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(contents, batch, capacity, (batch, capacity), dtype, device)

    def _reorder(self, rows: list[int]) -> None:
        order = torch.tensor(rows, device=self.device)
        held = int(self._held.max())
        for pool in self.pools.tensors().values():
            pool[:, :, :held] = pool[order, :, :held]

    def _fork(self, source: int, destinations: list[int], tokens: int) -> None:
        for pool in self.pools.tensors().values():
            pool[destinations, :, :tokens] = pool[source, :, :tokens].clone()
