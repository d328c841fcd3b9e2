"""The delta rule: a token takes out of the state what its key finds there before it writes its own value.

`S_i = α_i (I − β_i k_i k_iᵀ) S_{i−1} + β_i k_i v_iᵀ`, `o_i = q_iᵀ S_i`, with α = e^g a factor a token and head.

Written as `S_i = α_i S_{i−1} + k_i u_iᵀ` with `u_i = β_i (v_i − α_i S_{i−1}ᵀ k_i)`, it is linear attention with a decay
over other values: u, what is new of v. Unrolled over the tokens after a state S, with G the running sum of g, these are
the solution of a unit lower triangular system (the WY representation of a product of Householder matrices, in its UT
form):

    (I + tril(diag(β) (K Kᵀ ∘ Γ), −1)) U = diag(β) (V − diag(e^G) K S),    Γ_ij = e^{G_i − G_j}

Sources: Schlag et al., "Linear transformers are secretly fast weight programmers" (2021); Yang et al., "Parallelizing
linear transformers with the delta rule" (2024) for the chunks; Yang et al., "Gated delta networks" (2024) for α.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.reference.softmax import NEG_INF


def new_values(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """`U = fresh − known @ S` for any state S before the first token: the two solutions of the triangular system.

    Args:
        k: [..., N, K].
        v: [..., N, Dv].
        beta: [..., N].
        log_decay: G [..., N], the running sum up to and with each token.

    Returns:
        fresh [..., N, Dv] and known [..., N, K].
    """
    weights, seen = k @ k.mT, k
    if log_decay is not None:
        above = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu(1)
        exponents = log_decay[..., :, None] - log_decay[..., None, :]
        weights, seen = weights * exponents.masked_fill(above, NEG_INF).exp(), k * log_decay[..., None].exp()
    system = (beta[..., None] * weights).tril(-1)
    right = beta[..., None] * torch.cat((v, seen), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    fresh, known = solved.split((v.shape[-1], k.shape[-1]), -1)
    return fresh, known


def chunk_states(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The states before every chunk [B, H, chunks, K, Dv], U [B, H, chunks, size, Dv], and the state after the last.

    Args:
        k: [B, H, chunks, size, K].
        v: [B, H, chunks, size, Dv].
        beta: [B, H, chunks, size].
        log_decay: G of each chunk by itself, [B, H, chunks, size].
        s: [B, H, K, Dv], the state before the first token.
    """
    fresh, known = new_values(k, v, beta, log_decay)
    kept = None
    if log_decay is not None:
        total = log_decay[..., -1:]
        k, kept = k * (total - log_decay)[..., None].exp(), total[..., None].exp()
    states, values = [], []
    for c in range(k.shape[2]):
        states.append(s)
        values.append(fresh[:, :, c] - known[:, :, c] @ s)
        added = k[:, :, c].mT @ values[-1]
        s = added + (s if kept is None else kept[:, :, c] * s)
    if not states:
        return k.mT @ v, v, s
    return torch.stack(states, 2), torch.stack(values, 2), s
