"""Multi-head attention as a module: MHA, GQA and MQA are one implementation that differs in the number of K/V heads.

Sources: Vaswani et al., Attention is all you need (2017); Shazeer, Fast transformer decoding (2019) for MQA; Ainslie et
al., GQA (2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise.caches import Cache
from tilewise.errors import bad_type, bad_value
from tilewise.masks import Mask
from tilewise.nn.decoding import append, attend, check_cache, normalized, over_batch
from tilewise.nn.rotary import RotaryEmbedding
from tilewise.nn.sizes import tokens
from tilewise.nn.weights import check_weights, weights_of
from tilewise.ops import checks
from tilewise.ops.biases import Relative
from tilewise.ops.dense import attention
from tilewise.ops.dispatch import check_name
from tilewise.spec import Window


def alibi_slopes(heads: int) -> Tensor:
    """[H] float32, the slopes of Press et al., Train short, test long (2022): 2^(−8i/H) for i = 1 … H where H is a
    power of two; otherwise those of the power below, then every other one of the power above."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


class Settings(TypedDict, total=False):
    """What the multi-head modules take beside their sizes; `GroupedQueryAttention` documents each."""

    head_dim: int | None
    v_head_dim: int | None
    k_dim: int | None
    v_dim: int | None
    bias: bool
    out_bias: bool | None
    qk_norm: float | None
    rotary: RotaryEmbedding | None
    alibi: bool
    relative: int | None
    softcap: float | None
    sinks: bool
    causal: bool
    window: Window | None
    scale: float | None
    dropout: float
    residual_dropout: float
    backend: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class GroupedQueryAttention(nn.Module):
    """Attention with H query heads that share `kv_heads` key/value heads: H of them is MHA, one is MQA.

    Args:
        dim: width of the input and output, [B, N, dim].
        heads: H, query heads.
        kv_heads: Hkv, a divisor of H.
        head_dim: D of queries and keys; dim / H by default.
        v_head_dim: Dv; D by default.
        k_dim, v_dim: widths of the separate key and value inputs; dim by default.
        bias: of q_proj, k_proj and v_proj.
        out_bias: of o_proj; as `bias` by default.
        qk_norm: ε of an RMSNorm over each head of the queries and keys, with weights [D] shared by the heads; None
            for none (Dehghani et al., ViT-22B, 2023; Qwen3).
        rotary: `RotaryEmbedding` for queries and keys.
        alibi: slopes of Press et al. (2022).
        relative: R, for a learned bias by distance [H, 2R + 1] (T5, Shaw et al.). Not with a cache.
        softcap: c: scores become c·tanh(s/c).
        sinks: a learned logit per head, [H], whose value row is zero.
        causal: a token sees itself and what is before it.
        window: (left, right), both inclusive.
        scale: of the scores; 1/√D by default.
        dropout: of attention weights, in training.
        residual_dropout: of the output, in training.
        backend: as in `attention`.
        device, dtype: of the parameters.

    Parameters: `q_proj` [H·D, dim], `k_proj` [Hkv·D, k_dim], `v_proj` [Hkv·Dv, v_dim], `o_proj` [dim, H·Dv]; with the
    options `q_norm`, `k_norm` [D], `relative` [H, 2R + 1], `sinks` [H]. State dicts are the same for MHA, GQA and MQA.

    Raises ValueError or TypeError for settings that do not fit together, before any weight is made.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, **settings: Unpack[Settings]) -> None:
        super().__init__()
        for name in settings:
            if name not in Settings.__annotations__:
                raise TypeError(f"{type(self).__name__}() has no argument {name!r}")
        self._set(dim, heads, kv_heads, **settings)

    def _set(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        k_dim: int | None = None,
        v_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: float | None = None,
        rotary: RotaryEmbedding | None = None,
        alibi: bool = False,
        relative: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        causal: bool = False,
        window: Window | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.whole(dim=dim, heads=heads, kv_heads=kv_heads)
        if heads % kv_heads:
            raise bad_value("kv_heads", kv_heads, f"a divisor of the {heads} heads")
        if head_dim is None and dim % heads:
            raise bad_value("heads", heads, f"a divisor of dim = {dim}", "give head_dim")
        head_dim = dim // heads if head_dim is None else head_dim
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        k_dim, v_dim = dim if k_dim is None else k_dim, dim if v_dim is None else v_dim
        checks.whole(head_dim=head_dim, v_head_dim=v_head_dim, k_dim=k_dim, v_dim=v_dim)
        if relative is not None:
            checks.whole(relative=relative)
        kinds = {"rotary": rotary is not None, "alibi": alibi, "relative": relative is not None}
        given = [name for name, there in kinds.items() if there]
        if len(given) > 1:
            raise bad_value(given[1], f"set beside {given[0]}", "one way to tell positions", f"leave out {given[1]}")
        if rotary is not None and not isinstance(rotary, RotaryEmbedding):
            raise bad_type("rotary", rotary, "a RotaryEmbedding", f"RotaryEmbedding({head_dim})")
        if rotary is not None and rotary.dim > head_dim:
            raise bad_value("rotary", f"{rotary.dim} rotated columns", f"at most head_dim = {head_dim}")
        checks.finite("softcap", softcap, positive=True)
        checks.finite("scale", scale)
        checks.finite("qk_norm", qk_norm, positive=True)
        checks.window_pair(window)
        flags = {"causal": causal, "alibi": alibi, "sinks": sinks, "bias": bias, "out_bias": out_bias or False}
        for name, flag in flags.items():
            checks.flag(name, flag)
        check_name(backend)
        for name, p in (("dropout", dropout), ("residual_dropout", residual_dropout)):
            checks.probability(name, p)
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_dim, self.v_head_dim, self.k_dim, self.v_dim = head_dim, v_head_dim, k_dim, v_dim
        self.softcap, self.causal, self.window, self.scale = softcap, causal, window, scale
        self.dropout, self.residual_dropout, self.backend = dropout, residual_dropout, backend
        self.rotary = rotary
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias, **make)
        self.k_proj = nn.Linear(k_dim, kv_heads * head_dim, bias=bias, **make)
        self.v_proj = nn.Linear(v_dim, kv_heads * v_head_dim, bias=bias, **make)
        self.o_proj = nn.Linear(heads * v_head_dim, dim, bias=bias if out_bias is None else out_bias, **make)
        self.q_norm = None if qk_norm is None else nn.RMSNorm(head_dim, eps=qk_norm, **make)
        self.k_norm = None if qk_norm is None else nn.RMSNorm(head_dim, eps=qk_norm, **make)
        self.relative = None if relative is None else nn.Parameter(torch.zeros(heads, 2 * relative + 1, **make))
        self.sinks = nn.Parameter(torch.zeros(heads, **make)) if sinks else None
        self.alibi = nn.Buffer(alibi_slopes(heads).to(device), persistent=False) if alibi else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedQueryAttention:
        """Moves and casts, after which slopes are made anew: they stay float32, and need no memory to come from."""
        super()._apply(fn, recurse)
        if self.alibi is not None:
            self.alibi = alibi_slopes(self.heads).to(self.alibi.device)
        return self

    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
        need_weights: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
        need_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend.

        Args:
            q: [B, N, dim].
            k: [B, M, k_dim] for cross-attention; q by default (self-attention).
            v: [B, M, v_dim]; k by default.
            mask: a mask value, or a boolean tensor broadcastable to [B, H, N, M], True = attend; on top of `causal` and
                `window`. With a cache a tensor is [N, N] or [B, N, N], over the new tokens,
                and a mask value `masks.Tree`, except for the first tokens.
            cache: self-attention only: the N tokens of q are appended to it, and attend to all that it then holds.
            positions: [N] or [B, N] integers for the rotary embedding; by default tokens count on from what the cache
                holds. In cross-attention keys count from 0 and query i stands at i + M − N.
            counts: [B] int32, with a cache: only the first counts[b] of the N tokens of sequence b are real (padding on
                the right); the outputs of the others mean nothing.
            need_weights: also return the weights, computed whole; up to 2²⁸ entries.

        Returns:
            [B, N, dim]; with `need_weights`, also the weights [B, H, N, M] (without dropout).

        Raises:
            ValueError, TypeError: bad input, before anything runs; a cache with k or v, with need_weights, where
                gradients are wanted, or in training with dropout; a cache that is full.
            UnsupportedError: what the backend or the cache cannot do.
        """
        cross = k is not None
        k = q if k is None else k
        v = k if v is None else v
        self._check(q, k, v, cross, cache, positions, counts, need_weights)
        n, m = q.shape[1], k.shape[1]
        q_heads = self._heads(self.q_proj(q), self.heads, self.head_dim, self.q_norm)
        k_heads = self._heads(self.k_proj(k), self.kv_heads, self.head_dim, self.k_norm)
        v_heads = self._heads(self.v_proj(v), self.kv_heads, self.v_head_dim, None)
        if self.rotary is not None:
            if positions is not None:
                q_heads, k_heads = self.rotary(q_heads, positions), self.rotary(k_heads, positions)
            else:
                start = 0 if cache is None else cache.lengths
                q_heads = self.rotary(q_heads, offset=m - n if cross else start)
                k_heads = self.rotary(k_heads, offset=start)
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "sink": self.sinks,
            "alibi": self.alibi,
            "scale": self.scale,
            "backend": self.backend,
        }
        if cache is not None:
            heads = q_heads, k_heads, v_heads
            if not append(*heads, cache, counts, mask, lambda: heads, **options):
                return self._output(attend(q_heads, cache, counts, mask=mask, **options))
            mask = over_batch(mask)
        options["mask"] = mask
        options["bias"] = None if self.relative is None else Relative(self.relative)
        dropout = self.dropout if self.training else 0.0
        out = self._output(attention(q_heads, k_heads, v_heads, dropout=dropout, **options))
        if not need_weights:
            return out
        options["backend"] = "standard"
        return out, weights_of(q_heads, k_heads, options)

    def _heads(self, x: Tensor, heads: int, dim: int, norm: nn.RMSNorm | None) -> Tensor:
        """[B, N, heads·dim] as [B, heads, N, dim], a view."""
        x = x.unflatten(-1, (heads, dim))
        if norm is not None:
            x = normalized(norm, x)
        return x.transpose(1, 2)

    def _output(self, out: Tensor) -> Tensor:
        """[B, H, N, Dv] mixed into [B, N, dim]."""
        y = self.o_proj(out.transpose(1, 2).flatten(2))
        return F.dropout(y, self.residual_dropout, self.training) if self.residual_dropout else y

    def _check(
        self,
        q: Any,
        k: Any,
        v: Any,
        cross: bool,
        cache: Cache | None,
        positions: Any,
        counts: Any,
        need_weights: bool,
    ) -> None:
        tokens("q", q, self.dim, self.q_proj)
        tokens("k", k, self.k_dim, self.k_proj)
        tokens("v", v, self.v_dim, self.v_proj)
        if k.shape[0] != q.shape[0] or v.shape[:2] != k.shape[:2]:
            got = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
            raise bad_value("v" if k.shape[0] == q.shape[0] else "k", got, "q [B, N, ·], k [B, M, ·], v [B, M, ·]")
        if positions is not None:
            if self.rotary is None:
                raise bad_value("positions", "a tensor", "None in a module without a rotary embedding")
            if cross:
                raise bad_value("positions", "a tensor beside k", "None in cross-attention")
        if cache is not None:
            if cross or v is not k:
                fix = "give q alone, or no cache: keys that stay the same need none"
                raise bad_value("cache", "a cache beside k or v", "self-attention, whose own tokens it holds", fix)
            if need_weights:
                raise bad_value("need_weights", "True with a cache", "a whole sequence", "leave out the cache")
            if self.relative is not None:
                fix = "rotary or alibi, or a full forward without a cache"
                raise bad_value("cache", "a cache", "a module without a relative bias", fix)
            make = f"DenseCache(KV({self.kv_heads}, {self.head_dim}, {self.v_head_dim}), batch, capacity)"
            check_cache(cache, q.shape[0], counts, self.training and self.dropout > 0.0, make)
        elif counts is not None:
            raise bad_value("counts", "a tensor without a cache", "None", "mask= hides padding")
        if need_weights:
            check_weights(q.shape[0], self.heads, q.shape[1], k.shape[1])

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, causal={self.causal}, window={self.window}"


class MultiHeadAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` in which every query head has a key/value head of its own (Vaswani et al., 2017).

    Args and errors as there, without kv_heads. Input and output [B, N, dim].
    """

    def __init__(self, dim: int, heads: int, **settings: Unpack[Settings]) -> None:
        super().__init__(dim, heads, heads, **settings)


class MultiQueryAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` in which all query heads share one key/value head (Shazeer, 2019).

    Args and errors as there, without kv_heads. Input and output [B, N, dim].
    """

    def __init__(self, dim: int, heads: int, **settings: Unpack[Settings]) -> None:
        super().__init__(dim, heads, 1, **settings)
