"""Linear attention in three equal forms: `O_i = φ(Q_i) S_i`, with `S_i = e^{g_i}∘S_{i−1} + φ(K_i)ᵀ V_i`.

- *parallel*: all N×M weights at once, `Σ_d φ(q)_id φ(k)_jd e^{G_id − G_jd}` with G the running sum of the log decays g;
- *chunked*: that within a chunk, and one state [K, Dv] handed from chunk to chunk: O(N) time and memory;
- *recurrent*: the definition, token by token: O(1) a token.

Here q and k are features already (see `features.py`) and K is their size. Exponents are always differences of running
sums from a later to an earlier token, so at most 0 for log decays of at most 0: `e^{−G}` alone would overflow.

Sources: Katharopoulos et al., "Transformers are RNNs" (2020); Sun et al., "Retentive Network" (2023); Yang et al.,
"Gated Linear Attention Transformers with Hardware-Efficient Training" (2023), whose two-level chunks this follows;
Peng et al., "Eagle and Finch" (2024) for RWKV-6. The delta rule, which is this over other values, is in `delta.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.reference.delta import chunk_states, new_values
from tilewise.reference.softmax import NEG_INF, accumulator_dtype

EPSILON = 1e-6
"""Added to the denominator of normalised attention: a row whose features meet no key's gives 0, not 0/0."""

LEAST_LOG_DECAY = -60.0
"""A log decay below this, −∞ too, counts as this: e^{−60} is 9e−27, and differences of sums stay finite."""


class LinearState(NamedTuple):
    """What linear attention remembers of the tokens so far."""

    s: Tensor
    """[B, H, K, Dv] float32 (float64 for float64 inputs): `Σ_j e^{G − G_j} φ(k_j)ᵀ v_j`."""
    z: Tensor | None = None
    """[B, H, K], the same sum of φ(k_j) alone, of normalised attention."""
    shift: Tensor | None = None
    """[B, H], what the logs of the key features were lowered by, for maps given in logs (FAVOR+)."""


class Result(NamedTuple):
    """What every form returns, in the accumulator dtype."""

    out: Tensor
    """[B, H, N, Dv]"""
    state: LinearState
    """After the last token."""
    den: Tensor | None = None
    """[B, H, N], what `out` was divided by, of normalised attention."""


class _Terms(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    to_query: Tensor | None
    """Running log decay from the start up to what query i sees: [B, H, N] or [B, H, N, K]; None without decay."""
    to_key: Tensor | None
    """The same up to and with token j."""
    s: Tensor
    z: Tensor


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    beta: Tensor | None = None,
    exclusive: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
    state: LinearState | None = None,
) -> Result:
    """All weights at once: O(N·M) memory, O(N·M·K) with a decay per key channel.

    Args:
        q: [B, H, N, K] features.
        k: [B, H, M, K] features; M = N where causal.
        v: [B, H, M, Dv].
        causal: token i sees tokens j ≤ i.
        decay: logs of the decay, [B, H, N] or, per key channel, [B, H, N, K]; causal only.
        bonus: u [H, K] of RWKV-6: token i sees j < i through S_{i−1}, and itself with weight `Σ_d q_d u_d k_d`.
        beta: [B, H, N] of the delta rule: causal, unnormalised, with a decay per token and head or none.
        exclusive: what `bonus` says without the bonus.
        normalize: divide by `Σ_j` of the weights, plus EPSILON.
        scale: of all weights.
        state: what came before the first token.
    """
    exclusive = exclusive or bonus is not None
    terms = _prepare(q, k, v, decay, exclusive, scale, state)
    if beta is not None:
        fresh, known = new_values(terms.k, terms.v, beta.to(terms.k.dtype), terms.to_key)
        terms = terms._replace(v=fresh - known @ terms.s)
    weights = _weights(terms, causal, exclusive)
    out = weights @ terms.v
    seen = _decayed(terms.q, terms.to_query)
    out = out + seen @ terms.s
    if bonus is not None:
        out = out + own_token(terms.q, k.to(terms.q.dtype), terms.v, bonus)
    s, z = fold(terms.k, terms.v, terms.to_key, terms.s, terms.z)
    if not normalize:
        return Result(out, LinearState(s))
    den = weights.sum(-1) + (seen * terms.z[..., None, :]).sum(-1) + EPSILON
    return Result(out / den[..., None], LinearState(s, z), den)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    state: LinearState | None = None,
) -> Result:
    """Token by token, causal; arguments as for `parallel`."""
    terms = _prepare(q, k, v, None, False, scale, state)
    s, z = terms.s, terms.z
    rows, dens = [], []
    for i in range(q.shape[2]):
        q_i, k_i, v_i = terms.q[:, :, i], terms.k[:, :, i], terms.v[:, :, i]
        before = s
        if decay is not None:
            kept = decay[:, :, i : i + 1].to(s.dtype).clamp(min=LEAST_LOG_DECAY).exp().flatten(2)
            s, z = s * kept[..., None], z * kept
        if beta is not None:
            v_i = beta[:, :, i, None].to(s.dtype) * (v_i - (k_i[..., None, :] @ s)[..., 0, :])
        update = k_i[..., :, None] * v_i[..., None, :]
        s, z = s + update, z + k_i
        read = s if bonus is None else before + bonus.to(s.dtype)[..., None] * update
        rows.append((q_i[..., None, :] @ read)[..., 0, :])
        dens.append((q_i * z).sum(-1) + EPSILON)
    out = torch.stack(rows, 2) if rows else torch.zeros_like(terms.v)
    if not normalize:
        return Result(out, LinearState(s))
    den = torch.stack(dens, 2) if dens else out[..., 0]
    return Result(out / den[..., None], LinearState(s, z), den)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    beta: Tensor | None = None,
    exclusive: bool = False,
    normalize: bool = False,
    scale: float = 1.0,
    state: LinearState | None = None,
    chunk: int = 64,
    subchunk: int = 16,
) -> Result:
    """Chunk by chunk: O(N·chunk) memory, differentiable by autograd; arguments as for `parallel`.

    Args:
        chunk: tokens a chunk.
        subchunk: with a decay per channel, rows whose products with other rows go through one matrix product, their
            decays split at the row before the subchunk; within it every exponent is formed for itself.
    """
    exclusive = exclusive or bonus is not None
    if not causal:
        terms = _prepare(q, k, v, decay, exclusive, scale, state)
        s, z = fold(terms.k, terms.v, None, terms.s, terms.z)
        if not normalize:
            return Result(terms.q @ s, LinearState(s))
        den = (terms.q @ z[..., None])[..., 0] + EPSILON
        return Result(terms.q @ s / den[..., None], LinearState(s, z), den)
    n, size = q.shape[2], min(chunk, max(1, q.shape[2]))
    padded = [_padded(x, size) for x in (q, k, v)]
    gates = None if decay is None else _padded(decay.to(accumulator_dtype(q.dtype)).clamp(min=LEAST_LOG_DECAY), size)
    cut_q, cut_k, cut_v = (_cut(x, size) for x in padded)
    terms = _prepare(cut_q, cut_k, cut_v, None, exclusive, scale, state)
    if gates is not None:
        to_key = _cut(gates, size).cumsum(3)
        terms = terms._replace(to_key=to_key, to_query=_shifted(to_key, 3) if exclusive else to_key)
    if beta is None:
        before_s, before_z, s, z = _states(terms)
    else:
        rates = _cut(_padded(beta.to(terms.k.dtype), size), size)
        before_s, values, s = chunk_states(terms.k, terms.v, rates, terms.to_key, terms.s)
        terms, before_z, z = terms._replace(v=values), terms.z, terms.z
    channels = gates is not None and gates.dim() == 4
    weights = _subchunked(terms, exclusive, subchunk) if channels else _weights(terms, True, exclusive)
    seen = _decayed(terms.q, terms.to_query)
    out = weights @ terms.v + seen @ before_s
    if bonus is not None:
        out = out + own_token(terms.q, terms.k, terms.v, bonus[:, None])
    if not normalize:
        return Result(out.flatten(2, 3)[:, :, :n], LinearState(s))
    den = weights.sum(-1) + (seen * before_z[..., None, :]).sum(-1) + EPSILON
    out = (out / den[..., None]).flatten(2, 3)[:, :, :n]
    return Result(out, LinearState(s, z), den.flatten(2, 3)[:, :, :n])


def own_token(q: Tensor, k: Tensor, v: Tensor, bonus: Tensor) -> Tensor:
    """RWKV-6's `q_i diag(u) k_iᵀ v_i` for u [H, K]."""
    return (q * k * bonus.to(q.dtype)[..., None, :]).sum(-1, keepdim=True) * v


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    exclusive: bool,
    scale: float,
    state: LinearState | None,
) -> _Terms:
    """Everything in the accumulator dtype, with the scale in q; zeros for a state that is not given."""
    dtype = accumulator_dtype(q.dtype)
    batch, heads = q.shape[:2]
    s = q.new_zeros(batch, heads, q.shape[-1], v.shape[-1], dtype=dtype) if state is None else state.s.to(dtype)
    z = q.new_zeros(batch, heads, q.shape[-1], dtype=dtype) if state is None or state.z is None else state.z.to(dtype)
    to_key = None if decay is None else decay.to(dtype).clamp(min=LEAST_LOG_DECAY).cumsum(2)
    to_query = _shifted(to_key, 2) if exclusive and to_key is not None else to_key
    return _Terms(q.to(dtype) * scale, k.to(dtype), v.to(dtype), to_query, to_key, s, z)


def _shifted(x: Tensor, dim: int) -> Tensor:
    """x one token later along `dim`, with zeros in front."""
    if x.shape[dim] == 0:
        return x
    return torch.cat((torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)), dim)


def _padded(x: Tensor, size: int) -> Tensor:
    """x with zero tokens up to a multiple of `size`: they add nothing to a state."""
    missing = -x.shape[2] % size
    return x if missing == 0 else torch.cat((x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])), 2)


def _cut(x: Tensor, size: int) -> Tensor:
    """[B, H, N, …] as [B, H, chunks, size, …]."""
    return x.unflatten(2, (-1, size))


def _decayed(x: Tensor, log_decay: Tensor | None) -> Tensor:
    """x [..., N, K] times `e^{log_decay}` for log_decay [..., N] or [..., N, K]."""
    if log_decay is None:
        return x
    return x * (log_decay if log_decay.dim() == x.dim() else log_decay[..., None]).exp()


def _allowed(n: int, m: int, exclusive: bool, device: torch.device) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool, device=device).tril(-1 if exclusive else 0)


def _weights(terms: _Terms, causal: bool, exclusive: bool) -> Tensor:
    """`Σ_d q_id k_jd e^{to_query_id − to_key_jd}`, 0 where i may not see j: [..., N, M]."""
    q, k = terms.q, terms.k
    if not causal:
        return q @ k.mT
    allowed = _allowed(q.shape[-2], k.shape[-2], exclusive, q.device)
    if terms.to_query is None or terms.to_key is None:
        return (q @ k.mT).masked_fill(~allowed, 0.0)
    if terms.to_key.dim() == k.dim():
        exponents = terms.to_query[..., :, None, :] - terms.to_key[..., None, :, :]
        kept = exponents.masked_fill(~allowed[..., None], NEG_INF).exp()
        return torch.einsum("...id,...jd,...ijd->...ij", q, k, kept)
    exponents = terms.to_query[..., :, None] - terms.to_key[..., None, :]
    return (q @ k.mT) * exponents.masked_fill(~allowed, NEG_INF).exp()


def _subchunked(terms: _Terms, exclusive: bool, subchunk: int) -> Tensor:
    """`_weights` of chunks with a decay per channel, without ever holding an exponent for every (i, j, d)."""
    q, k, to_query, to_key = terms.q, terms.k, terms.to_query, terms.to_key
    assert to_query is not None
    assert to_key is not None
    size = q.shape[-2]
    rows = []
    for start in range(0, size, subchunk):
        own = slice(start, min(start + subchunk, size))
        block = terms._replace(
            q=q[..., own, :], k=k[..., own, :], to_query=to_query[..., own, :], to_key=to_key[..., own, :]
        )
        row = [_weights(block, True, exclusive), q.new_zeros(*q.shape[:-2], own.stop - start, size - own.stop)]
        if start:
            anchor = to_key[..., start - 1 : start, :]
            left = q[..., own, :] * (to_query[..., own, :] - anchor).exp()
            right = k[..., :start, :] * (anchor - to_key[..., :start, :]).exp()
            row.insert(0, left @ right.mT)
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)


def fold(k: Tensor, v: Tensor, to_key: Tensor | None, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The state after all tokens of k [..., N, K] and v, from the one before; `to_key` is the running log decay."""
    if to_key is None:
        return s + k.mT @ v, z + k.sum(-2)
    if k.shape[-2] == 0:
        return s, z
    total = to_key[:, :, -1:]
    k = _decayed(k, total - to_key)
    kept = total.exp().flatten(2)
    return s * kept[..., None] + k.mT @ v, z * kept + k.sum(-2)


def _states(terms: _Terms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s and z before every chunk, [B, H, chunks, …], and after the last."""
    k, kept = terms.k, None
    if terms.to_key is not None:
        total = terms.to_key[:, :, :, -1:]
        k = _decayed(k, total - terms.to_key)
        kept = total.exp().flatten(3)
    added_s, added_z = k.mT @ terms.v, k.sum(-2)
    s, z = terms.s, terms.z
    before_s, before_z = [], []
    for c in range(k.shape[2]):
        before_s.append(s)
        before_z.append(z)
        if kept is not None:
            s, z = s * kept[:, :, c, :, None], z * kept[:, :, c]
        s, z = s + added_s[:, :, c], z + added_z[:, :, c]
    if not before_s:
        return added_s, added_z, s, z
    return torch.stack(before_s, 2), torch.stack(before_z, 2), s, z
