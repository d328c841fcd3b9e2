"""FlashAttention-1's loop order as one kernel, the second rung of the ladder that the lab climbs.

K and V tiles outside, Q tiles inside, as in `reference.flash.flash_v1` with the same names: one program owns one head,
holds a K and a V tile on chip while it walks all Q tiles, and reads and writes O, m and l in HBM at every step. Nothing
is N×M, but O goes through HBM once a K tile, and there is no more parallelism than heads and batch. FlashAttention-2
(`forward.py`) turns the loops around. Dao et al., FlashAttention (2022), algorithm 1.

Forward only; nothing in the library calls it but the lab and the benchmark.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N = 64, 64


@triton.jit
def v1_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    m_ptr,
    l_ptr,
    n,
    m_len,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One head. O waits in HBM in float32, since rounding it at every step would add an error a tile."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    v_dims = tl.arange(0, BLOCK_DV)
    for start_n in range(0, m_len, BLOCK_N):
        cols = start_n + tl.arange(0, BLOCK_N)
        near = (cols < m_len)[:, None]
        k_j = tl.load(k_ptr + (head * m_len + cols[:, None]) * D + dims[None, :], near & (dims < D)[None, :], 0.0)
        v_at = v_ptr + (head * m_len + cols[:, None]) * DV + v_dims[None, :]
        v_j = tl.load(v_at, near & (v_dims < DV)[None, :], 0.0)
        first = 0
        if CAUSAL:
            first = tl.maximum(start_n - (m_len - n), 0) // BLOCK_M * BLOCK_M
        for start_m in range(first, n, BLOCK_M):
            rows = start_m + tl.arange(0, BLOCK_M)
            live = rows < n
            q_at = q_ptr + (head * n + rows[:, None]) * D + dims[None, :]
            q_i = tl.load(q_at, live[:, None] & (dims < D)[None, :], 0.0)
            out_at = out_ptr + (head * n + rows[:, None]) * DV + v_dims[None, :]
            held = live[:, None] & (v_dims < DV)[None, :]
            out_i = tl.load(out_at, held, 0.0)
            m_i = tl.load(m_ptr + head * n + rows, live, float("-inf"))
            l_i = tl.load(l_ptr + head * n + rows, live, 0.0)
            # All loads come before the first store: other threads of the program store what these read.
            tl.debug_barrier()

            s = tl.dot(q_i, tl.trans(k_j), input_precision="ieee") * scale
            allowed = (cols < m_len)[None, :]
            if CAUSAL:
                allowed = allowed & (cols[None, :] <= rows[:, None] + (m_len - n))
            s = tl.where(allowed, s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp(s - shift[:, None])
            alpha = tl.exp(m_i - shift)
            l_new = l_i * alpha + tl.sum(p, 1)

            # What waits in HBM is divided by the old l already, so the old l has to be multiplied back in.
            acc = tl.dot(p.to(v_j.dtype), v_j, out_i * (l_i * alpha)[:, None], input_precision="ieee")
            tl.store(out_at, acc / tl.where(l_new > 0.0, l_new, 1.0)[:, None], held)
            tl.store(m_ptr + head * n + rows, m_new, live)
            tl.store(l_ptr + head * n + rows, l_new, live)
            tl.debug_barrier()


def v1_order(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """out [B, H, N, Dv] for contiguous q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv].

    `causal` lets row i see keys j ≤ i + M − N.
    """
    batch, heads, n, head_dim = q.shape
    m_len, v_head_dim = v.shape[2:]
    out = q.new_zeros(batch, heads, n, v_head_dim, dtype=torch.float32)
    m = q.new_full((batch, heads, n), float("-inf"), dtype=torch.float32)
    l = q.new_zeros(batch, heads, n, dtype=torch.float32)
    v1_forward[(batch * heads,)](
        q,
        k,
        v,
        out,
        m,
        l,
        n,
        m_len,
        head_dim**-0.5 if scale is None else scale,
        head_dim,
        v_head_dim,
        max(16, triton.next_power_of_2(head_dim)),
        max(16, triton.next_power_of_2(v_head_dim)),
        causal,
        BLOCK_M,
        BLOCK_N,
        enable_fp_fusion=True,
    )
    return out.to(q.dtype)
