"""Linear attention as modules: `LinearAttention`, `Retention`, `GatedLinearAttention`, `RWKV6TimeMix`.

All take what the multi-head modules take, `forward(q, k=None, v=None, *, mask=None, cache=None, positions=None)`, so a
model can name any of them. Their cache is a `RecurrentCache`, whose size does not grow: `module.make_cache(batch)`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise.caches.recurrent import RecurrentCache
from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.masks import Causal, Mask
from tilewise.nn.rotary import RotaryEmbedding
from tilewise.nn.sizes import tokens
from tilewise.ops import checks
from tilewise.ops.linear import FUSED, FeatureMap, linear_attention
from tilewise.reference.linear import LinearState
from tilewise.reference.softmax import accumulator_dtype

NOWHERE = -1e4
"""A key whose elu + 1 and ReLU are 0 in every dtype."""


class LinearModule(nn.Module):
    """What the modules share: projections, heads, checks and the cache."""

    causal = True

    def __init__(self, dim: int, heads: int, head_dim: int, v_head_dim: int, backend: str) -> None:
        super().__init__()
        checks.whole(dim=dim, heads=heads, head_dim=head_dim, v_head_dim=v_head_dim)
        self.dim, self.heads, self.head_dim, self.v_head_dim, self.backend = dim, heads, head_dim, v_head_dim, backend
        self.rotary: RotaryEmbedding | None = None

    def make_cache(self, batch: int) -> RecurrentCache:
        """An empty cache for `batch` sequences, on the module's device."""
        weight = next(self.parameters())
        return RecurrentCache(
            self.heads, self.head_dim, self.v_head_dim, batch,
            dtype=accumulator_dtype(weight.dtype), device=weight.device, **self._cache_options(),
        )  # fmt: skip

    def _cache_options(self) -> dict[str, Any]:
        return {}

    def _inputs(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, cache: Any, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Checked; k and v default as in the multi-head modules."""
        cross = k is not None or v is not None
        k = q if k is None else k
        v = k if v is None else v
        for name, x in (("q", q), ("k", k), ("v", v)):
            tokens(name, x, self.dim)
        if k.shape[0] != q.shape[0] or v.shape != k.shape:
            raise bad_value(
                "k", f"{list(k.shape)} beside q {list(q.shape)} and v {list(v.shape)}", "one batch and one M"
            )
        if positions is not None and self.rotary is None:
            raise bad_value("positions", "a tensor", "None in a module without a rotary embedding")
        if cache is None:
            return k, v
        if not isinstance(cache, RecurrentCache):
            raise bad_type("cache", cache, "a RecurrentCache", "cache = module.make_cache(batch)")
        if not self.causal or cross:
            got = "a cache with k or v" if cross else "a cache in a module that is not causal"
            raise bad_value("cache", got, "causal self-attention, whose past a state is")
        if cache.batch != q.shape[0]:
            raise bad_value("cache", f"room for {cache.batch} sequences", f"q's batch {q.shape[0]}")
        tail, want = 0 if cache.tail is None else cache.tail.shape[1], self._cache_options().get("tail", 0)
        if tail != want:
            got = f"a tail of {tail} numbers"
            raise bad_value("cache", got, f"one of {want} in {type(self).__name__}", "cache = module.make_cache(batch)")
        return k, v

    def _cut(self, x: Tensor, dim: int) -> Tensor:
        """[B, N, heads·dim] as [B, heads, N, dim], a view."""
        return x.unflatten(-1, (self.heads, dim)).transpose(1, 2)

    def _padding(self, mask: Mask | Tensor | None, k: Tensor) -> Tensor | None:
        """[B, 1, M, 1], True for keys to leave out; a linear sum knows no other mask than which keys are in it."""
        if mask is None or (isinstance(mask, Causal) and self.causal and mask == Causal()):
            return None
        if isinstance(mask, Tensor):
            checks.boolean_mask(mask)
            if tuple(mask.shape) in ((k.shape[0], 1, 1, k.shape[1]), (1, 1, 1, k.shape[1])):
                return ~mask.reshape(-1, 1, k.shape[1], 1)
        got = f"a tensor of shape {list(mask.shape)}" if isinstance(mask, Tensor) else str(mask)
        raise UnsupportedError(
            f"mask: {type(self).__name__} sums over keys without ever weighing one against a query, so it takes key "
            f"padding [B, 1, 1, M] only, not {got}. Fix: SparseAttention or a multi-head module takes any mask"
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: RecurrentCache | None, tail: Tensor | None = None, **options: Any
    ) -> Tensor:
        """linear_attention [B, H, N, Dv], from and into the cache, with `tail` as the last tokens' inputs."""
        if cache is None:
            return linear_attention(q, k, v, causal=self.causal, backend=self.backend, **options)
        before = cache.state
        if torch.is_grad_enabled():  # a backward to come needs this state, and the cache overwrites its own
            before = LinearState(*(None if x is None else x.clone() for x in before))  # type: ignore[arg-type]
        out, (s, z, shift) = linear_attention(
            q, k, v, causal=True, backend=self.backend, state=before, return_state=True, **options
        )
        kept = LinearState(s.detach(), None if z is None else z.detach(), shift)
        cache.update(kept, q.shape[2], None if tail is None else tail.detach())
        return out

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, head_dim={self.head_dim}, v_head_dim={self.v_head_dim}"


class LinearAttention(LinearModule):
    """Normalised linear attention with a feature map (Katharopoulos et al., 2020; Performer with `FavorFeatures`).

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        head_dim: D of queries and keys; dim / H by default.
        v_head_dim: Dv; D by default.
        feature_map: as in `linear_attention`; a module's parameters become parameters of this one.
        causal: a token sees itself and what is before it; needed for a cache.
        bias: of the projections.
        backend: as in `linear_attention`.
        device, dtype: of the parameters.

    Parameters: `q_proj`, `k_proj` [H·D, dim], `v_proj` [H·Dv, dim], `o_proj` [dim, H·Dv].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        feature_map: FeatureMap = "elu",
        causal: bool = False,
        bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = per_head("head_dim", dim, heads) if head_dim is None else head_dim
        super().__init__(dim, heads, head_dim, head_dim if v_head_dim is None else v_head_dim, backend)
        checks.flag("causal", causal)
        self.feature_map, self.causal = feature_map, causal
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(dim, heads * self.v_head_dim, bias=bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(heads * self.v_head_dim, dim, bias=bias, device=device, dtype=dtype)

    def make_cache(self, batch: int) -> RecurrentCache:
        """See `LinearModule.make_cache`; the state has as many rows as there are features."""
        weight = self.q_proj.weight
        probe = torch.zeros(1, 1, 1, self.head_dim, dtype=weight.dtype, device=weight.device)
        logs = getattr(self.feature_map, "log_features", None)
        if logs is not None:
            size = logs(probe).shape[-1]
        elif self.feature_map == "taylor":
            size = 1 + self.head_dim + self.head_dim**2
        else:
            size = self.feature_map(probe).shape[-1] if callable(self.feature_map) else self.head_dim
        return RecurrentCache(
            self.heads, size, self.v_head_dim, batch, normalized=True, shifted=logs is not None,
            dtype=accumulator_dtype(weight.dtype), device=weight.device,
        )  # fmt: skip

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
        """Attend.

        Args:
            q: [B, N, dim].
            k: [B, M, dim] for cross-attention (not where causal); q by default.
            v: [B, M, dim]; k by default.
            mask: key padding, boolean [B, 1, 1, M], True = attend, with the maps "elu" and "relu".
            cache: of `make_cache`: the tokens of q go on from its state, which becomes the one after them.
            positions: None; there is no rotary embedding.

        Returns [B, N, dim]. Raises ValueError, TypeError or UnsupportedError before anything runs.
        """
        k, v = self._inputs(q, k, v, cache, positions)
        hidden = self._padding(mask, k)
        q, k = self._cut(self.q_proj(q), self.head_dim), self._cut(self.k_proj(k), self.head_dim)
        v = self._cut(self.v_proj(v), self.v_head_dim)
        if hidden is not None:
            if self.feature_map not in FUSED[1:]:
                raise UnsupportedError("mask: only the maps 'elu' and 'relu' have an input whose features are all 0")
            k, v = k.masked_fill(hidden, NOWHERE), v.masked_fill(hidden, 0.0)
        out = self._attend(q, k, v, cache, feature_map=self.feature_map, normalize=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class GatedModule(LinearModule):
    """What forgets: queries and keys without a feature map, a decay, an RMSNorm a head, and an output gate."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        v_head_dim: int,
        backend: str,
        make: dict[str, Any],
    ) -> None:
        super().__init__(dim, heads, head_dim, v_head_dim, backend)
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False, **make)
        self.k_proj = nn.Linear(dim, heads * head_dim, bias=False, **make)
        self.v_proj = nn.Linear(dim, heads * v_head_dim, bias=False, **make)
        self.gate_proj = nn.Linear(dim, heads * v_head_dim, bias=False, **make)
        self.norm = nn.RMSNorm(v_head_dim, eps=1e-5, **make)
        self.o_proj = nn.Linear(heads * v_head_dim, dim, bias=False, **make)

    def _decay(self, x: Tensor) -> Tensor:
        """The log decay of tokens x [B, N, dim], as `linear_attention` takes it."""
        raise NotImplementedError

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
            positions: [N] or [B, N] for the rotary embedding; by default they count on from what the cache holds.

        Raises ValueError, TypeError or UnsupportedError before anything runs.
        """
        k, v = self._inputs(q, k, v, cache, positions)
        hidden = self._padding(mask, k)
        gate, decay = F.silu(self.gate_proj(q)), self._decay(k)
        q, keys = self._cut(self.q_proj(q), self.head_dim), self._cut(self.k_proj(k), self.head_dim)
        v = self._cut(self.v_proj(v), self.v_head_dim)
        if self.rotary is not None:
            # A copy: the rotation's backward needs it after the cache has moved on.
            start = 0 if cache is None or positions is not None else cache.lengths.clone()
            q, keys = self.rotary(q, positions, offset=start), self.rotary(keys, positions, offset=start)
        if hidden is not None:
            keys = keys.masked_fill(hidden, 0.0)
        out = self._attend(q, keys, v, cache, feature_map=None, decay=decay, scale=self.head_dim**-0.5)
        return self.o_proj(self.norm(out.transpose(1, 2)).flatten(2) * gate)


class Retention(GatedModule):
    """Multi-scale retention: every head forgets at a rate of its own, `1 − 2^{−5−h}` (Sun et al., RetNet, 2023).

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        head_dim: D of queries and keys; dim / H by default.
        v_head_dim: Dv; 2·D by default, as in the paper.
        rotary: positions; `RotaryEmbedding(head_dim)` by default.
        backend, device, dtype: as in `LinearAttention`.

    Parameters: `q_proj`, `k_proj` [H·D, dim], `v_proj`, `gate_proj` [H·Dv, dim], `norm` [Dv], `o_proj` [dim, H·Dv];
    the rates are constants.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        rotary: RotaryEmbedding | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = per_head("head_dim", dim, heads) if head_dim is None else head_dim
        v_head_dim = 2 * head_dim if v_head_dim is None else v_head_dim
        super().__init__(dim, heads, head_dim, v_head_dim, backend, {"device": device, "dtype": dtype})
        self.rotary = RotaryEmbedding(head_dim) if rotary is None else rotary
        kept = torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float64)))).float()
        self.log_decay = nn.Buffer(kept.to(device), persistent=False)

    def _decay(self, x: Tensor) -> Tensor:
        return self.log_decay


class GatedLinearAttention(GatedModule):
    """GLA: every key channel of every token has a gate, `σ(x W₁ W₂ + b)^{1/τ}` (Yang et al., 2023).

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H.
        head_dim: D of queries and keys; dim / 2H by default, as in the paper.
        v_head_dim: Dv; dim / H by default.
        gate_rank: of the two gate projections.
        temperature: τ.
        backend, device, dtype: as in `LinearAttention`.

    Parameters: as of `Retention`, and `decay_down` [gate_rank, dim], `decay_up` [H·D, gate_rank] with bias.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        gate_rank: int = 16,
        temperature: float = 16.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = max(1, per_head("head_dim", dim, heads) // 2) if head_dim is None else head_dim
        v_head_dim = per_head("v_head_dim", dim, heads) if v_head_dim is None else v_head_dim
        checks.whole(gate_rank=gate_rank)
        checks.finite("temperature", temperature, positive=True)
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, head_dim, v_head_dim, backend, make)
        self.temperature = temperature
        self.decay_down = nn.Linear(dim, gate_rank, bias=False, **make)
        self.decay_up = nn.Linear(gate_rank, heads * head_dim, bias=True, **make)

    def _decay(self, x: Tensor) -> Tensor:
        gates = self.decay_up(self.decay_down(x))
        wide = gates.to(torch.promote_types(gates.dtype, torch.float32))
        return self._cut(F.logsigmoid(wide) / self.temperature, self.head_dim)


class RWKV6TimeMix(LinearModule):
    """Time mixing of RWKV-6 (Finch): token shift by what the token says, a decay per channel, and a bonus.

    `o_t = r_t (S_{t−1} + diag(u) k_tᵀ v_t)`, with log decay `−exp(w₀ + tanh(x A) B)`.

    Args:
        dim: width of input and output, [B, N, dim].
        heads: H, with D = Dv = dim / H.
        mix_rank, decay_rank: ranks of the token-shift and decay projections.
        backend, device, dtype: as in `LinearAttention`.

    Parameters: `r_proj`, `k_proj`, `v_proj`, `gate_proj`, `o_proj` [dim, dim]; `mix` [6, dim], `mix_down`
    [5·mix_rank, dim], `mix_up` [5, mix_rank, dim]; `decay_base` [dim], `decay_down`, `decay_up`; `bonus` [H, D];
    `norm`.

    Source: Peng et al., "Eagle and Finch" (2024), section 4.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mix_rank: int = 32,
        decay_rank: int = 64,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim = per_head("heads", dim, heads)
        super().__init__(dim, heads, head_dim, head_dim, backend)
        checks.whole(mix_rank=mix_rank, decay_rank=decay_rank)
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.r_proj, self.k_proj, self.v_proj, self.gate_proj, self.o_proj = (
            nn.Linear(dim, dim, bias=False, **make) for _ in range(5)
        )
        self.mix = nn.Parameter(torch.full((6, dim), 0.5, **make))
        self.mix_down = nn.Linear(dim, 5 * mix_rank, bias=False, **make)
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, dim, **make).uniform_(-0.01, 0.01))
        self.decay_base = nn.Parameter(torch.linspace(-6.0, -1.0, dim, **make))
        self.decay_down = nn.Linear(dim, decay_rank, bias=False, **make)
        self.decay_up = nn.Linear(decay_rank, dim, bias=False, **make)
        self.bonus = nn.Parameter(torch.zeros(heads, head_dim, **make))
        self.norm = nn.GroupNorm(heads, dim, eps=1e-5 * heads, **make)

    def _cache_options(self) -> dict[str, Any]:
        return {"tail": self.dim}

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
        """Mix q [B, N, dim] with what came before; [B, N, dim]. Self-attention only.

        Args and errors as in `Retention`, without positions.
        """
        if k is not None or v is not None:
            raise bad_value("k", "a tensor", "None: time mixing is a token's own past", "a multi-head module")
        self._inputs(q, k, v, cache, positions)
        hidden = self._padding(mask, q)
        if hidden is not None:
            q = q.masked_fill(hidden[:, 0], 0.0)
        before = q.new_zeros(q.shape[0], self.dim) if cache is None or cache.tail is None else cache.tail.to(q.dtype)
        inputs = torch.cat((before[:, None], q), 1)
        change = inputs[:, :-1] - q
        down = torch.tanh(self.mix_down(q + change * self.mix[5])).unflatten(-1, (5, -1))
        mixes = torch.einsum("bnfr,frd->fbnd", down, self.mix_up) + self.mix[:5, None, None]
        r, key, value, gate, decay = (q + change * mix for mix in mixes)
        rates = self.decay_base + self.decay_up(torch.tanh(self.decay_down(decay)))
        wide = rates.to(torch.promote_types(rates.dtype, torch.float32))
        heads = [self._cut(x, self.head_dim) for x in (self.r_proj(r), self.k_proj(key), self.v_proj(value))]
        if hidden is not None:
            heads[1] = heads[1].masked_fill(hidden, 0.0)
        options = {"feature_map": None, "decay": self._cut(-wide.exp(), self.head_dim), "bonus": self.bonus}
        r, key, value = heads
        out = self._attend(r, key, value, cache, inputs[:, -1], **options)
        out = self.norm(out.transpose(1, 2).reshape(-1, self.dim)).view(q.shape)
        return self.o_proj(out * F.silu(self.gate_proj(gate)))


def per_head(name: str, dim: int, heads: int) -> int:
    """dim / H, or a ValueError that tells to give `name`."""
    checks.whole(dim=dim, heads=heads)
    if dim % heads:
        raise bad_value("heads", heads, f"a divisor of dim = {dim}", f"give {name}" if name != "heads" else None)
    return dim // heads
