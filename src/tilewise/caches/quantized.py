"""Keys and values in int8, with one float32 scale a token and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilewise.caches.contents import KV, Pools


@dataclass(frozen=True, slots=True)
class Int8(KV):
    """Each key and value row is stored as int8·scale with scale = max|row| / 127: half of bfloat16 and 4 bytes.

    Rows are quantised once, when they are appended, and are turned back inside the kernel that reads them. The error of
    an element is at most scale/2.
    """

    def pools(self, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> Pools:
        shape = (pages, self.kv_heads, page_size)
        k = torch.empty(*shape, self.head_dim, dtype=torch.int8, device=device)
        v = torch.empty(*shape, self.v_dim, dtype=torch.int8, device=device)
        return Pools(k, v, torch.empty(shape, device=device), torch.empty(shape, device=device))
