"""Softmax three ways: three passes over a row, one online pass, and the merge of two partial results.

All three compute, along the last dim, `softmax(x)_j = e^(x_j − m) / Σ_k e^(x_k − m)` with `m = max x`, which no logit
can overflow. An entry of −∞ is a forbidden one. A row in which all is forbidden is *empty*: its probabilities and
output are 0, its `lse` is −∞, and nothing in this file forms `−∞ + ∞`, so neither values nor gradients are ever NaN.

Throughout, `m` is a constant to autograd: the results do not depend on the shift, so neither do their derivatives.

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018) for the online pass; Rabe & Staats,
"Self-attention does not need O(n²) memory" (2021) and Dao et al., "FlashAttention" (2022) for its use on attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise import errors

NEG_INF = float("-inf")


class Partial(NamedTuple):
    """Attention over some of the keys: all that another part needs in order to be merged with it."""

    out: Tensor
    """[..., Dv]: `Σ_j softmax(x)_j v_j`; 0 where the row is empty."""
    lse: Tensor
    """[...]: `ln Σ_j e^(x_j)`; −∞ where the row is empty."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores, sums and statistics are float32, except for float64 inputs, which stay float64 throughout."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_max(x: Tensor) -> Tensor:
    """`m` [...] of x [..., M], detached; −∞ for an empty row, also when M is 0."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], NEG_INF)
    return x.detach().amax(dim=-1)


def shift_of(m: Tensor) -> Tensor:
    """What to subtract before `exp`: `m`, but 0 for an empty row: `e^(−∞ − 0)` is 0, where `e^(−∞ + ∞)` is NaN."""
    return m.masked_fill(m == NEG_INF, 0.0)


def finish(m: Tensor, l: Tensor, acc: Tensor) -> Partial:
    """The result `(acc / l, m + ln l)` of a running max m [...], running sum l [...] and accumulator acc [..., Dv]."""
    empty = l == 0
    l_safe = l.masked_fill(empty, 1.0)
    return Partial(acc / l_safe[..., None], (m + l_safe.log()).masked_fill(empty, NEG_INF))


def safe_softmax(x: Tensor) -> Tensor:
    """Three-pass softmax of x [..., M]: one pass for the max, one for the sum, one to normalise.

    Half-precision input is worked on in float32 and rounded once, at the end.
    """
    s = x.to(accumulator_dtype(x.dtype))
    m = row_max(s)
    p = (s - shift_of(m)[..., None]).exp()
    l = p.sum(dim=-1)
    return (p / l.masked_fill(l == 0, 1.0)[..., None]).to(x.dtype)


def online_step(m: Tensor, l: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Takes a further block x [..., block] into the running max and sum [...].

    `m' = max(m, max x)` and `l' = l·e^(m−m') + Σ e^(x−m')`.
    """
    m_new = torch.maximum(m, row_max(x))
    shift = shift_of(m_new)
    return m_new, l * (m - shift).exp() + (x - shift[..., None]).exp().sum(dim=-1)


def online_softmax(x: Tensor, block: int = 64) -> Tensor:
    """Softmax of x [..., M] whose max and sum come from one pass over blocks; a second pass writes the result.

    Raises ValueError for `block < 1`.
    """
    check_block("block", block)
    s = x.to(accumulator_dtype(x.dtype))
    m = s.new_full(s.shape[:-1], NEG_INF)
    l = s.new_zeros(s.shape[:-1])
    for s_block in s.split(block, dim=-1):
        m, l = online_step(m, l, s_block)
    p = (s - shift_of(m)[..., None]).exp()
    return (p / l.masked_fill(l == 0, 1.0)[..., None]).to(x.dtype)


def online_attention(x: Tensor, v: Tensor, block: int = 64) -> Partial:
    """`softmax(x) v` in truly one pass, for scores x [..., N, M] and values v [..., M, Dv].

    The probabilities are not wanted here, only their sum with v, so nothing has to be visited twice: `acc` is rescaled
    by `e^(m−m')` together with `l`. This loop, over tiles of keys, is FlashAttention.

    Raises ValueError for `block < 1`.
    """
    check_block("block", block)
    s, v_acc = x.to(accumulator_dtype(x.dtype)), v.to(accumulator_dtype(v.dtype))
    m = s.new_full(s.shape[:-1], NEG_INF)
    l = s.new_zeros(s.shape[:-1])
    acc = s.new_zeros((*torch.broadcast_shapes(s.shape[:-2], v.shape[:-2]), s.shape[-2], v.shape[-1]))
    for start in range(0, s.shape[-1], block):
        s_block = s[..., start : start + block]
        m_new, l = online_step(m, l, s_block)
        shift = shift_of(m_new)
        p = (s_block - shift[..., None]).exp()
        acc = acc * (m - shift).exp()[..., None] + p @ v_acc[..., start : start + block, :]
        m = m_new
    out, lse = finish(m, l, acc)
    return Partial(out.to(v.dtype), lse)


def partial_attention(x: Tensor, v: Tensor) -> Partial:
    """`softmax(x) v` and its `lse` in one piece, for scores x [..., N, M] and values v [..., M, Dv]."""
    s = x.to(accumulator_dtype(x.dtype))
    m = row_max(s)
    p = (s - shift_of(m)[..., None]).exp()
    out, lse = finish(m, p.sum(dim=-1), p @ v.to(s.dtype))
    return Partial(out.to(v.dtype), lse)


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Partial:
    """Joins attention over two disjoint sets of keys into attention over both.

    `lse = ln(e^lse1 + e^lse2)` and `out = o1·e^(lse1−lse) + o2·e^(lse2−lse)`, for o1, o2 [..., Dv] and lse1, lse2
    [...], each broadcastable to the other. Associative and commutative, with `(0, −∞)` as the neutral element: tiles,
    split-KV decoding, pages, ring steps and sinks are all this one operation. Two −∞ give 0 and −∞.

    The work is done in the wider of the dtypes given; `out` has o1's dtype and `lse` lse1's.
    """
    wide = torch.promote_types(torch.promote_types(o1.dtype, o2.dtype), torch.promote_types(lse1.dtype, lse2.dtype))
    lse1_wide, lse2_wide = lse1.to(wide), lse2.to(wide)
    m = torch.maximum(lse1_wide.detach(), lse2_wide.detach())
    shift = shift_of(m)
    w1, w2 = (lse1_wide - shift).exp(), (lse2_wide - shift).exp()
    out, lse = finish(m, w1 + w2, o1.to(wide) * w1[..., None] + o2.to(wide) * w2[..., None])
    return Partial(out.to(o1.dtype), lse.to(lse1.dtype))


def merge_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Partial:
    """Adds the learnable sink [H] to attention out [..., H, N, Dv], lse [..., H, N]: it is the partial `(0, sink)`.

    Once per row, however many parts the keys came in. Differentiable in all three.
    """
    return merge(out, lse, torch.zeros_like(out[..., :1, :]), sink[:, None].expand(lse.shape))


def check_block(argument: str, block: int) -> None:
    if block < 1:
        raise errors.bad_value(argument, block, "at least 1")
