"""`GatedDeltaNet`: the delta rule as a module, with the short convolutions that it is used with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise.caches.recurrent import RecurrentCache
from tilewise.errors import bad_value
from tilewise.masks import Mask
from tilewise.nn.linear import GatedModule, per_head
from tilewise.ops import checks

EPSILON = 1e-6
"""Added to |x|² before its root: a token without a key has a key of 0."""


class GatedDeltaNet(GatedModule):
    """Gated DeltaNet: a token replaces what its key finds in the state, and a gate a head forgets (Yang et al., 2024).

    `S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ`, `o_t = q_tᵀ S_t / √D`. Queries, keys and values pass a causal
    convolution over the last tokens and SiLU; queries and keys are then brought to length 1. `β = σ(x W_β)` and
    `α = exp(−e^A softplus(x W_α + b))`. The output is normalised a head and gated by `SiLU(x W_g)`.

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        head_dim: D of queries and keys; dim / H by default.
        v_head_dim: Dv; D by default.
        conv_size: tokens that the convolutions see, their own included; at least 2.
        backend, device, dtype: as in `LinearAttention`.

    Parameters: `q_proj`, `k_proj` [H·D, dim], `v_proj`, `gate_proj` [H·Dv, dim], `conv` [2·H·D + H·Dv, conv_size], the
    earliest token first; `beta_proj`, `decay_proj` [H, dim], `decay_rate` (A) and `decay_bias` (b) [H]; `norm` [Dv],
    `o_proj` [dim, H·Dv].

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        conv_size: int = 4,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = per_head("head_dim", dim, heads) if head_dim is None else head_dim
        checks.whole(conv_size=conv_size)
        if conv_size < 2:
            raise bad_value("conv_size", conv_size, "at least 2: a token and the one before it")
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, head_dim, head_dim if v_head_dim is None else v_head_dim, backend, make)
        self.conv_size, self.channels = conv_size, heads * (2 * head_dim + self.v_head_dim)
        bound = conv_size**-0.5
        self.conv = nn.Parameter(torch.empty(self.channels, conv_size, **make).uniform_(-bound, bound))
        self.beta_proj = nn.Linear(dim, heads, bias=False, **make)
        self.decay_proj = nn.Linear(dim, heads, bias=False, **make)
        # Mamba-2's: rates of up to 16 times a step, log-uniform between 1e-3 and 0.1 and passed through softplus⁻¹.
        self.decay_rate = nn.Parameter(torch.empty(heads, **make).uniform_(1.0, 16.0).log())
        step = torch.empty(heads, **make).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.decay_bias = nn.Parameter(step + (-torch.expm1(-step)).log())

    def _cache_options(self) -> dict[str, Any]:
        return {"tail": (self.conv_size - 1) * self.channels}

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        cache: RecurrentCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend causally, q [B, N, dim] to itself or to k and v of the same length; [B, N, dim].

        Args:
            mask: key padding, boolean [B, 1, 1, N], True = attend: such tokens add nothing (time passes all the same).
            cache: of `make_cache`: the tokens of q go on from its state, which becomes the one after them.
            positions: None; there is no rotary embedding.

        Raises ValueError, TypeError or UnsupportedError before anything runs.
        """
        k, v = self._inputs(q, k, v, cache, positions)
        hidden = self._padding(mask, k)
        gate = F.silu(self.gate_proj(q))
        decay, beta = self._decay(k), torch.sigmoid(_wide(self.beta_proj(k))).transpose(1, 2)
        inputs = torch.cat((self.q_proj(q), self.k_proj(k), self.v_proj(v)), -1)
        if hidden is not None:
            inputs, beta = inputs.masked_fill(hidden[:, 0], 0.0), beta.masked_fill(hidden[..., 0], 0.0)
        shape = (q.shape[0], self.conv_size - 1, self.channels)
        before = None if cache is None or cache.tail is None else cache.tail.to(inputs.dtype).view(shape)
        window = torch.cat((inputs.new_zeros(shape) if before is None else before, inputs), 1)
        mixed = inputs  # of no tokens there is no convolution
        if inputs.shape[1]:
            mixed = F.silu(F.conv1d(window.mT, self.conv[:, None], groups=self.channels).mT)
        width = self.heads * self.head_dim
        queries, keys, values = mixed.split((width, width, self.heads * self.v_head_dim), -1)
        queries, keys = (_unit(self._cut(x, self.head_dim)) for x in (queries, keys))
        out = self._attend(
            queries, keys, self._cut(values, self.v_head_dim), cache, window[:, q.shape[1] :].flatten(1),
            feature_map=None, decay=decay, beta=beta, scale=self.head_dim**-0.5,
        )  # fmt: skip
        return self.o_proj(self.norm(out.transpose(1, 2)).flatten(2) * gate)

    def _decay(self, x: Tensor) -> Tensor:
        step = F.softplus(_wide(self.decay_proj(x)) + _wide(self.decay_bias))
        return -(_wide(self.decay_rate).exp() * step).transpose(1, 2)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least: half precision has no factor 1 − 10⁻⁴."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    """x over its length along the last dim."""
    wide = _wide(x)
    return (wide * (wide.square().sum(-1, keepdim=True) + EPSILON).rsqrt()).to(x.dtype)
