"""What a forward and backward pass of a GPT costs: by count, and by the clock."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tilewise.cost.counts import backward_flops, forward_flops, self_attention
from tilewise.cost.linear import linear_counts
from tilewise.masks import Causal, Mask, Window
from tilewise.models.gpt import GPT, MECHANISMS


def step_flops(model: GPT, batch: int, length: int) -> float:
    """Floating-point operations of the products of one forward and backward pass.

    Six a token and weight of a matrix, and what mixes the tokens: for softmax the visible scores, 3.5 times the
    forward pass's; for the linear family the chunked form, three times. The delta rule's triangular inverse, short
    convolutions and everything that is no product are left out.
    """
    config = model.config
    attn: Any = model.blocks[0].attn
    weights = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
    spec = self_attention(length, config.dim // config.heads, batch=batch, heads=config.heads, causal=True)
    if hasattr(attn, "make_cache"):
        mixing = 3.0 * linear_counts(replace(spec, head_dim=attn.head_dim, v_head_dim=attn.v_head_dim)).flops
    else:
        if config.mechanism == "mla":
            spec = replace(spec, head_dim=attn.nope_dim + attn.rope_dim, v_head_dim=attn.v_dim)
        rule = MECHANISMS[config.mechanism].mask
        mask = None if rule is None else rule(config, length)
        seen: Mask = Causal() if mask is None else Causal() & mask
        seen = seen & Window(config.window, 0) if config.mechanism == "window" else seen
        scores = (1.0 - seen.sparsity(length, length)) * length**2
        mixing = forward_flops(spec, scores).matmul + backward_flops(spec, scores).matmul
    return 6.0 * batch * length * (weights + model.wte.weight.numel()) + config.layers * mixing


def step_ms(model: GPT, ids: Tensor, targets: Tensor) -> float:
    """Milliseconds of a forward and backward pass over [B, N] tokens, the least of three: processor time on a CPU, so
    that what else it does is not counted, else time."""
    best = math.inf
    for _ in range(3):
        began = _now(ids.device)
        model(ids, targets).backward()
        best = min(best, _now(ids.device) - began)
        model.zero_grad()
    return 1e3 * best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
