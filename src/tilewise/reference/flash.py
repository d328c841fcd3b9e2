"""FlashAttention forward, versions 1 and 2, as tile loops that one can read, and that count what they do.

Both never hold more of the scores than one tile `s` [block_m, block_n], and both keep the softmax online: a running
max `m`, a running sum `l` and an output `acc` that is rescaled by `alpha = e^(m − m')` whenever the max may have moved
(softmax.py). They differ in which loop is outside, and therefore in what has to go back to HBM:

                        version 1                            version 2
    outer loop          K, V tiles                           Q tiles (in parallel on a GPU)
    inner loop          Q tiles                              K, V tiles
    kept on chip        k_j, v_j                             q_i, acc, m, l
    HBM at every step   reads q_i, O, m, l; writes O, m, l   reads k_j, v_j
    divides by l        at every step                        once a row

Batch and heads are the leading dims of every tensor here; a GPU runs them, and version 2's outer loop, side by side.

Sources: Dao et al., "FlashAttention" (2022), algorithm 1; Dao, "FlashAttention-2" (2023), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.reference.counters import Chip, Counters
from tilewise.reference.softmax import NEG_INF, Partial, check_block, finish, row_max, shift_of
from tilewise.reference.standard import default_scale, lse_of, repeat_kv


def tiles(length: int, block: int) -> Iterator[slice]:
    """The slices of `block` that cover `range(length)`; the last one may be shorter."""
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


@dataclass(frozen=True, slots=True)
class TileMask:
    """Which scores count: those not right of the diagonal, if causal, and those of `allowed`, if given."""

    causal: bool
    diagonal: int
    """`M − N`: row i sees keys up to `i + diagonal`."""
    allowed: Tensor | None
    """Boolean [B, H, N, M], an expanded view where the caller's was broadcastable."""

    def skips(self, rows: slice, cols: slice) -> bool:
        """True if not even the last row of the tile may see its first key."""
        return self.causal and cols.start > rows.stop - 1 + self.diagonal

    def apply(self, chip: Chip, s: Tensor, rows: slice, cols: slice) -> Tensor:
        """s [B, H, rows, cols] with −∞ where a row may not see a key."""
        crosses_diagonal = cols.stop - 1 > rows.start + self.diagonal
        if self.causal and crosses_diagonal:
            i = torch.arange(rows.start, rows.stop, device=s.device)[:, None]
            j = torch.arange(cols.start, cols.stop, device=s.device)[None, :]
            s = s.masked_fill(j > i + self.diagonal, NEG_INF)
        if self.allowed is not None:
            s = s.masked_fill(~chip.load(self.allowed[..., rows, cols]), NEG_INF)
        return s


def tile_mask(q: Tensor, k: Tensor, causal: bool, allowed: Tensor | None) -> TileMask:
    """The mask of q [B, H, N, D] against k [B, Hkv, M, D], with `allowed` broadcast to [B, H, N, M]."""
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[-2]
    whole = None if allowed is None else allowed.expand(batch, heads, q_len, k_len)
    return TileMask(causal, k_len - q_len, whole)


@torch.no_grad()
def flash_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    allowed: Tensor | None = None,
    block_m: int = 64,
    block_n: int = 64,
    chip: Chip | None = None,
) -> tuple[Partial, Counters]:
    """FlashAttention-1: K, V tiles outside, Q tiles inside, and O, m, l read and written in HBM at every step.

    Args:
        q, k, v: [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, Dv].
        scale: `1/√D` unless given.
        causal: row i sees key j only if `j ≤ i + M − N`; tiles that see nothing are skipped.
        allowed: boolean, True = attend, broadcastable to [B, H, N, M].
        block_m, block_n: rows of a Q tile and of a K, V tile.
        chip: what counts; a subclass of `Chip` can watch every step.

    Returns:
        out [B, H, N, Dv] in q's dtype with lse [B, H, N], and the counters. O waits in HBM in the accumulator dtype,
        as rounding it at every step would add an error a tile.
    """
    check_block("block_m", block_m)
    check_block("block_n", block_n)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    mask = tile_mask(q, k, causal, allowed)
    k, v = repeat_kv(q, k), repeat_kv(q, v)
    batch, heads, q_len, _ = q.shape
    chip = Chip(q.dtype, programs=batch * heads) if chip is None else chip

    out = q.new_zeros((batch, heads, q_len, v.shape[-1]), dtype=chip.acc_dtype)
    m = q.new_full((batch, heads, q_len), NEG_INF, dtype=chip.acc_dtype)
    l = q.new_zeros((batch, heads, q_len), dtype=chip.acc_dtype)
    for start_value in (out, m, l):
        chip.write(start_value)

    for cols in tiles(k.shape[-2], block_n):
        k_j = chip.load(k[:, :, cols])
        v_j = chip.load(v[:, :, cols])

        for rows in tiles(q_len, block_m):
            if mask.skips(rows, cols):
                chip.skip()
                continue
            q_i = chip.load(q[:, :, rows])
            out_i = chip.load(out[:, :, rows])
            m_i = chip.load(m[:, :, rows])
            l_i = chip.load(l[:, :, rows])

            s = chip.matmul(q_i, k_j.mT) * scale
            s = mask.apply(chip, s, rows, cols)
            m_new = torch.maximum(m_i, row_max(s))
            shift = shift_of(m_new)
            p = (s - shift[..., None]).exp()
            alpha = (m_i - shift).exp()
            l_new = l_i * alpha + p.sum(dim=-1)

            # What waits in HBM is divided by the old l already, so the old l has to be multiplied back in.
            acc = out_i * (l_i * alpha)[..., None] + chip.matmul(p, v_j)
            out_new, _ = finish(m_new, l_new, acc)
            chip.store(out[:, :, rows], out_new)
            chip.store(m[:, :, rows], m_new)
            chip.store(l[:, :, rows], l_new)

            chip.hold((q_i, k_j, v_j), (s, p, acc), (m_new, l_new))
            chip.visit(rescalings=1, divisions=1)

    return Partial(out.to(q.dtype), lse_of(m, l)), chip.counters


@torch.no_grad()
def flash_v2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    allowed: Tensor | None = None,
    block_m: int = 64,
    block_n: int = 64,
    chip: Chip | None = None,
) -> tuple[Partial, Counters]:
    """FlashAttention-2: Q tiles outside, K, V tiles inside; O stays on chip and is divided by l once, at the end.

    Arguments and results as `flash_v1`. Each query head reads the K and V of its own: what a cache saves when heads or
    Q tiles share them is not counted.
    """
    check_block("block_m", block_m)
    check_block("block_n", block_n)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    mask = tile_mask(q, k, causal, allowed)
    k, v = repeat_kv(q, k), repeat_kv(q, v)
    batch, heads, q_len, _ = q.shape
    chip = Chip(q.dtype, programs=batch * heads) if chip is None else chip

    out = q.new_empty((batch, heads, q_len, v.shape[-1]))
    lse = q.new_empty((batch, heads, q_len), dtype=chip.acc_dtype)

    for rows in tiles(q_len, block_m):
        q_i = chip.load(q[:, :, rows])
        m = lse.new_full(q_i.shape[:-1], NEG_INF)
        l = lse.new_zeros(q_i.shape[:-1])
        acc = lse.new_zeros((*q_i.shape[:-1], v.shape[-1]))

        for cols in tiles(k.shape[-2], block_n):
            if mask.skips(rows, cols):
                chip.skip()
                continue
            k_j = chip.load(k[:, :, cols])
            v_j = chip.load(v[:, :, cols])

            s = chip.matmul(q_i, k_j.mT) * scale
            s = mask.apply(chip, s, rows, cols)
            m_new = torch.maximum(m, row_max(s))
            shift = shift_of(m_new)
            p = (s - shift[..., None]).exp()
            alpha = (m - shift).exp()
            l = l * alpha + p.sum(dim=-1)
            acc = acc * alpha[..., None] + chip.matmul(p, v_j)
            m = m_new

            chip.hold((q_i, k_j, v_j), (s, p, acc), (m, l))
            chip.visit(rescalings=1)

        out_i, lse_i = finish(m, l, acc)
        chip.divide()
        chip.store(out[:, :, rows], out_i)
        chip.store(lse[:, :, rows], lse_i)

    return Partial(out, lse), chip.counters
