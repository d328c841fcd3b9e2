"""PyTorch's own fused attention for CPUs, with its edges squared off.

ATen's kernel takes grouped heads and an additive mask and returns the LSE, and its backward accepts any global
(out, lse), so it serves as the engine of one tile as well as of a whole call. Its edges, seen in 2.11 to 2.13: D = Dv
only, causal is aligned top-left and gives NaN for a scale of 0 or less, a row that sees nothing gets LSE 0, no rows or
no keys end the process, and the backward knows no dLSE.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewise.spec import AttentionSpec

NEG_INF = float("-inf")
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def takes_causal(spec: AttentionSpec) -> bool:
    """Whether the restrictions of `spec` are just the kernel's own causal mask."""
    return spec.reach == (None, 0) and spec.mask is None and spec.offset == 0 and spec.scale > 0.0


def widen(x: Tensor, dim: int) -> Tensor:
    """Zero columns up to `dim`: they add nothing to any product."""
    return x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1]))


def carry_dlse(dout: Tensor, out: Tensor, dlse: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """dout and out widened to `dim` so that rowsum(dout∘out), which a fused backward computes by itself, is Δ − dLSE.

    One more column holds 1 in dout and −dLSE in out; v is 0 there, so nothing else changes.
    """
    ones = torch.ones_like(dlse, dtype=dout.dtype)[..., None]
    wide_dout = torch.cat([dout, ones], dim=-1)
    wide_out = torch.cat([out, -dlse.to(out.dtype)[..., None]], dim=-1)
    return widen(wide_dout, dim), widen(wide_out, dim)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    additive: Tensor | None = None,
    causal: bool = False,
    empty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, N, Dv] and lse [B, H, N] (−∞ in rows that see nothing) for N, M ≥ 1.

    `additive` broadcasts to [B, H, N, M], in q's dtype or float32; `causal` allows j ≤ i. `empty` tells the rows in
    which all of `additive` is −∞, where the caller knows them: looking costs a quarter of a small tile's time.
    """
    dim = max(q.shape[-1], v.shape[-1])
    wide = widen(q, dim), widen(k, dim), widen(v, dim)
    out, lse = _forward(*wide, 0.0, causal, attn_mask=additive, scale=scale)
    if additive is not None:
        lse = lse.masked_fill((additive == NEG_INF).all(-1) if empty is None else empty, NEG_INF)
    return out[..., : v.shape[-1]], lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    additive: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of these rows and keys, where out and lse may come from a softmax over more keys than these."""
    dim_v = v.shape[-1]
    dim = max(q.shape[-1], dim_v if dlse is None else dim_v + 1)
    empty = lse == NEG_INF
    if empty.any():
        # Whatever arrives from rows that saw nothing, NaN too, must not reach the others.
        lse, dout = lse.masked_fill(empty, 0.0), dout.masked_fill(empty[..., None], 0.0)
    if dlse is None:
        dout, out = widen(dout, dim), widen(out, dim)
    else:
        dout, out = carry_dlse(dout, out, dlse, dim)
    wide = widen(q, dim), widen(k, dim), widen(v, dim)
    dq, dk, dv = _backward(dout, *wide, out, lse, 0.0, causal, attn_mask=additive, scale=scale)
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., :dim_v]
