"""Standard attention as six kernels, the first rung of the ladder that the lab climbs: what fusing them saves.

Scores, row maxima, exponentials, row sums, division, times V: `reference.standard.six_step_attention` with the same
names, one kernel a step, each of which reads its input from HBM and writes its result there. The N×M matrix is written
three times and read five times, where a fused kernel never writes it. Each kernel by itself is a good one: a tile a
program, tensor cores for the two products. Forward only; nothing in the library calls it but the lab and the benchmark.
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
def scores(q_ptr, k_ptr, s_ptr, n, m, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Step 1, S = QKᵀ·scale, −∞ where the causal rule forbids."""
    head = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + (head * n + rows[:, None]) * D + dims[None, :], (rows < n)[:, None] & (dims < D)[None, :], 0.0)
    k = tl.load(k_ptr + (head * m + cols[:, None]) * D + dims[None, :], (cols < m)[:, None] & (dims < D)[None, :], 0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAUSAL:
        s = tl.where(cols[None, :] <= rows[:, None] + (m - n), s, float("-inf"))
    at = s_ptr + (head * n + rows[:, None]) * m + cols[None, :]
    tl.store(at, s.to(s_ptr.dtype.element_ty), (rows < n)[:, None] & (cols < m)[None, :])


@triton.jit
def max_of_rows(s_ptr, m_ptr, rows_total, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Step 2, m = max S, −∞ for a row that sees nothing."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, m, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (rows < rows_total)[:, None] & (cols < m)[None, :]
        s = tl.load(s_ptr + rows[:, None] * m + cols[None, :], inside, float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, tl.max(s, 1))
    # Stored as it is: Triton 3.6 fails to compile a maximum over a loop that is used twice after it.
    tl.store(m_ptr + rows, peak, rows < rows_total)


@triton.jit
def exponentials(s_ptr, m_ptr, e_ptr, rows_total, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Step 3, E = e^(S − m), where m = −∞ counts as 0: e^−∞ = 0."""
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < rows_total)[:, None] & (cols < m)[None, :]
    at = rows[:, None] * m + cols[None, :]
    peak = tl.load(m_ptr + rows, rows < rows_total, 0.0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    e = tl.exp(tl.load(s_ptr + at, inside, 0.0).to(tl.float32) - peak[:, None])
    tl.store(e_ptr + at, e.to(e_ptr.dtype.element_ty), inside)


@triton.jit
def sum_of_rows(e_ptr, l_ptr, rows_total, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Step 4, l = Σ E."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, m, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (rows < rows_total)[:, None] & (cols < m)[None, :]
        total += tl.sum(tl.load(e_ptr + rows[:, None] * m + cols[None, :], inside, 0.0).to(tl.float32), 1)
    tl.store(l_ptr + rows, total, rows < rows_total)


@triton.jit
def normalize(e_ptr, l_ptr, p_ptr, rows_total, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Step 5, P = E / l, 0 for a row that sees nothing."""
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < rows_total)[:, None] & (cols < m)[None, :]
    at = rows[:, None] * m + cols[None, :]
    total = tl.load(l_ptr + rows, rows < rows_total, 1.0)
    p = tl.load(e_ptr + at, inside, 0.0).to(tl.float32) / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(p_ptr + at, p.to(p_ptr.dtype.element_ty), inside)


@triton.jit
def times_v(p_ptr, v_ptr, out_ptr, n, m, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """Step 6, O = PV."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, m, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (rows < n)[:, None] & (cols < m)[None, :]
        p = tl.load(p_ptr + (head * n + rows[:, None]) * m + cols[None, :], inside, 0.0)
        at = v_ptr + (head * m + cols[:, None]) * DV + dims[None, :]
        v = tl.load(at, (cols < m)[:, None] & (dims < DV)[None, :], 0.0)
        acc = tl.dot(p, v, acc, input_precision="ieee")
    at = out_ptr + (head * n + rows[:, None]) * DV + dims[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), (rows < n)[:, None] & (dims < DV)[None, :])


def six_kernels(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """out [B, H, N, Dv] for contiguous q [B, H, N, D], k [B, H, M, D], v [B, H, M, Dv]; S, E and P in q's dtype.

    `causal` lets row i see keys j ≤ i + M − N. No empty sizes.
    """
    batch, heads, n, head_dim = q.shape
    m, v_head_dim = v.shape[2:]
    count = batch * heads * n
    s, e, p = (q.new_empty(batch, heads, n, m) for _ in range(3))
    peak, total = (q.new_empty(batch, heads, n, dtype=torch.float32) for _ in range(2))
    out = q.new_empty(batch, heads, n, v_head_dim)
    key_tiles, row_tiles, all_tiles = triton.cdiv(m, BLOCK_N), triton.cdiv(n, BLOCK_M), triton.cdiv(count, BLOCK_M)
    blocks = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "enable_fp_fusion": True}
    wide, v_wide = (max(16, triton.next_power_of_2(size)) for size in (head_dim, v_head_dim))
    scale = head_dim**-0.5 if scale is None else scale
    scores[(key_tiles, row_tiles, batch * heads)](q, k, s, n, m, scale, head_dim, wide, causal, **blocks)
    max_of_rows[(all_tiles,)](s, peak, count, m, **blocks)
    exponentials[(key_tiles, all_tiles)](s, peak, e, count, m, **blocks)
    sum_of_rows[(all_tiles,)](e, total, count, m, **blocks)
    normalize[(key_tiles, all_tiles)](e, total, p, count, m, **blocks)
    times_v[(row_tiles, batch * heads)](p, v, out, n, m, v_head_dim, v_wide, **blocks)
    return out
