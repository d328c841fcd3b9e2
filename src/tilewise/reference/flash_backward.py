"""FlashAttention backward by recomputation, as tile loops that one can read, and that count what they do.

Nothing N×M was kept: from `q, k, v, out, lse` and the gradients `dout` of out and `dlse` of lse, a tile of P comes back
as `p = e^(s − lse)` in one step, with no running max, because the final denominator is known. Then

    delta = rowsum(dout ∘ out) − dlse      one number a row, found beforehand
    dv    = pᵀ dout
    dp    = dout vᵀ
    ds    = p ∘ (dp − delta)               the softmax Jacobian, diag(p) − p pᵀ, applied to dp; and dlse through p
    dq    = ds k · scale
    dk    = dsᵀ q · scale

`rowsum(dp ∘ p) = dout · Σ_j p_j v_j = dout · out`, which is why delta needs no tile of P.

K, V tiles are outside, so that dk and dv stay on chip; dq is added to in HBM at every step (atomics, on a GPU), in the
accumulator dtype, and scaled and rounded at the end. Query heads that share a K, V head are one more inner loop, so
their contributions are summed on chip too.

Sources: Dao et al., "FlashAttention" (2022), appendix B.2; Dao, "FlashAttention-2" (2023), algorithm 2.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.reference.counters import Chip, Counters
from tilewise.reference.flash import tile_mask, tiles
from tilewise.reference.softmax import NEG_INF, check_block
from tilewise.reference.standard import default_scale


class InputGradients(NamedTuple):
    """Shapes and dtypes as the inputs'."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


@torch.no_grad()
def flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    allowed: Tensor | None = None,
    block_m: int = 64,
    block_n: int = 64,
) -> tuple[InputGradients, Counters]:
    """Gradients of attention from its inputs, its results and their gradients.

    Args:
        q, k, v: [B, H, N, D], [B, Hkv, M, D], [B, Hkv, M, Dv].
        out, lse: what the forward returned, [B, H, N, Dv] and [B, H, N].
        dout, dlse: gradients of the loss by them; no dlse is a dlse of 0.
        scale, causal, allowed, block_m, block_n: as in the forward (the blocks need not be the same).

    Returns:
        dq, dk, dv, and the counters. A row that saw nothing (lse −∞) contributes exactly 0.
    """
    check_block("block_m", block_m)
    check_block("block_n", block_n)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    batch, kv_heads, k_len, _ = k.shape
    group, q_len = q.shape[1] // kv_heads, q.shape[2]
    chip = Chip(q.dtype, programs=batch * kv_heads)

    by_group = (kv_heads, group)
    whole = None if allowed is None else allowed.expand(batch, q.shape[1], q_len, k_len).unflatten(1, by_group)
    q, out, dout, lse = (x.unflatten(1, by_group) for x in (q, out, dout, lse))
    masks = [tile_mask(q[:, :, g], k, causal, None if whole is None else whole[:, :, g]) for g in range(group)]

    delta = torch.empty_like(lse)
    for g, rows in product(range(group), tiles(q_len, block_m)):
        out_i = chip.load(out[:, :, g, rows])
        dout_i = chip.load(dout[:, :, g, rows])
        delta_i = (dout_i * out_i).sum(dim=-1)
        if dlse is not None:
            delta_i = delta_i - chip.load(dlse.unflatten(1, by_group)[:, :, g, rows])
        chip.store(delta[:, :, g, rows], delta_i)

    dq_acc = torch.zeros_like(q, dtype=chip.acc_dtype)
    chip.write(dq_acc)
    dk, dv = torch.empty_like(k), torch.empty_like(v)

    for cols in tiles(k_len, block_n):
        k_j = chip.load(k[:, :, cols])
        v_j = chip.load(v[:, :, cols])
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)

        for g, rows in product(range(group), tiles(q_len, block_m)):
            if masks[g].skips(rows, cols):
                chip.skip()
                continue
            q_i = chip.load(q[:, :, g, rows])
            dout_i = chip.load(dout[:, :, g, rows])
            lse_i = chip.load(lse[:, :, g, rows])
            delta_i = chip.load(delta[:, :, g, rows])

            s = chip.matmul(q_i, k_j.mT) * scale
            s = masks[g].apply(chip, s, rows, cols)
            # An empty row has s = lse = −∞; subtracting +∞ instead makes its p an exact 0.
            p = (s - lse_i.masked_fill(lse_i == NEG_INF, -NEG_INF)[..., None]).exp()
            dv_j += chip.matmul(p.mT, dout_i)
            dp = chip.matmul(dout_i, v_j.mT)
            ds = p * (dp - delta_i[..., None])
            dk_j += chip.matmul(ds.mT, q_i)
            dq_i = chip.load(dq_acc[:, :, g, rows]) + chip.matmul(ds, k_j)
            chip.store(dq_acc[:, :, g, rows], dq_i)

            chip.hold((q_i, k_j, v_j, dout_i), (s, p, dp, ds, dq_i, dk_j, dv_j), (lse_i, delta_i))
            chip.visit()

        chip.store(dk[:, :, cols], dk_j * scale)
        chip.store(dv[:, :, cols], dv_j)

    dq = torch.empty_like(q)
    for g, rows in product(range(group), tiles(q_len, block_m)):
        chip.store(dq[:, :, g, rows], chip.load(dq_acc[:, :, g, rows]) * scale)
    return InputGradients(dq.flatten(1, 2), dk, dv), chip.counters
