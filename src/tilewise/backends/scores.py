"""One block of the score matrix, forward and backward, with every feature of SPEC 1.5, in plain PyTorch.

`standard` takes the whole matrix as one block, `tiled` walks many; the formulas are these, written once:

    s = softcap(scale·QKᵀ) + bias + relative + alibi,  then −∞ where not allowed
    P = e^{s − lse},  dP = Z∘(dO Vᵀ)/(1 − p),  dS = P∘(dP − Δ),  Δ = rowsum(dO∘O) − dLSE

Everything is computed in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.backends.base import Gradients, Needs, Operands
from tilewise.backends.philox import keep_mask
from tilewise.backends.problems import Problem, allowed_pairs
from tilewise.masks import Mask
from tilewise.reference.softmax import accumulator_dtype
from tilewise.spec import AttentionSpec

NEG_INF = float("-inf")


def narrow(tensor: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """A slice of a broadcastable dimension: size-1 dimensions stay as they are."""
    return tensor if tensor.shape[dim] == 1 else tensor.narrow(dim, start, stop - start)


def _bounds(part: slice, size: int) -> tuple[int, int]:
    start, stop, _ = part.indices(size)
    return start, stop


def grouped_matmul(x: Tensor, y: Tensor) -> Tensor:
    """x [B, H, R, K] times y [B, Hkv, K, C] without copying y for each head of its group: [B, H, R, C]."""
    batch, heads, rows, inner = x.shape
    kv_heads = y.shape[1]
    if heads == kv_heads:
        return x @ y
    group = heads // kv_heads
    return (x.reshape(batch, kv_heads, group * rows, inner) @ y).view(batch, heads, rows, y.shape[-1])


def grouped_transposed_matmul(x: Tensor, y: Tensor, kv_heads: int) -> Tensor:
    """Σ over the heads of each group of xᵀy, for x [B, H, R, K] and y [B, H, R, C]: [B, Hkv, K, C]."""
    batch, heads, rows, _ = x.shape
    folded = (batch, kv_heads, heads // kv_heads * rows)
    return x.reshape(*folded, x.shape[-1]).transpose(-1, -2) @ y.reshape(*folded, y.shape[-1])


class Totals(NamedTuple):
    """Gradients that many blocks add to, in accumulator precision and in the operands' shapes."""

    k: Tensor
    v: Tensor
    bias: Tensor | None
    relative: Tensor | None
    sink: Tensor | None

    def add_keys(self, problem: Problem, keys: range, dk: Tensor, dv: Tensor) -> None:
        """Add dk [B, Hkv, keys, D] and dv [B, Hkv, keys, Dv] of one block of `problem`."""
        for total, part in ((self.k, dk), (self.v, dv)):
            problem.of_keys(total)[:, :, keys.start : keys.stop].add_(part)

    @classmethod
    def zeros(cls, operands: Operands, needs: Needs) -> Totals:
        dtype = accumulator_dtype(operands.q.dtype)

        def zeros_like(x: Tensor | None, needed: bool) -> Tensor | None:
            return x.new_zeros(x.shape, dtype=dtype) if x is not None and needed else None

        k, v = (x.new_zeros(x.shape, dtype=dtype) for x in (operands.k, operands.v))
        bias, relative = zeros_like(operands.bias, needs.bias), zeros_like(operands.relative, needs.relative)
        return cls(k, v, bias, relative, zeros_like(operands.sink, needs.sink))

    def gradients(self, dq: Tensor, operands: Operands) -> Gradients:
        """Everything in the dtypes of the operands."""

        def like(total: Tensor | None, x: Tensor | None) -> Tensor | None:
            return None if total is None or x is None else total.to(x.dtype)

        return Gradients(
            dq,
            self.k.to(operands.k.dtype),
            self.v.to(operands.v.dtype),
            like(self.bias, operands.bias),
            like(self.relative, operands.relative),
            like(self.sink, operands.sink),
        )


class ScoreBlocks:
    """The score blocks of one problem. Rows and keys are ranges that count from the problem's start."""

    def __init__(self, problem: Problem, operands: Operands, spec: AttentionSpec) -> None:
        self.problem = problem
        self.operands = operands
        self.spec = spec
        self.dtype = accumulator_dtype(problem.q.dtype)
        self.kv_heads = problem.k.shape[1]
        heads = self._heads = _bounds(problem.heads, spec.heads)
        batch = self._batch = (problem.indices.start, problem.indices.stop)
        device = problem.q.device
        self._bias = None
        if operands.bias is not None:
            self._bias = narrow(narrow(operands.bias, 0, *batch), 1, *heads)
        self._relative = None if operands.relative is None else operands.relative[slice(*heads)].to(self.dtype)
        self._slopes = None
        if operands.alibi is not None:
            slopes = narrow(narrow(operands.alibi, 0, *batch), 1, *heads)
            self._slopes = slopes.to(self.dtype)[:, :, None, None]
        self.sink = None
        if operands.sink is not None:
            self.sink = operands.sink[slice(*heads)].to(self.dtype)
        if operands.seed is not None:
            self._b = torch.arange(*batch, device=device)
            self._h = torch.arange(*heads, device=device)

    @property
    def biased(self) -> bool:
        """Whether anything is added to the scores."""
        return self._bias is not None or self._relative is not None or self._slopes is not None

    def q_rows(self, rows: range) -> Tensor:
        return self.problem.q[:, :, rows.start : rows.stop].to(self.dtype)

    def k_rows(self, keys: range) -> Tensor:
        return self.problem.k[:, :, keys.start : keys.stop].to(self.dtype)

    def v_rows(self, keys: range) -> Tensor:
        return self.problem.v[:, :, keys.start : keys.stop].to(self.dtype)

    def _distance(self, rows: range, keys: range) -> Tensor:
        """p − j, [rows, keys]."""
        device = self.problem.q.device
        p = torch.arange(rows.start, rows.stop, device=device) + self.problem.offset
        return p[:, None] - torch.arange(keys.start, keys.stop, device=device)

    def _relative_index(self, rows: range, keys: range) -> Tensor:
        assert self._relative is not None
        radius = self._relative.shape[1] // 2
        return self._distance(rows, keys).clamp_(-radius, radius).add_(radius)

    def additive(self, rows: range, keys: range) -> Tensor | None:
        """bias + relative + alibi of the block, broadcastable to [B, H, rows, keys], or None."""
        total = None
        if self._bias is not None:
            block = narrow(narrow(self._bias, 2, rows.start, rows.stop), 3, keys.start, keys.stop)
            total = block.to(self.dtype)
        if self._relative is not None:
            relative = self._relative[:, self._relative_index(rows, keys)]
            total = relative if total is None else total + relative
        if self._slopes is not None:
            alibi = self._slopes * self._distance(rows, keys).abs().neg().to(self.dtype)
            total = alibi if total is None else total + alibi
        return total

    def dense_additive(self, mask: Mask | None) -> Tensor | None:
        """Biases and mask of the whole problem as one N×M tensor that broadcasts to [B, H, N, M], or None."""
        n, m = self.problem.q.shape[2], self.problem.k.shape[2]
        total = self.additive(range(n), range(m))
        if total is not None:
            total = total.expand(*total.shape[:2], n, m)
        if mask is None:
            return total
        zero = torch.zeros((), dtype=self.dtype, device=self.problem.q.device)
        return torch.where(allowed_pairs(self.problem, mask, self.spec), zero if total is None else total, NEG_INF)

    def scores(self, q: Tensor, rows: range, keys: range, allowed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The masked scores [B, H, rows, keys] and, with a soft cap, tanh(scale·q·k / c), which its gradient needs."""
        s = grouped_matmul(q, self.k_rows(keys).transpose(-1, -2)).mul_(self.spec.scale)
        tanh = None
        if self.spec.softcap is not None:
            tanh = torch.tanh(s / self.spec.softcap)
            s = tanh * self.spec.softcap
        additive = self.additive(rows, keys)
        if additive is not None:
            s = s.add_(additive)
        if allowed is not None:
            s = s.masked_fill_(~allowed, NEG_INF)
        return s, tanh

    def keep(self, rows: range, keys: range) -> Tensor | None:
        """Z/(1 − p) of the block, or None without dropout."""
        if self.operands.seed is None:
            return None
        p = self.spec.dropout
        kept = keep_mask(self.operands.seed, p, self._b, self._h, rows, keys)
        return kept.to(self.dtype) / (1.0 - p)

    def times_v(self, p: Tensor, rows: range, keys: range) -> Tensor:
        """P V of one block after dropout, [B, H, rows, Dv]."""
        keep = self.keep(rows, keys)
        return grouped_matmul(p if keep is None else p * keep, self.v_rows(keys))

    def backward(
        self,
        q: Tensor,
        dout: Tensor,
        delta: Tensor,
        lse: Tensor,
        rows: range,
        keys: range,
        allowed: Tensor | None,
        totals: Totals,
    ) -> Tensor:
        """Add the block's share to dk, dv and the bias gradients in `totals`; return its share of dq.

        q, dout [B, H, rows, ·], delta [B, H, rows, 1], and lse [B, H, rows, 1] with +∞ in rows that see nothing,
        so that their P is exactly zero.
        """
        k = self.k_rows(keys)
        s, tanh = self.scores(q, rows, keys, allowed)
        p = s.sub_(lse).exp_()
        keep = self.keep(rows, keys)
        dp = grouped_matmul(dout, self.v_rows(keys).transpose(-1, -2))
        if keep is None:
            dv = grouped_transposed_matmul(p, dout, self.kv_heads)
        else:
            dv = grouped_transposed_matmul(p * keep, dout, self.kv_heads)
            dp = dp.mul_(keep)
        ds = p.mul_(dp.sub_(delta))
        if totals.bias is not None:
            self._add_bias(totals.bias, ds, rows, keys)
        if totals.relative is not None:
            index = self._relative_index(rows, keys).flatten()
            totals.relative[slice(*self._heads)].index_add_(1, index, ds.sum(0).flatten(1))
        if tanh is not None:
            ds = ds.mul_(1.0 - tanh * tanh)
        ds = ds.mul_(self.spec.scale)
        totals.add_keys(self.problem, keys, grouped_transposed_matmul(ds, q, self.kv_heads), dv)
        return grouped_matmul(ds, k)

    def _add_bias(self, total: Tensor, ds: Tensor, rows: range, keys: range) -> None:
        part = narrow(narrow(total, 0, *self._batch), 1, *self._heads)
        part = narrow(narrow(part, 2, rows.start, rows.stop), 3, keys.start, keys.stop)
        part.add_(ds.sum_to_size(part.shape))


def delta_rows(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """Δ = rowsum(dO∘O) − dLSE, [B, H, rows, 1]: all that dS needs to know of the rest of its row."""
    delta = (dout * out).sum(-1, keepdim=True)
    return delta if dlse is None else delta - dlse[..., None]


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dsink = Σ P_sink∘(dLSE − Δ), [H], for sink [H], lse [B, H, rows], delta [B, H, rows, 1] as `delta_rows` gives it.

    Rows without a softmax (lse −∞) add nothing.
    """
    p_sink = torch.exp(sink[:, None] - lse).masked_fill(lse == NEG_INF, 0.0)
    return -(p_sink * delta[..., 0]).sum((0, 2))
