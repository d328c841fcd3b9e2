"""Feature maps φ of linear attention: `φ(q)·φ(k)` takes the place of `e^{q·k/√D}`.

Each takes [..., D] and returns features in the same dtype. Sources beside each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TAYLOR_LIMIT = 32
"""The largest head dim for `taylor`, which has 1 + D + D² features."""


def elu(x: Tensor) -> Tensor:
    """`elu(x) + 1`, positive (Katharopoulos et al., 2020). [..., D]."""
    return F.elu(x) + 1.0


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`. [..., D]; a token may have no positive feature at all."""
    return F.relu(x)


def identity(x: Tensor) -> Tensor:
    """x itself, as in RetNet, GLA and RWKV."""
    return x


def taylor(x: Tensor) -> Tensor:
    """The second-order Taylor expansion of the exponential (Arora et al., "Simple linear attention", 2024).

    `φ(q)·φ(k) = 1 + s + s²/2` for `s = q·k/√D`. [..., 1 + D + D²].
    """
    x = x * x.shape[-1] ** -0.25
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2.0)
    return torch.cat((torch.ones_like(x[..., :1]), x, squares), -1)


FIXED = {"elu": elu, "relu": relu, "identity": identity, "taylor": taylor}
"""Maps without parameters, by name."""


def random_projection(
    features: int, dim: int, *, orthogonal: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Gaussian directions ω [features, dim] in float64 (Choromanski et al., "Rethinking attention with performers").

    Orthogonal ones come in blocks of `dim` rows of a random rotation, each with the length of a Gaussian vector, which
    lowers the variance and keeps the estimate unbiased.
    """
    device = None if generator is None else generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, device=device)

    if not orthogonal:
        return normal(features, dim)
    blocks = []
    for _ in range(-(-features // dim)):
        q, r = torch.linalg.qr(normal(dim, dim))
        blocks.append((q * r.diagonal().sign()).mT)  # the signs that make q uniform among rotations and reflections
    return torch.cat(blocks)[:features] * normal(features, dim).norm(dim=-1, keepdim=True)


def favor_logs(x: Tensor, projection: Tensor) -> Tensor:
    """Logs of FAVOR+'s positive features: `ω·x' − |x'|²/2` for `x' = x·D^{−1/4}`. [..., features], float32 or float64.

    The mean over ω of `φ(q)·φ(k)` is `e^{q·k/√D}`. The factor `1/√features` cancels in the normalised output.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25
    return x @ projection.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2


def stabilised_queries(logs: Tensor) -> Tensor:
    """e^{logs} with each row's largest feature 1: a factor of the row, which cancels when it is normalised."""
    return (logs - logs.detach().amax(-1, keepdim=True)).exp()


def stabilised_keys(logs: Tensor, causal: bool, shift: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Key features of at most 1, and what that does to the sums over them.

    All keys that one query sees must be lowered by the same amount. Causally, that is the largest log so far, c_j,
    which no later token changes: lowering what is summed already from c_{j−1} to c_j is a decay.

    Args:
        logs: [B, H, M, K].
        causal: lower by the running maximum, not by the maximum of all.
        shift: [B, H] of the state that came before, or None.

    Returns:
        features [B, H, M, K]; the log decay [B, H, M] (None where not causal); the new shift [B, H].
    """
    largest = logs.detach().amax(-1)
    if not causal:
        last = largest.amax(-1) if shift is None else torch.maximum(largest.amax(-1), shift)
        return (logs - last[..., None, None]).exp(), None, last
    first = shift
    if first is None:
        first = largest[..., 0] if largest.shape[-1] else largest.new_full(largest.shape[:-1], -math.inf)
    running = torch.cummax(torch.cat((first[..., None], largest), -1), -1).values
    return (logs - running[..., 1:, None]).exp(), running[..., :-1] - running[..., 1:], running[..., -1]
