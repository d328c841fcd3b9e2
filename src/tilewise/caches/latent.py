"""MLA's cache: one latent and one rotary key a token, shared by all heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.caches.contents import KV, Pools, check_tokens
from tilewise.errors import bad_type, bad_value
from tilewise.ops import checks


@dataclass(frozen=True, slots=True, init=False)
class Latent(KV):
    """`c_kv ‖ k_pe` of a token, r_kv + d_rope numbers in one row (DeepSeek-V2, section 2.1).

    Absorbed decoding is MQA over it with D = r_kv + d_rope, whose values are the first r_kv columns of its keys:
    `view()` has `v=None` and `v_dim=r_kv`, and a kernel reads each row once. Append k [B, 1, T, r_kv + d_rope] alone.
    """

    def __init__(self, kv_rank: int, rope_dim: int) -> None:
        checks.whole(kv_rank=kv_rank)
        if isinstance(rope_dim, bool) or not isinstance(rope_dim, int):
            raise bad_type("rope_dim", rope_dim, "an int")
        if rope_dim < 0:
            raise bad_value("rope_dim", rope_dim, "at least 0")
        KV.__init__(self, 1, kv_rank + rope_dim, kv_rank)

    def pools(self, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> Pools:
        return Pools(torch.empty(pages, 1, page_size, self.head_dim, dtype=dtype, device=device), None, None, None)

    def check(self, k: object, v: object, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        check_tokens("k", k, (batch, 1, self.head_dim), dtype, device)
        if v is not None:
            got = f"shape {list(v.shape)}" if isinstance(v, Tensor) else repr(v)
            fix = "append(torch.cat([c_kv, k_pe], dim=-1))"
            raise bad_value("v", got, "None: the values are the first columns of k", fix)
