"""Decoding on a CPU through ATen's flash kernel: one call a sequence, on just the tokens that it can see.

The query heads of a group become rows of one head, so that its keys are read once. One query needs no mask at all: a
window is a slice. Several queries get one small additive mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.backends import cpu_flash
from tilewise.backends.decoding import DecodeOperands, empty_decoded
from tilewise.reference.softmax import accumulator_dtype, merge_sink
from tilewise.spec import DecodeSpec

NEG_INF = float("-inf")


class TiledDecode:
    """`DecodeBackend` on ATen's CPU kernel."""

    name = "tiled"

    def why_not(self, spec: DecodeSpec) -> str | None:
        if spec.device != "cpu":
            return "it reads the lengths on the host, which on a GPU would stall the stream"
        if spec.softcap is not None:
            return "PyTorch's CPU kernel has no soft cap"
        if spec.scale <= 0.0:
            return "PyTorch's CPU kernel wants a scale above 0"
        return None

    def configure(self, spec: DecodeSpec) -> None:
        return None

    def forward(self, operands: DecodeOperands, spec: DecodeSpec, config: None) -> tuple[Tensor, Tensor]:
        out, lse = empty_decoded(operands.q, spec.v_head_dim)
        if 0 in out.shape:
            return out, lse
        lengths = operands.lengths.tolist()
        starts = [0] * len(lengths) if operands.start is None else operands.start.tolist()
        if operands.cu_seqlens_q is None:
            if spec.page_size is None and len(set(zip(lengths, starts, strict=True))) == 1:
                together = slice(0, len(lengths))
                _attend(operands, spec, together, lengths[0], starts[0], operands.q, out, lse)
            else:
                for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
                    one = slice(b, b + 1)
                    _attend(operands, spec, one, length, start, operands.q[one], out[one], lse[one])
        else:
            ends = operands.cu_seqlens_q.tolist()
            for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
                rows = slice(ends[b], ends[b + 1])
                parts = operands.q[:, :, rows], out[:, :, rows], lse[:, :, rows]
                if ends[b] < ends[b + 1]:
                    _attend(operands, spec, slice(b, b + 1), length, start, *parts)
        if operands.sink is not None:
            found, statistic = merge_sink(out.to(lse.dtype), lse, operands.sink.to(lse.dtype))
            out.copy_(found)
            lse.copy_(statistic)
        return out, lse


TILED_DECODE = TiledDecode()


def _attend(
    operands: DecodeOperands,
    spec: DecodeSpec,
    rows: slice,
    length: int,
    start: int,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Sequences `rows`, all of one length, whose queries are q [b, H, T, D]; fills out and lse."""
    tokens = q.shape[2]
    first = length - tokens
    left, _ = spec.limits
    lo = max(start, length - spec.capacity if spec.ring else 0, 0 if left is None else first - left)
    hi = length
    if lo >= hi:
        out.zero_()
        lse.fill_(NEG_INF)
        return
    k = _keys(operands.k, operands.k_scale, operands, spec, rows, lo, hi, q.dtype)
    if operands.v is None:
        v = k[..., : spec.v_head_dim]
    else:
        v = _keys(operands.v, operands.v_scale, operands, spec, rows, lo, hi, q.dtype)
    additive = _additive(operands, spec, rows, tokens, first, lo, hi)
    batch, kv_heads, group = q.shape[0], spec.kv_heads, spec.group
    if additive is not None:
        additive = (
            additive.to(lse.dtype)
            .expand(batch, spec.heads, tokens, hi - lo)
            .reshape(batch, kv_heads, group * tokens, hi - lo)
        )
    folded = q.reshape(batch, kv_heads, group * tokens, q.shape[3])
    found, statistic = cpu_flash.forward(folded, k, v, spec.scale, additive)
    out.copy_(found.reshape(out.shape))
    lse.copy_(statistic.reshape(lse.shape))


def _keys(
    pool: Tensor,
    scales: Tensor | None,
    operands: DecodeOperands,
    spec: DecodeSpec,
    rows: slice,
    lo: int,
    hi: int,
    dtype: torch.dtype,
) -> Tensor:
    """Tokens lo to hi of `rows` as [b, Hkv, hi − lo, ·] in `dtype`."""

    def placed(x: Tensor) -> Tensor:
        if operands.page_table is not None and spec.page_size is not None:
            size = spec.page_size
            first = lo // size
            pages = operands.page_table[rows.start, first : -(-hi // size)].long()
            inside = (pages >= 0) & (pages < x.shape[0])
            found = x[pages.masked_fill(~inside, 0)]
            if not bool(inside.all()):
                found = found.masked_fill(~inside.view(-1, *[1] * (x.dim() - 1)), 0)
            found = found.transpose(0, 1).flatten(1, 2)
            return found[None, :, lo - first * size : hi - first * size]
        if not spec.ring or hi <= spec.capacity:
            return x[rows, :, lo:hi]
        return x[rows][:, :, torch.arange(lo, hi) % spec.capacity]

    found = placed(pool)
    return found if scales is None else (found.to(torch.float32) * placed(scales)[..., None]).to(dtype)


def _additive(
    operands: DecodeOperands, spec: DecodeSpec, rows: slice, tokens: int, first: int, lo: int, hi: int
) -> Tensor | None:
    """What is added to the scores of tokens lo to hi, [1|b, 1|H, T, hi − lo]; None where every query sees them all."""
    left, right = spec.limits
    p, j = first + torch.arange(tokens)[:, None], torch.arange(lo, hi)
    total = None
    if operands.alibi is not None:
        slopes = operands.alibi if operands.alibi.shape[0] == 1 else operands.alibi[rows]
        total = -slopes[:, :, None, None].to(accumulator_dtype(operands.q.dtype)) * (p - j).abs()
    missing = _missing(operands, spec, rows.start, lo, hi)
    limited = tokens > 1 and (left is not None or right is not None)
    if not limited and operands.tree is None and missing is None:
        return total
    seen = torch.ones(1, 1, tokens, hi - lo, dtype=torch.bool)
    if left is not None:
        seen = seen & (j >= p - left)
    if right is not None:
        seen = seen & (j <= p + right)
    if missing is not None:
        seen = seen & ~missing
    if operands.tree is not None:
        tree = (operands.tree if operands.tree.shape[0] == 1 else operands.tree[rows])[:, None]
        node = (j - first).clamp(0, tree.shape[3] - 1)
        seen = seen & ((j < first) | tree[..., node])
    zero = torch.zeros(()) if total is None else total
    return torch.where(seen, zero, NEG_INF)


def _missing(operands: DecodeOperands, spec: DecodeSpec, row: int, lo: int, hi: int) -> Tensor | None:
    """Which of the tokens lo to hi have no page in the pool, or None if all have."""
    if operands.page_table is None or spec.page_size is None:
        return None
    pages = operands.page_table[row]
    outside = (pages < 0) | (pages >= operands.k.shape[0])
    if not bool(outside[lo // spec.page_size : -(-hi // spec.page_size)].any()):
        return None
    return outside[torch.arange(lo, hi) // spec.page_size]
