"""A few query rows against all tokens, where the tokens themselves are the keys and the values.

Every row is as wide as a token, so each product reads the tokens once and the scores are small: plain matrix products
at the speed of memory, where a fused kernel would give a head's few rows to one program.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def attend_tokens(queries: Tensor, tokens: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale·q xᵀ + bias) x, without autocast.

    Args:
        queries: [B, R, W], R rows.
        tokens: x, [B, N, W].
        mask: boolean [1|B, 1, N], True = attend; a row that sees nothing gives 0.
        bias: [B, R, 1], a number a row.

    Returns:
        [B, R, W] in the queries' dtype. Scores and weights are in float32 (float64 for float64) and held for the
        backward, which is that of Dao et al. 2022, appendix B: dS = P∘(dP − Δ).
    """
    return _AttendTokens.apply(queries, tokens, mask, bias, scale)[0]


class _AttendTokens(torch.autograd.Function):
    """The output and P, which is a result like it: so the backward, made of P, has derivatives too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        queries: Tensor, tokens: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(tokens.device.type, enabled=False):
            s = _product(queries, tokens.mT) * scale
            if bias is not None:
                s = s + bias
            if mask is not None:
                s = s.masked_fill(~mask, -math.inf)
            p = torch.softmax(s, -1)
            if mask is not None:
                p = p.masked_fill(~mask.any(-1, keepdim=True), 0.0)
            return torch.bmm(p.to(tokens.dtype), tokens), p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        queries, tokens, _, _, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, tokens, output[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        dout, dp = grad_outputs
        if dout is None and dp is None:
            return None, None, None, None, None
        queries, tokens, p = ctx.saved_tensors
        wants_queries, wants_tokens, _, wants_bias, _ = ctx.needs_input_grad
        dqueries = dtokens = None
        with torch.autocast(tokens.device.type, enabled=False):
            if dout is not None:
                through_out = _product(dout, tokens.mT)
                dp = through_out if dp is None else through_out + dp
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            dbias = ds.sum(-1, keepdim=True).to(queries.dtype) if wants_bias else None
            ds = ds.to(tokens.dtype)
            if wants_queries:
                dqueries = torch.bmm(ds, tokens) * ctx.scale
            if wants_tokens:
                weights, rows = ds, queries * ctx.scale
                if dout is not None:
                    weights, rows = torch.cat((ds, p.to(tokens.dtype)), 1), torch.cat((rows, dout), 1)
                dtokens = torch.bmm(weights.mT, rows)
        return dqueries, dtokens, None, dbias, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, or in float64 for that; of half precision exact products, summed in float32."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())
