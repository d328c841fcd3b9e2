"""Decoding with the whole score matrix at once: every feature, any device, no wait for the device. The readable one.

    s = softcap(scale·q·k) − slope·|p − j|,  −∞ where query t at position p = length − T + t may not see token j

The keys of all sequences are gathered up to the capacity, dequantised, and masked by the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilewise.backends.decoding import DecodeOperands, empty_decoded, token_of_slot
from tilewise.backends.scores import grouped_matmul
from tilewise.reference.softmax import accumulator_dtype, finish, merge_sink, row_max, shift_of
from tilewise.spec import DecodeSpec

NEG_INF = float("-inf")


def gather(operands: DecodeOperands, spec: DecodeSpec) -> tuple[Tensor, Tensor, Tensor]:
    """k [B, Hkv, M, D] and v [B, Hkv, M, Dv] in accumulator precision, and the token of each column [B, M], −1 where
    there is none. What no token owns is 0, whatever lies in memory there."""
    q, lengths = operands.q, operands.lengths
    columns = spec.capacity
    if lengths.device.type == "cpu":
        columns = min(columns, int(lengths.max()))
    slots = torch.arange(columns, device=q.device)
    token = token_of_slot(slots, lengths, spec.capacity, spec.ring)
    there = (token >= 0) & (token < lengths[:, None])
    if operands.start is not None:
        there = there & (token >= operands.start[:, None])
    page = table = None
    if operands.page_table is not None and spec.page_size is not None:
        pages = -(-columns // spec.page_size)
        table = operands.page_table[:, :pages].long()
        inside = (table >= 0) & (table < operands.k.shape[0])
        page = table.masked_fill(~inside, 0)
        there = there & inside.repeat_interleave(spec.page_size, 1)[:, :columns]

    def rows(pool: Tensor, scales: Tensor | None) -> Tensor:
        def placed(x: Tensor) -> Tensor:
            if page is None:
                return x[:, :, :columns]
            return x[page].transpose(1, 2).flatten(2, 3)[:, :, :columns]

        found = placed(pool).to(accumulator_dtype(q.dtype))
        if scales is not None:
            found = found * placed(scales)[..., None]
        return found.masked_fill(~there[:, None, :, None], 0.0)

    k = rows(operands.k, operands.k_scale)
    v = k[..., : spec.v_head_dim] if operands.v is None else rows(operands.v, operands.v_scale)
    return k, v, token.masked_fill(~there, -1)


def unpack(operands: DecodeOperands, spec: DecodeSpec) -> tuple[Tensor, Tensor]:
    """Queries of each sequence as [B, H, T, D], and how many of the T there are, [B]."""
    q, cu = operands.q, operands.cu_seqlens_q
    if cu is None:
        return q, torch.full_like(operands.lengths, q.shape[2])
    index = cu[:-1, None].long() + torch.arange(spec.q_len, device=q.device)
    index = index.clamp(max=max(q.shape[2] - 1, 0))
    return q[0, :, index].transpose(0, 1), cu.diff()


def pack(padded: Tensor, cu: Tensor, total: int) -> Tensor:
    """The rows of [B, H, T, ...] that exist, as [1, H, total, ...]."""
    row = torch.arange(total, device=padded.device)
    b = torch.searchsorted(cu[1:].contiguous(), row, right=True).clamp(max=padded.shape[0] - 1)
    return padded[b, :, row - cu[b]].transpose(0, 1).unsqueeze(0)


def visible(position: Tensor, token: Tensor, first: Tensor, operands: DecodeOperands, spec: DecodeSpec) -> Tensor:
    """Which tokens [B, M] a query at each position [B, T] may see, [B, T, M]; `first` [B] is position of query 0."""
    p, j = position[:, :, None], token[:, None, :]
    left, right = spec.limits
    seen = j >= 0
    if left is not None:
        seen = seen & (j >= p - left)
    if right is not None:
        seen = seen & (j <= p + right)
    if operands.tree is not None:
        node = j - first[:, None, None]
        tree = operands.tree.expand(token.shape[0], -1, -1)
        column = node.clamp(0, tree.shape[2] - 1).expand(-1, tree.shape[1], -1)
        seen = seen & ((node < 0) | tree.gather(2, column))
    return seen


class StandardDecode:
    """`DecodeBackend` in plain PyTorch."""

    name = "standard"

    def why_not(self, spec: DecodeSpec) -> None:
        return None

    def configure(self, spec: DecodeSpec) -> None:
        return None

    def forward(self, operands: DecodeOperands, spec: DecodeSpec, config: None) -> tuple[Tensor, Tensor]:
        out, lse = empty_decoded(operands.q, spec.v_head_dim)
        if 0 in out.shape:
            return out, lse
        q, count = unpack(operands, spec)
        k, v, token = gather(operands, spec)
        first = operands.lengths.long() - count
        position = first[:, None] + torch.arange(q.shape[2], device=q.device)
        s = grouped_matmul(q.to(k.dtype), k.transpose(-1, -2)) * spec.scale
        if spec.softcap is not None:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        if operands.alibi is not None:
            distance = (position[:, :, None] - token[:, None, :]).abs().to(s.dtype)
            s = s - operands.alibi[:, :, None, None].to(s.dtype) * distance[:, None]
        seen = visible(position, token, first, operands, spec)
        s = s.masked_fill(~seen[:, None], NEG_INF)
        m = row_max(s)
        p = (s - shift_of(m)[..., None]).exp()
        found, statistic = finish(m, p.sum(-1), grouped_matmul(p, v))
        if operands.sink is not None:
            found, statistic = merge_sink(found, statistic, operands.sink.to(found.dtype))
        if operands.cu_seqlens_q is not None:
            found = pack(found, operands.cu_seqlens_q, operands.q.shape[2])
            statistic = pack(statistic, operands.cu_seqlens_q, operands.q.shape[2])
        return out.copy_(found), lse.copy_(statistic)


STANDARD_DECODE = StandardDecode()
