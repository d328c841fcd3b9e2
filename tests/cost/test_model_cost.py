"""Whole-model costs: parameters against a module and the published sizes, activations against what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tilewise.cost.hardware import DEVICES
from tilewise.cost.model import (
    GPT,
    MODELS,
    layer_activation_bytes,
    least_step_seconds,
    logits_bytes,
    step_flops,
    training_memory,
)


class Layer(nn.Module):
    """A pre-norm block of GPT-2's form, written out so that autograd keeps what the model counts."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, dim // heads
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, dim + 2 * kv_heads * self.size)
        self.out, self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        import tilewise

        parts = self.qkv(self.first(x)).split(
            [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size], -1
        )
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in parts)
        mixed = tilewise.attention(q, k, v, causal=True, layout="bshd")
        x = x + self.out(mixed.flatten(2)).float()
        return x + self.down(F.gelu(self.up(self.second(x)))).float()


def kept_bytes(layer: Layer, x: Tensor) -> int:
    """Distinct storages that autograd keeps for the backward, weights and their casts left out."""
    sizes = {p.numel() for p in layer.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() not in sizes:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        result = layer(x)
    del result
    return sum(kept.values())


@pytest.mark.parametrize(("batch", "seq", "kv_heads"), [(1, 65, 4), (3, 113, 4), (2, 64, 2)])
def test_activations_are_what_autograd_keeps(batch: int, seq: int, kv_heads: int) -> None:
    dim, heads = 96, 4
    torch.manual_seed(0)
    layer = Layer(dim, heads, kv_heads)
    found = kept_bytes(layer, torch.randn(batch, seq, dim, requires_grad=True))
    said, scores = layer_activation_bytes(GPT(1, dim, heads, kv_heads=kv_heads), batch, seq)
    assert scores == 0
    assert found == pytest.approx(said, rel=0.02)


def test_standard_attention_adds_its_scores() -> None:
    model = GPT(1, 96, 4)
    flash, _ = layer_activation_bytes(model, 2, 128)
    standard, scores = layer_activation_bytes(model, 2, 128, attention="standard")
    assert scores == 2 * 4 * 128 * 128 * 6
    assert standard - scores == flash - 2 * 128 * 4 * 4
    whole = training_memory(model, 2, 128, attention="standard")
    assert whole.scores == scores
    assert training_memory(model, 2, 128, attention="standard", checkpointing="block").scores == 0


def test_parameters_of_a_module() -> None:
    for kv_heads in (4, 1):
        layer = Layer(64, 4, kv_heads)
        assert GPT(1, 64, 4, kv_heads=kv_heads).layer_parameters == sum(p.numel() for p in layer.parameters())


def test_published_sizes() -> None:
    """124 M, 355 M, 774 M and 1.56 B, to the parameter."""
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert {name: model.parameters for name, model in MODELS.items()} == published


def test_checkpointing_and_chunked_loss_take_what_they_promise() -> None:
    model = MODELS["gpt2-medium"]
    plain = training_memory(model, 4, 4096)
    checkpointed = training_memory(model, 4, 4096, checkpointing="block")
    assert checkpointed.activations < plain.activations / 8
    assert checkpointed.recomputed == layer_activation_bytes(model, 4, 4096)[0]
    assert logits_bytes(model, 4, 4096, chunk=1024) == logits_bytes(model, 1, 1024)
    assert logits_bytes(model, 1, 100, chunk=1024) == 100 * 50257 * 14
    both = training_memory(model, 1, 8192, checkpointing="block", chunked_loss=2048)
    assert both.peak < 16e9, "8K tokens of GPT-2 medium at batch 1 in less than 16 GB"
    assert training_memory(model, 1, 8192, optimizer=False).optimizer == 0


def test_growth() -> None:
    model = MODELS["gpt2"]
    a, b = (training_memory(model, 2, n) for n in (1024, 2048))
    assert b.activations == 2 * a.activations
    assert b.logits == 2 * a.logits
    assert a.fixed == b.fixed == 16 * model.parameters
    attention = 12 * 14 * 2 * 12 * 64
    assert step_flops(model, 2, 2048) == pytest.approx(
        6 * 4096 * (model.parameters - 1024 * 768) + attention * 2048**2, rel=1e-12
    )
    causal = step_flops(model, 2, 2048, causal=True)
    assert step_flops(model, 2, 2048) - causal == attention * 2048**2 // 2


def test_least_times_order_the_versions() -> None:
    model, a100 = MODELS["gpt2-medium"], DEVICES["A100 80GB"]
    for seq in (512, 2048, 8192):
        standard, v1, v2 = (
            least_step_seconds(model, 4, seq, a100, version) for version in ("standard", "flash_v1", "flash_v2")
        )
        assert standard > v1 > v2 > step_flops(model, 4, seq, causal=True) / 312e12
    with pytest.raises(ValueError, match="version: got 'v3'; wants one of standard, flash_v1, flash_v2"):
        least_step_seconds(model, 1, 8, a100, "v3")  # type: ignore[arg-type]


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match="attention: got 'linear'; wants one of standard, flash"):
        layer_activation_bytes(MODELS["gpt2"], 1, 1, attention="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpointing: got 'some'; wants one of none, block"):
        training_memory(MODELS["gpt2"], 1, 1, checkpointing="some")  # type: ignore[arg-type]
