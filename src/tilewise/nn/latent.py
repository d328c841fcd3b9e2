"""Multi-head latent attention: what is cached is one compressed vector a token, shared by all heads.

Sources: DeepSeek-V2 (2024), section 2.1 and appendix C; DeepSeek-V3 (2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise.caches import Cache
from tilewise.errors import bad_type, bad_value
from tilewise.masks import Mask
from tilewise.nn.decoding import append, attend, check_cache, normalized, over_batch
from tilewise.nn.rotary import RotaryEmbedding
from tilewise.nn.sizes import tokens
from tilewise.ops import checks
from tilewise.ops.dense import attention
from tilewise.ops.dispatch import check_name
from tilewise.ops.rotary_scaling import YaRN
from tilewise.spec import Window


class MultiHeadLatentAttention(nn.Module):
    """MLA as in DeepSeek-V2 and V3, self-attention only.

    With c_q = RMSNorm(q_a_proj x), q = q_b_proj c_q (H heads of d_nope | d_rope); [c_kv | k_pe] = kv_a_proj x, c_kv
    normalised, k_pe rotated and shared by all heads; kv_b_proj c_kv gives H heads of (k_nope | v).

    Two forms that agree. *Expanded*: H heads with D = d_nope + d_rope and Dv = d_v, for training and prefill.
    *Absorbed*: kv_b_proj is moved over to the queries and outputs, which leaves MQA over the latents themselves,
    D = r_kv + d_rope and Dv = r_kv, K and V the same memory: for decoding, where reading the cache is what takes time.

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        q_rank: width of c_q; None for no compression of the queries (V2-Lite), then there is a plain `q_proj`.
        kv_rank: r_kv, width of c_kv.
        nope_dim, rope_dim: d_nope and d_rope.
        v_dim: d_v.
        rotary: of rope_dim columns; interleaved with base 10000 by default. With `YaRN` its temperature also enters the
            scale of the scores, as DeepSeek has it.
        bias: of q_a_proj, kv_a_proj and o_proj.
        eps: of the RMSNorms.
        causal: a token sees itself and what is before it.
        window: (left, right), both inclusive.
        scale: of the scores; (d_nope + d_rope)^−½ by default, and YaRN's temperature.
        dropout: of attention weights, in training.
        residual_dropout: of the output, in training.
        backend: as in `attention`.
        device, dtype: of the parameters.

    Raises ValueError or TypeError for settings that do not fit together, before any weight is made.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        q_rank: int | None = None,
        kv_rank: int = 512,
        nope_dim: int = 128,
        rope_dim: int = 64,
        v_dim: int = 128,
        rotary: RotaryEmbedding | None = None,
        bias: bool = False,
        eps: float = 1e-6,
        causal: bool = True,
        window: Window | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.whole(dim=dim, heads=heads, kv_rank=kv_rank, nope_dim=nope_dim, rope_dim=rope_dim, v_dim=v_dim)
        if q_rank is not None:
            checks.whole(q_rank=q_rank)
        rotary = RotaryEmbedding(rope_dim, interleaved=True) if rotary is None else rotary
        if not isinstance(rotary, RotaryEmbedding):
            raise bad_type("rotary", rotary, "a RotaryEmbedding", f"RotaryEmbedding({rope_dim}, interleaved=True)")
        if rotary.dim != rope_dim:
            raise bad_value("rotary", f"{rotary.dim} rotated columns", f"rope_dim = {rope_dim}")
        checks.finite("scale", scale)
        checks.window_pair(window)
        checks.finite("eps", eps, positive=True)
        checks.flag("causal", causal)
        checks.flag("bias", bias)
        check_name(backend)
        for name, p in (("dropout", dropout), ("residual_dropout", residual_dropout)):
            checks.probability(name, p)
        self.dim, self.heads, self.q_rank, self.kv_rank = dim, heads, q_rank, kv_rank
        self.nope_dim, self.rope_dim, self.v_dim = nope_dim, rope_dim, v_dim
        self.rotary, self.causal, self.window, self.backend = rotary, causal, window, backend
        self.dropout, self.residual_dropout = dropout, residual_dropout
        temperature = rotary.scaling.softmax_factor if isinstance(rotary.scaling, YaRN) else 1.0
        self.scale = (nope_dim + rope_dim) ** -0.5 * temperature if scale is None else scale
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        q_width = heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.q_proj = nn.Linear(dim, q_width, bias=False, **make)
        else:
            self.q_a_proj = nn.Linear(dim, q_rank, bias=bias, **make)
            self.q_a_norm = nn.RMSNorm(q_rank, eps=eps, **make)
            self.q_b_proj = nn.Linear(q_rank, q_width, bias=False, **make)
        self.kv_a_proj = nn.Linear(dim, kv_rank + rope_dim, bias=bias, **make)
        self.kv_a_norm = nn.RMSNorm(kv_rank, eps=eps, **make)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (nope_dim + v_dim), bias=False, **make)
        self.o_proj = nn.Linear(heads * v_dim, dim, bias=bias, **make)

    def forward(
        self,
        q: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        counts: Tensor | None = None,
        absorbed: bool | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: [B, N, dim].
            mask: as in `GroupedQueryAttention.forward`.
            cache: of `Latent(kv_rank, rope_dim)` contents; the N tokens of q are appended to it, and attend to all that
                it then holds.
            positions: [N] or [B, N] integers for the rotary embedding; by default tokens count on from what the cache
                holds.
            counts: [B] int32, with a cache: only the first counts[b] of the N tokens of sequence b are real; the
                outputs of the others mean nothing.
            absorbed: the form, where there is no cache or it is empty; expanded by default. Over what a cache held
                before it is the absorbed one.

        Returns:
            [B, N, dim].

        Raises:
            ValueError, TypeError: bad input, before anything runs; a cache that is full.
            UnsupportedError: what the backend or the cache cannot do.
        """
        tokens("q", q, self.dim, self.kv_a_proj)
        if cache is not None:
            make = f"DenseCache(Latent({self.kv_rank}, {self.rope_dim}), batch, capacity)"
            check_cache(cache, q.shape[0], counts, self.training and self.dropout > 0.0, make)
        elif counts is not None:
            raise bad_value("counts", "a tensor without a cache", "None", "mask= hides padding")
        start = 0 if cache is None or positions is not None else cache.lengths
        queries = self.q_proj(q) if self.q_rank is None else self.q_b_proj(normalized(self.q_a_norm, self.q_a_proj(q)))
        queries = queries.unflatten(-1, (self.heads, self.nope_dim + self.rope_dim)).transpose(1, 2)
        q_nope, q_pe = queries.split((self.nope_dim, self.rope_dim), dim=-1)
        c_kv, k_pe = self.kv_a_proj(q).split((self.kv_rank, self.rope_dim), dim=-1)
        c_kv = normalized(self.kv_a_norm, c_kv)
        q_pe = self.rotary(q_pe, positions, offset=start)
        k_pe = self.rotary(k_pe.unsqueeze(1), positions, offset=start)
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "backend": self.backend,
        }
        if cache is not None:
            latents = torch.cat([c_kv.unsqueeze(1), k_pe], dim=-1)

            def whole_heads() -> tuple[Tensor, Tensor, Tensor]:
                if absorbed:
                    wide = queries.new_empty(*queries.shape[:3], latents.shape[3])
                    return wide, latents, latents[..., : self.kv_rank]
                return queries, queries, queries.new_empty(*queries.shape[:3], self.v_dim)

            if not append(queries, latents, None, cache, counts, mask, whole_heads, **options):
                q_latent, v_up = self._absorb(q_nope, q_pe)
                return self._output(attend(q_latent, cache, counts, mask=mask, **options) @ v_up)
            mask = over_batch(mask)
        options["mask"] = mask
        options["dropout"] = self.dropout if self.training else 0.0
        if absorbed:
            latents = torch.cat([c_kv.unsqueeze(1), k_pe], dim=-1)
            q_latent, v_up = self._absorb(q_nope, q_pe)
            return self._output(attention(q_latent, latents, latents[..., : self.kv_rank], **options) @ v_up)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.heads, self.nope_dim + self.v_dim)).transpose(1, 2)
        k_nope, v = kv.split((self.nope_dim, self.v_dim), dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, self.heads, -1, -1)], dim=-1)
        return self._output(attention(torch.cat([q_nope, q_pe], dim=-1), k, v, **options))

    def _absorb(self, q_nope: Tensor, q_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Queries against latents, [B, H, N, r_kv + d_rope], and what makes values of latents, [H, r_kv, d_v]."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.heads, self.nope_dim + self.v_dim))
        k_up, v_up = weight.split((self.nope_dim, self.v_dim), dim=1)
        return torch.cat([q_nope @ k_up, q_pe], dim=-1), v_up.mT

    def _output(self, out: Tensor) -> Tensor:
        """[B, H, N, d_v] mixed into [B, N, dim]."""
        y = self.o_proj(out.transpose(1, 2).flatten(2))
        return F.dropout(y, self.residual_dropout, self.training) if self.residual_dropout else y

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, q_rank={self.q_rank}, kv_rank={self.kv_rank}, "
            f"nope_dim={self.nope_dim}, rope_dim={self.rope_dim}, v_dim={self.v_dim}"
        )
