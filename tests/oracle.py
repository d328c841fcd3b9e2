"""The float64 oracle: attention exactly as SPEC section 2 says it, N×M and all, sharing no code with the library.

`attention` computes in whatever dtype it is given, so the same formula in float32 or bfloat16 is also "standard
attention in the same dtype", whose error sets the budget (budget.py). Gradients come from autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions(n: int, m: int, q_offset: int | Tensor | None, batch: int) -> Tensor:
    """Row positions p, [B, N]."""
    offset = m - n if q_offset is None else q_offset
    offset = torch.as_tensor(offset).reshape(-1, 1).expand(batch, 1)
    return offset + torch.arange(n)


def allowed(
    n: int,
    m: int,
    batch: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    q_offset: int | Tensor | None = None,
) -> Tensor:
    """Which (row, key) pairs may attend: bool, broadcastable to [B, H, N, M]."""
    p = positions(n, m, q_offset, batch)[:, None, :, None]
    j = torch.arange(m)
    ok = torch.ones(batch, 1, n, m, dtype=torch.bool)
    if causal:
        ok = ok & (j <= p)
    if window is not None:
        left, right = window
        if left is not None:
            ok = ok & (j >= p - left)
        if right is not None:
            ok = ok & (j <= p + right)
    return ok if mask is None else ok & mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative: Tensor | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    keep: Tensor | None = None,
    dropout: float = 0.0,
    q_offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, N, Dv] and lse [B, H, N] of q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, Dv] in q's dtype.

    `keep` [B, H, N, M] is the dropout mask (True = kept); `relative` holds the values [H, 2R+1].
    """
    batch, heads, n, dim = q.shape
    m = k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    s = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias.to(s.dtype)
    distance = positions(n, m, q_offset, batch)[:, :, None] - torch.arange(m)
    if relative is not None:
        radius = relative.shape[1] // 2
        index = distance.clamp(-radius, radius) + radius
        s = s + relative.to(s.dtype)[:, index].transpose(0, 1)
    if alibi is not None:
        slopes = alibi.to(s.dtype).reshape(-1, heads, 1, 1)
        s = s - slopes * distance[:, None].abs()
    ok = allowed(n, m, batch, causal=causal, window=window, mask=mask, q_offset=q_offset)
    s = s.masked_fill(~ok, float("-inf"))
    if sink is not None:
        s = torch.cat([s, sink.to(s.dtype).reshape(1, heads, 1, 1).expand(batch, heads, n, 1)], dim=-1)
    if s.shape[-1] == 0:
        zero = 0.0 * q.sum(-1)
        return zero[..., None].expand(batch, heads, n, v.shape[-1]), zero + float("-inf")
    empty = (s == float("-inf")).all(-1)
    lse = torch.logsumexp(s.masked_fill(empty[..., None], 0.0), dim=-1)
    p = torch.exp(s - lse[..., None]).masked_fill(empty[..., None], 0.0)[..., :m]
    if keep is not None:
        p = p * keep / (1.0 - dropout)
    return p @ v, lse.masked_fill(empty, float("-inf"))


def philox_keep(seed: int, dropout: float, batch: int, heads: int, n: int, m: int) -> Tensor:
    """The dropout mask of SPEC 1.5 from Python integers, element by element: slow, obvious, independent.

    Philox4x32-10 (Salmon et al., 2011), key = (seed mod 2³², seed div 2³²), counter = (j div 4, i, h, b).
    """
    full = 0xFFFFFFFF
    threshold = round(dropout * 2**32)
    keep = torch.empty(batch, heads, n, m, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                for quad in range((m + 3) // 4):
                    c = [quad, i, h, b]
                    key = [seed & full, (seed >> 32) & full]
                    for _ in range(10):
                        x, y = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
                        c = [(y >> 32) ^ c[1] ^ key[0], y & full, (x >> 32) ^ c[3] ^ key[1], x & full]
                        key = [(key[0] + 0x9E3779B9) & full, (key[1] + 0xBB67AE85) & full]
                    for word in range(min(4, m - 4 * quad)):
                        keep[b, h, i, 4 * quad + word] = c[word] >= threshold
    return keep
