"""Cross-entropy of one chunk of logits: losses, and the gradient written over the logits.

What: for each row of logits [T, V], lse − logit[target] and, in place, softmax − onehot. Bound by memory: the logits
are read twice and written once, and the second reading often comes from L2.
Ownership: one program has one row and walks it in blocks of BLOCK columns, twice.
Registers: BLOCK partial maxima and sums, one pair for each lane of the block, so that the walk needs no reduction; they
are reduced once, between the walks. No shared memory beyond that reduction's.
Order: the target's logit is read by itself; walk one gathers the online softmax; walk two writes the gradient.
A row whose target is `ignore` has loss 0 and gradient 0; one whose target is no class has loss NaN.
Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018). That the gradient takes the logits'
place, so that a chunk is all that ever exists of them, is from Hsu et al., Liger kernel (2024).
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.backends.triton.configs import Tile
from tilewise.backends.triton.launch import launch

LARGEST_BLOCK = 4096
"""Columns of a block: eight warps hold 16 partial results a thread."""


@triton.jit(do_not_specialize=["ignore", "columns"])
def cross_entropy(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    ignore: tl.int64,
    columns: tl.int32,
    stride_row: tl.int64,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """losses [T]; with GRADIENT logits [T, columns] become softmax − onehot, 0 where the target is `ignore`."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride_row
    target = tl.load(targets_ptr + row)
    # Read before the reductions, behind which a faster warp already overwrites the row.
    known = (target >= 0) & (target < columns)
    chosen = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        cols = start + lanes
        x = tl.load(logits + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        # A lane that has seen nothing but −∞ must not form −∞ + ∞.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - base) + tl.exp(x - base)
        largest = higher
    peak = tl.max(largest, 0)
    total = tl.sum(total * tl.exp(largest - peak), 0)
    lse = peak + tl.log(total)
    kept = target != ignore
    tl.store(losses_ptr + row, tl.where(kept, lse - chosen, 0.0))
    if GRADIENT:
        for start in range(0, columns, BLOCK):
            cols = start + lanes
            x = tl.load(logits + cols, mask=cols < columns, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - lse) - tl.where(cols == target, 1.0, 0.0)
            tl.store(logits + cols, tl.where(kept, p, 0.0).to(logits_ptr.dtype.element_ty), mask=cols < columns)


class Remembered(NamedTuple):
    """A plan as `launch` asks for it: all follows from dtypes, strides and flags."""

    plain: bool
    compiled: dict[Any, Any]


_REMEMBERED: dict[torch.dtype, Remembered] = {}


def softmax_gradient(logits: Tensor, targets: Tensor, ignore_index: int, *, gradient: bool) -> Tensor:
    """`backends.cross_entropy.softmax_gradient` for float32, float16 and bfloat16, on the current device."""
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses
    targets = targets.contiguous()
    block = min(LARGEST_BLOCK, triton.next_power_of_2(columns))
    launch(
        cross_entropy,
        rows,
        _REMEMBERED.setdefault(logits.dtype, Remembered(True, {})),
        (logits, targets, losses),
        (logits, targets, losses, ignore_index, columns, logits.stride(0)),
        (block, gradient),
        Tile(0, 0, max(1, min(8, block // 512)), 1),
    )
    return losses
