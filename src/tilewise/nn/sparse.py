"""Sparse attention as modules: any mask value, Longformer, BigBird. What a mask forbids is never computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.masks import BigBird, Dense, Global, Longformer, Mask, Prefix, Window
from tilewise.nn.attention import GroupedQueryAttention, Settings
from tilewise.nn.few_queries import attend_tokens
from tilewise.ops import checks
from tilewise.ops.dense import attention


class SparseAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` under a mask value that is part of the module.

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        mask: a mask value of `tilewise.masks`: any size of input, any combination.
        kv_heads: Hkv; H by default.
        settings: as of `GroupedQueryAttention`.

    A mask given to `forward` applies on top. There is no cache: a mask value says what a whole sequence sees; decoding
    with a window is a multi-head module's, with `window=`.
    """

    def __init__(
        self, dim: int, heads: int, mask: Mask, *, kv_heads: int | None = None, **settings: Unpack[Settings]
    ) -> None:
        super().__init__(dim, heads, heads if kv_heads is None else kv_heads, **settings)
        if not isinstance(mask, Mask):
            fix = "tilewise.masks.Dense(tensor)" if isinstance(mask, Tensor) else None
            raise bad_type("mask", mask, "a mask value of tilewise.masks", fix)
        self.mask = mask

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        cache: Any = None,
        positions: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As `GroupedQueryAttention.forward`, under the module's mask and `mask`; a cache raises UnsupportedError."""
        if cache is not None:
            raise UnsupportedError(
                f"cache: {type(self).__name__} computes whole sequences. Fix: leave out the cache, or decode with "
                "GroupedQueryAttention(window=...)"
            )
        own = self._fitting(q if k is None else k)
        return super().forward(q, k, v, mask=_both(own, mask), positions=positions, **options)

    def _fitting(self, k: Tensor) -> Mask:
        """The module's mask for keys k [B, M, ·]."""
        del k
        return self.mask

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.mask}"


class BigBirdAttention(SparseAttention):
    """BigBird (Zaheer et al., 2020): blocks of a window, some global ones, and random ones for each head.

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        block: tokens a block.
        window_blocks: blocks a token's window spans, half on each side of it.
        global_blocks: blocks at the start that see and are seen by all.
        random_blocks: random key blocks for each block of queries and each head.
        seed: of the random blocks, which are a pure function of it.
        kv_heads, settings: as of `SparseAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        block: int = 64,
        window_blocks: int = 3,
        global_blocks: int = 1,
        random_blocks: int = 3,
        seed: int = 0,
        kv_heads: int | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        mask = BigBird(block, window_blocks, global_blocks, random_blocks, seed)
        super().__init__(dim, heads, mask, kv_heads=kv_heads, **settings)
        self._global_tokens = block * global_blocks

    def _fitting(self, k: Tensor) -> Mask:
        """Where there are no more keys than global tokens, all see all."""
        short = isinstance(k, Tensor) and k.dim() == 3 and k.shape[1] < self._global_tokens
        return Window(None, None) if short else self.mask


class LongformerAttention(SparseAttention):
    """Longformer (Beltagy et al., 2020): a window, and global tokens with projections of their own.

    A token sees the `window` tokens around it and the global ones, through `q_proj`, `k_proj`, `v_proj`. A global token
    sees all, through `global_q_proj`, `global_k_proj`, `global_v_proj`. Self-attention, bidirectional.

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        window: tokens of the window, half on each side; even.
        global_tokens: their places.
        settings: as of `SparseAttention`, without `causal`, `alibi`, `relative` and `kv_heads`.

    Raises ValueError or TypeError for an odd window, a place below 0 or one of those settings.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int,
        global_tokens: Iterable[int] = (),
        **settings: Any,
    ) -> None:
        checks.whole(window=window)
        if window % 2:
            raise bad_value("window", window, "an even number: half on each side")
        if settings.get("causal"):
            raise bad_value("causal", True, "False: global tokens see all", "SparseAttention(mask=...)")
        for name in ("alibi", "relative", "kv_heads"):
            if settings.get(name):
                want = "none: rotary tells positions here, and every head has keys of its own"
                raise bad_value(name, settings[name], want, "SparseAttention(mask=masks.Longformer(...))")
        given = tuple(global_tokens)
        places = Global(given).tokens if given else ()
        half = window // 2
        local: Mask = Window(half, half)
        # The first tokens are global in most uses: their rows are computed apart, so that the local pass can leave them
        # to their window, and they are a slice, for which nothing is copied from the host.
        leading = places == tuple(range(len(places)))
        if places:
            local = local | Prefix(len(places)) if leading else Longformer(window, places)
        super().__init__(dim, heads, local, **settings)
        self.global_tokens, self._leading = places, leading
        make: dict[str, Any] = {"device": self.q_proj.weight.device, "dtype": self.q_proj.weight.dtype}
        bias = self.q_proj.bias is not None
        self.global_q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias, **make)
        self.global_k_proj = nn.Linear(self.k_dim, heads * self.head_dim, bias=bias, **make)
        self.global_v_proj = nn.Linear(self.v_dim, heads * self.v_head_dim, bias=bias, **make)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        cache: Any = None,
        positions: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend, q [B, N, dim] to itself; [B, N, dim].

        Args:
            mask: key padding, boolean [B, 1, 1, N], True = attend.
            positions: as in `GroupedQueryAttention.forward`.

        Raises ValueError for k, v or places beyond N, UnsupportedError for another mask or a cache.
        """
        for name in options:
            raise TypeError(f"{type(self).__name__}.forward() has no argument {name!r}; SparseAttention may have it")
        if k is not None or v is not None:
            name = "v" if k is None else "k"
            raise bad_value(name, "a tensor", "None: Longformer is self-attention", "SparseAttention takes k and v")
        if isinstance(mask, Tensor):
            checks.boolean_mask(mask)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1:3] != (1, 1)):
            raise UnsupportedError(
                "mask: global tokens see all, so only key padding [B, 1, 1, N]. Fix: SparseAttention"
            )
        if cache is not None or not self.global_tokens:
            return super().forward(q, mask=mask, cache=cache, positions=positions)
        if self.global_tokens[-1] >= q.shape[1]:
            raise bad_value("global_tokens", self.global_tokens, f"places below N = {q.shape[1]}")
        self._check(q, q, q, False, None, positions, None, False)
        dropout = self.dropout if self.training else 0.0
        count = len(self.global_tokens)
        places = slice(0, count) if self._leading else torch.tensor(self.global_tokens, device=q.device)
        given: dict[str, Any] = {
            "softcap": self.softcap,
            "scale": self.scale,
            "dropout": dropout,
            "backend": self.backend,
        }
        local = attention(
            *self._projected(q, "", None, positions), mask=_both(self.mask, mask), sink=self.sinks, **given
        )
        if self._few_queries(q, dropout):
            chosen = self._attend_unprojected(q, places, mask)
        else:
            heads = self._projected(q, "global_", places, positions)
            chosen = attention(*heads, mask=mask, sink=self.sinks, **given)
        if isinstance(places, slice):  # by rows [B, N, H, Dv], as the output projection takes them
            rows = torch.cat((chosen.transpose(1, 2), local[:, :, count:].transpose(1, 2)), 1)
            return self._output(rows.transpose(1, 2))
        return self._output(local.index_copy(2, places, chosen))

    def _few_queries(self, x: Tensor, dropout: float) -> bool:
        """Whether fewer products are needed without projecting all tokens to the global queries' keys and values.

        Only where nothing stands between the projections and the scores, and nobody has put a layer of another kind in
        their place.
        """
        layers = self.global_k_proj, self.global_v_proj
        return (
            self.heads * len(self.global_tokens) < self.dim
            and self.backend == "auto"
            and dropout == 0.0
            and x.dtype == layers[0].weight.dtype
            and not (x.is_meta or torch.is_autocast_enabled(x.device.type))
            and all(part is None for part in (self.rotary, self.k_norm, self.softcap, self.sinks))
            and all(map(_is_plain, layers))
        )

    def _attend_unprojected(self, x: Tensor, rows: Tensor | slice, mask: Tensor | None) -> Tensor:
        """The global tokens' outputs [B, H, G, Dv] from x [B, N, dim], where W x + b would be projected:

        q·(W_k x + b_k) = (W_kᵀ q)·x + q·b_k and Σ p (W_v x + b_v) = W_v Σ p x + b_v, if the row sees any key.
        """
        q = self._heads(self.global_q_proj(x[:, rows]), self.heads, self.head_dim, self.q_norm)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        k_bias, v_bias = self.global_k_proj.bias, self.global_v_proj.bias
        queries = q @ self.global_k_proj.weight.view(self.heads, self.head_dim, self.dim)
        bias = None if k_bias is None else (scale * (q @ k_bias.view(self.heads, self.head_dim, 1))).flatten(1, 2)
        keys = None if mask is None else mask[:, 0].to(x.device, non_blocking=True)
        out = attend_tokens(queries.flatten(1, 2), x, keys, bias, scale).unflatten(1, q.shape[1:3])
        out = out @ self.global_v_proj.weight.view(self.heads, self.v_head_dim, self.dim).mT
        if v_bias is None:
            return out
        v_bias = v_bias.view(self.heads, 1, self.v_head_dim)
        return out + (v_bias if keys is None else v_bias * keys[:, None].any(-1, keepdim=True))

    def _projected(
        self, x: Tensor, kind: str, rows: Tensor | slice | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads through the projections of one kind; queries of some rows only."""
        q_proj, k_proj, v_proj = (getattr(self, f"{kind}{name}_proj") for name in "qkv")
        q = self._heads(
            q_proj(x if rows is None or self.rotary is not None else x[:, rows]), self.heads, self.head_dim, self.q_norm
        )
        k = self._heads(k_proj(x), self.heads, self.head_dim, self.k_norm)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
            q = q if rows is None else q[:, :, rows]
        return q, k, self._heads(v_proj(x), self.heads, self.v_head_dim, None)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes W x + b from its weight and bias and nothing else: no hook, no other forward."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer) is nn.Linear and not hooks and "forward" not in layer.__dict__


def _both(own: Mask, given: Mask | Tensor | None) -> Mask:
    if given is None:
        return own
    if isinstance(given, Tensor):
        checks.boolean_mask(given)
        given = Dense(given)
    if not isinstance(given, Mask):
        raise bad_type("mask", given, "a boolean tensor, True = attend, or a mask value")
    return own & given
