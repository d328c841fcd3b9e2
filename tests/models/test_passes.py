"""The count of a pass against plain counts of its own, and a clock that leaves no gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tilewise.models import GPT, GPTConfig
from tilewise.models.gpt import MECHANISMS
from tilewise.models.passes import step_flops, step_ms


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_flops_are_six_a_weight_and_what_mixing_takes(mechanism: str) -> None:
    """Against plain counts: visible pairs one by one for softmax, and for states a bound from their own size."""
    n, dim, layers, heads, batch = 97, 32, 2, 2, 3
    model = GPT(GPTConfig(50, n, dim, layers, heads, mechanism, window=16))
    attn = model.blocks[0].attn
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name)
    mixing = step_flops(model, batch, n) - 6 * batch * n * weights
    if hasattr(attn, "make_cache"):
        state = attn.head_dim * attn.v_head_dim
        chunk = 64 * (attn.head_dim + attn.v_head_dim)
        each = 3 * layers * batch * heads * n
        assert each * 4 * state < mixing < each * (4 * state + 2 * chunk)
        return
    rule = MECHANISMS[mechanism].mask
    dense = np.tril(np.ones((n, n), bool))
    if mechanism == "window":
        dense &= np.triu(np.ones((n, n), bool), -16)
    if rule is not None:
        mask = rule(model.config, n)
        assert mask is not None
        dense = dense & mask.to_dense(n, n)
    visible = dense.mean() * n * n
    qk, v = (24, 16) if mechanism == "mla" else (16, 16)
    assert mixing == pytest.approx(layers * 2 * batch * heads * visible * (4 * qk + 3 * v))


def test_the_clock_leaves_no_gradients() -> None:
    model = GPT(GPTConfig(13, 16, dim=16, layers=1, heads=2))
    ids = torch.arange(13)[None]
    assert step_ms(model, ids, ids) > 0
    assert all(p.grad is None for p in model.parameters())
