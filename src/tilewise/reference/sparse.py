"""Windowed and block-sparse attention as gather + batched matmul: O(N·w) time and memory on any device.

Queries are cut into blocks, and each block is given just the keys it may see, side by side in one tensor. From there on
it is ordinary batched attention on small matrices, so autograd gives the gradient. Forbidden scores inside the gathered
keys are masked, so the result is exact, at every edge.

The gathered K and V are copies (each key appears once for every block that sees it), which is what a fused kernel over
a tile map saves. Sources: Beltagy et al., "Longformer" (2020) for overlapping chunks; Zaheer et al., "Big Bird" (2020)
for gathered blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise import errors
from tilewise.reference.softmax import NEG_INF, Partial, accumulator_dtype, check_block, partial_attention
from tilewise.reference.standard import default_scale, repeat_kv


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, *, scale: float | None = None, block: int = 64
) -> Partial:
    """Attention of q [B, H, N, D] over the keys of k [B, Hkv, M, D], v [B, Hkv, M, Dv] within a window.

    Row i stands at `p = i + M − N` and sees `p − left ≤ j ≤ p + right`. A block of rows at p₀ sees the
    `block + left + right` keys from `p₀ − left`: overlapping chunks of K and V, which are one strided view.

    Args:
        left, right: keys seen to either side, at least 0.
        scale: `1/√D` unless given.
        block: rows of a block. Larger ones copy less of K and V and compute more scores that are then masked.

    Returns:
        out [B, H, N, Dv] and lse [B, H, N], differentiable in q, k and v. Memory is O(N·(block + left + right)).

    Raises ValueError for a negative side or a block below 1.
    """
    for side, reach in (("left", left), ("right", right)):
        if reach < 0:
            raise errors.bad_value(side, reach, "at least 0", "the window is given as distances, not as offsets")
    check_block("block", block)
    q_len, k_len = q.shape[-2], k.shape[-2]
    blocks = math.ceil(q_len / block)
    width = block + left + right
    first = k_len - q_len - left

    def chunks(kv: Tensor) -> Tensor:
        """[B, Hkv, blocks, width, D] of the keys from `first` on, zeros where there are none."""
        needed = (blocks - 1) * block + width
        padded = F.pad(kv, (0, 0, -first, first + needed - k_len))
        return padded.unfold(-2, width, block).mT

    row = torch.arange(block, device=q.device)[:, None]
    column = torch.arange(width, device=q.device)
    in_window = (column >= row) & (column <= row + left + right)
    key = first + block * torch.arange(blocks, device=q.device)[:, None, None] + column
    allowed = in_window & (key >= 0) & (key < k_len)
    if not blocks:
        return _no_rows(q, v)
    return _attend(q, chunks(k), chunks(v), allowed, scale, block)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    block: int,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Partial:
    """Attention of q [B, H, N, D] over chosen blocks of k [B, Hkv, M, D] and v [B, Hkv, M, Dv].

    Args:
        block_index: integers [⌈N/block⌉, n], or [H, ⌈N/block⌉, n] for a pattern a head: row block r sees the key blocks
            `block_index[r]`, in any order; −1 fills up a row that sees fewer than n.
        block: rows and keys of a block; the last of either may be shorter.
        scale: `1/√D` unless given.
        causal: within the chosen blocks row i sees key j only if `j ≤ i + M − N`.

    Returns:
        out [B, H, N, Dv] and lse [B, H, N], differentiable in q, k and v. Memory is O(N·n·block).

    Raises ValueError where the index has another shape, names a block that is not there, or one twice in a row (whose
    keys would count double), TypeError where it does not hold integers.
    """
    check_block("block", block)
    q_len, k_len = q.shape[-2], k.shape[-2]
    blocks, k_blocks = math.ceil(q_len / block), math.ceil(k_len / block)
    _check_index(block_index, q.shape[1], blocks, k_blocks)
    if block_index.ndim == 3:
        k, v = repeat_kv(q, k), repeat_kv(q, v)
    if not blocks:
        return _no_rows(q, v)
    index = block_index.expand(k.shape[1], -1, -1).to(q.device, torch.int64)
    head = torch.arange(k.shape[1], device=q.device)[:, None, None]

    def gathered(kv: Tensor) -> Tensor:
        """[B, Hkv, blocks, n·block, D]: block 0 stands in for what is not there, and is masked."""
        in_blocks = F.pad(kv, (0, 0, 0, max(k_blocks, 1) * block - k_len)).unflatten(-2, (-1, block))
        return in_blocks[:, head, index.clamp(min=0)].flatten(-3, -2)

    key = (index[..., None] * block + torch.arange(block, device=q.device)).flatten(-2)[..., None, :]
    allowed = (key >= 0) & (key < k_len)
    if causal:
        row = torch.arange(blocks * block, device=q.device).reshape(blocks, block, 1)
        allowed = allowed & (key <= row + k_len - q_len)
    return _attend(q, gathered(k), gathered(v), allowed, scale, block)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None, block: int) -> Partial:
    """q [B, H, N, D] against what each block of rows was given: k, v [B, Hkv, blocks, keys, D].

    `allowed` is broadcastable to [Hkv, blocks, block, keys]. The heads that share K and V become rows of one matrix.
    """
    acc_dtype = accumulator_dtype(q.dtype)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    kv_heads, blocks = k.shape[1:3]
    group, q_len = q.shape[1] // kv_heads, q.shape[2]
    in_blocks = F.pad(q, (0, 0, 0, blocks * block - q_len)).unflatten(2, (blocks, block)).unflatten(1, (kv_heads, -1))
    rows = in_blocks.transpose(2, 3).flatten(3, 4)

    s = (rows.to(acc_dtype) @ k.to(acc_dtype).mT * scale).unflatten(3, (group, block))
    s = s.masked_fill(~allowed.unsqueeze(-3), NEG_INF).flatten(3, 4)
    out, lse = partial_attention(s, v)

    def by_head(x: Tensor) -> Tensor:
        """[B, Hkv, blocks, group·block, ...] back to [B, H, N, ...]."""
        return x.unflatten(3, (group, block)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :q_len]

    return Partial(by_head(out), by_head(lse))


def _no_rows(q: Tensor, v: Tensor) -> Partial:
    return Partial(q.new_zeros((*q.shape[:3], v.shape[-1])), q.new_zeros(q.shape[:3], dtype=accumulator_dtype(q.dtype)))


def _check_index(block_index: Tensor, heads: int, blocks: int, k_blocks: int) -> None:
    if block_index.is_floating_point() or block_index.dtype == torch.bool:
        raise errors.bad_type("block_index", str(block_index.dtype), "an integer tensor")
    wanted = f"[{blocks}, n] or [{heads}, {blocks}, n]"
    if block_index.ndim not in (2, 3) or block_index.shape[-2] != blocks:
        raise errors.bad_value("block_index", list(block_index.shape), wanted, "one row for each block of queries")
    if block_index.ndim == 3 and block_index.shape[0] != heads:
        raise errors.bad_value("block_index", list(block_index.shape), wanted, "one pattern for each query head")
    if not block_index.numel():
        return
    if block_index.min() < -1 or block_index.max() >= k_blocks:
        seen = f"{block_index.min().item()} to {block_index.max().item()}"
        raise errors.bad_value("block_index", seen, f"-1 to {k_blocks - 1}")
    ordered = block_index.sort(dim=-1).values
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise errors.bad_value("block_index", "a block twice in one row", "each block at most once")
