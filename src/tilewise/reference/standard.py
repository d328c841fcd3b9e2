"""Standard attention, whole and as six separate steps: `O = softmax(QKᵀ·scale) V` with every score in memory.

`S` and `P` are `[B, H, N, M]` each. This is what everything else must equal, and what it has to beat.

Source: Vaswani et al., "Attention is all you need" (2017), equation 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tilewise.reference.counters import Chip, Counters
from tilewise.reference.softmax import NEG_INF, Partial, accumulator_dtype, partial_attention, row_max, shift_of


def causal_allowed(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """Boolean [n, m], True where row i may see key j: `j ≤ i + m − n`, so that the last row sees every key."""
    i = torch.arange(n, device=device)[:, None]
    j = torch.arange(m, device=device)[None, :]
    return j <= i + m - n


def default_scale(head_dim: int) -> float:
    """`1/√D`, which keeps the variance of the scores at that of q and k."""
    return 1.0 / math.sqrt(head_dim)


def repeat_kv(q: Tensor, kv: Tensor) -> Tensor:
    """kv [B, Hkv, M, D] with each head repeated for the `H / Hkv` query heads of q [B, H, N, D] that share it."""
    group = q.shape[1] // kv.shape[1]
    return kv if group == 1 else kv.repeat_interleave(group, dim=1)


def scores(q: Tensor, k: Tensor, scale: float, allowed: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Step 1, `S = QKᵀ·scale + bias`, −∞ where not allowed. [B, H, N, M] in the accumulator dtype."""
    acc_dtype = accumulator_dtype(q.dtype)
    s = q.to(acc_dtype) @ repeat_kv(q, k).to(acc_dtype).mT * scale
    if bias is not None:
        s = s + bias.to(acc_dtype)
    return s if allowed is None else s.masked_fill(~allowed, NEG_INF)


def max_of_rows(s: Tensor) -> Tensor:
    """Step 2, `m = rowmax S`: [B, H, N], −∞ for a row that sees nothing. A constant to autograd."""
    return row_max(s)


def exponentials(s: Tensor, m: Tensor) -> Tensor:
    """Step 3, `e^(S − m)`: [B, H, N, M], 0 wherever S is −∞."""
    return (s - shift_of(m)[..., None]).exp()


def sum_of_rows(p: Tensor) -> Tensor:
    """Step 4, `l = rowsum e^(S − m)`: [B, H, N], 0 for a row that sees nothing."""
    return p.sum(dim=-1)


def normalize(p: Tensor, l: Tensor) -> Tensor:
    """Step 5, `P = e^(S − m) / l`: [B, H, N, M]."""
    return p / l.masked_fill(l == 0, 1.0)[..., None]


def times_v(p: Tensor, v: Tensor) -> Tensor:
    """Step 6, `O = PV` for v [B, Hkv, M, Dv]: [B, H, N, Dv] in v's dtype."""
    return (p @ repeat_kv(p, v).to(p.dtype)).to(v.dtype)


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
) -> Partial:
    """Attention of q [B, H, N, D] over k [B, Hkv, M, D] and v [B, Hkv, M, Dv].

    Args:
        scale: `1/√D` unless given.
        causal: row i sees key j only if `j ≤ i + M − N`.
        allowed: boolean, True = attend, broadcastable to [B, H, N, M].
        bias: added to the scaled scores, broadcastable to [B, H, N, M].

    Returns:
        out [B, H, N, Dv] in v's dtype and lse [B, H, N] in float32 (float64 for float64 inputs). A row that may see
        nothing gives 0 and −∞. Differentiable in q, k, v and bias, through both results.
    """
    allowed = both(allowed, causal_allowed(q.shape[-2], k.shape[-2], q.device) if causal else None)
    s = scores(q, k, default_scale(q.shape[-1]) if scale is None else scale, allowed, bias)
    return partial_attention(s, repeat_kv(q, v))


def six_step_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Partial, Counters]:
    """`standard_attention` as six separate steps, each of which reads its input from HBM and writes its result there.

    On a GPU these are six kernels, six trips through HBM: the N×M matrix is written three times and read five times.
    The counts take the six steps alone, on q, k, v and what they hand on: not the mask, not the bias, and not
    `lse = m + ln l`, which no step needs.
    """
    allowed = both(allowed, causal_allowed(q.shape[-2], k.shape[-2], q.device) if causal else None)
    k, v = repeat_kv(q, k), repeat_kv(q, v)

    chip = Chip(q.dtype, programs=q.shape[0] * q.shape[1])
    s = scores(q, k, default_scale(q.shape[-1]) if scale is None else scale, allowed, bias)
    m = max_of_rows(s)
    e = exponentials(s, m)
    l = sum_of_rows(e)
    p = normalize(e, l)
    out = times_v(p, v)

    for read, written in [((q, k), s), ((s,), m), ((s, m), e), ((e,), l), ((e, l), p), ((p, v), out)]:
        for tensor in read:
            chip.read(tensor)
        chip.write(written)
    chip.multiply(s, depth=q.shape[-1])
    chip.multiply(out, depth=k.shape[-2])
    return Partial(out, lse_of(m, l)), chip.counters


def lse_of(m: Tensor, l: Tensor) -> Tensor:
    """`m + ln l`, −∞ for an empty row, without ever taking the logarithm of 0."""
    empty = l == 0
    return (m + l.masked_fill(empty, 1.0).log()).masked_fill(empty, NEG_INF)


def both(allowed: Tensor | None, also: Tensor | None) -> Tensor | None:
    """The conjunction of two optional masks."""
    if allowed is None or also is None:
        return also if allowed is None else allowed
    return allowed & also
