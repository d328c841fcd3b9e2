"""Cross-entropy of one chunk of logits in PyTorch: the losses, and the logits turned into their gradient in place."""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.reference.softmax import accumulator_dtype


def softmax_gradient(logits: Tensor, targets: Tensor, ignore_index: int, *, gradient: bool) -> Tensor:
    """Losses `lse − logit[target]` of each row, and softmax − onehot written over the logits.

    Args:
        logits: [T, V], contiguous; afterwards the gradient of the summed losses, if `gradient`.
        targets: [T] int64; a row whose target is `ignore_index` has loss 0 and gradient 0, one whose target is no class
            has loss NaN.
        ignore_index: see there.
        gradient: whether the logits are to be overwritten.

    Returns:
        [T] float32, float64 for float64 logits.
    """
    wide = logits.to(accumulator_dtype(logits.dtype))
    kept = targets != ignore_index
    classes = targets.clamp(0, logits.shape[1] - 1)[:, None]
    lse = torch.logsumexp(wide, 1, keepdim=True)
    losses = (lse - wide.gather(1, classes)).squeeze(1)
    losses = losses.masked_fill((targets < 0) | (targets >= logits.shape[1]), float("nan")).masked_fill(~kept, 0.0)
    if gradient:
        wide = wide.sub_(lse).exp_()
        wide.scatter_add_(1, classes, wide.new_full((), -1.0).expand_as(classes))
        wide.mul_(kept[:, None])
        if wide is not logits:
            logits.copy_(wide)
    return losses
