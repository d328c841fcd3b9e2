"""What a cache holds for one token: keys and values of each head. Latents and int8 have files of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.errors import bad_type, bad_value
from tilewise.ops import checks


class Pools(NamedTuple):
    """The memory of a cache, [pages, Hkv, page_size, ·] each, as `KVView` describes it."""

    k: Tensor
    v: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in self._asdict().items() if x is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Pools:
        rest = (None if x is None else function(x) for x in self[1:])
        return Pools(function(self.k), *rest)


@dataclass(frozen=True, slots=True)
class KV:
    """Keys [Hkv, D] and values [Hkv, Dv] of a token, as they are: MHA with Hkv = H, GQA, MQA with Hkv = 1."""

    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    """Dv; None is D."""

    def __post_init__(self) -> None:
        checks.whole(kv_heads=self.kv_heads, head_dim=self.head_dim, v_head_dim=self.v_dim)

    @property
    def v_dim(self) -> int:
        """Dv."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def pools(self, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> Pools:
        """Memory for `pages` pages of `page_size` tokens. Not initialised: nothing beyond a length is ever read."""
        shape = (pages, self.kv_heads, page_size)
        k = torch.empty(*shape, self.head_dim, dtype=dtype, device=device)
        return Pools(k, torch.empty(*shape, self.v_dim, dtype=dtype, device=device), None, None)

    def check(self, k: object, v: object, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError or TypeError where k [B, Hkv, T, D] and v [B, Hkv, T, Dv] do not fit the cache."""
        check_tokens("k", k, (batch, self.kv_heads, self.head_dim), dtype, device)
        check_tokens("v", v, (batch, self.kv_heads, self.v_dim), dtype, device)
        assert isinstance(k, Tensor)
        assert isinstance(v, Tensor)
        if v.shape[2] != k.shape[2]:
            raise bad_value("v", f"{v.shape[2]} tokens", f"k's {k.shape[2]} tokens")


def check_tokens(name: str, x: object, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """x [B, heads, T, dim] with the cache's B, heads and dim, dtype and device."""
    if not isinstance(x, Tensor):
        raise bad_type(name, x, "a torch.Tensor")
    batch, heads, dim = sizes
    if x.dim() != 4:
        raise bad_value(name, f"shape {list(x.shape)}", f"[B, heads, T, dim] = [{batch}, {heads}, T, {dim}]")
    if x.dtype != dtype:
        raise bad_type(name, f"dtype {x.dtype}", f"the cache's dtype {dtype}", f"{name} = {name}.to(cache.dtype)")
    if x.device != device:
        raise bad_value(name, f"device {x.device}", f"the cache's device {device}", f"cache.to({name}.device)")
    if x.shape[0] != batch:
        raise bad_value(name, f"batch {x.shape[0]}", f"the cache's batch {batch}")
    if x.shape[1] != heads:
        fix = f"{name}.transpose(1, 2)" if x.shape[2] == heads else None
        raise bad_value(name, f"{x.shape[1]} heads", f"the cache's {heads} heads", fix)
    if x.shape[3] != dim:
        raise bad_value(name, f"head dim {x.shape[3]}", f"the cache's {dim}")
    if x.requires_grad and torch.is_grad_enabled():
        fix = "decode under torch.no_grad() or torch.inference_mode()"
        raise bad_value(name, "a tensor that requires grad", "one that does not: a cache keeps values, no graph", fix)
