"""Layers of PyTorch and Transformers with random weights compute the same here, and take their weights back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilewise import UnsupportedError
from tilewise.caches import KV, DenseCache, Latent
from tilewise.nn import (
    DynamicNTK,
    GroupedQueryAttention,
    LinearScaling,
    Llama3,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    YaRN,
    from_deepseek,
    from_gpt2,
    from_llama,
    from_torch,
    to_deepseek,
    to_gpt2,
    to_llama,
    to_torch,
)

pytest.importorskip("transformers")

from transformers import DeepseekV2Config, DeepseekV3Config, GPT2Config, LlamaConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

B, N, DIM = 2, 37, 32
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def randomized(layer: nn.Module) -> nn.Module:
    """Weights of the size that keeps activations at one, biases and norms that are not trivial."""
    torch.manual_seed(1)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            # GPT-2's layers keep [in, out].
            fan_in = parameter.shape[0] if name.startswith("c_") else parameter.shape[1]
            nn.init.normal_(parameter, std=fan_in**-0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return layer.eval()


def causal_bias(n: int) -> Tensor:
    return torch.full((n, n), float("-inf")).triu(1)[None, None]


def assert_decodes(module: Any, x: Tensor, full: Tensor) -> None:
    with torch.no_grad():
        if isinstance(module, MultiHeadLatentAttention):
            contents: KV = Latent(module.kv_rank, module.rope_dim)
        else:
            contents = KV(module.kv_heads, module.head_dim)
        cache = DenseCache(contents, B, N)
        steps = [module(part, cache=cache) for part in x.split([N - 9, 1, 8], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), full, **CLOSE)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 20, "vdim": 12}], ids=["self", "cross"])
def test_torch(widths: dict[str, int], bias: bool) -> None:
    layer = randomized(nn.MultiheadAttention(DIM, 4, bias=bias, batch_first=True, **widths))
    assert isinstance(layer, nn.MultiheadAttention)
    q = torch.randn(B, N, DIM)
    k = torch.randn(B, 11, 20) if widths else q
    v = torch.randn(B, 11, 12) if widths else q
    mask = torch.rand(N, k.shape[1]) < 0.7
    exact, exact_weights = layer(q, k, v, attn_mask=~mask, average_attn_weights=False)
    module = from_torch(layer)
    out, weights = module(q, k, v, mask=mask, need_weights=True)
    torch.testing.assert_close(out, exact, **CLOSE)
    torch.testing.assert_close(weights, exact_weights, **CLOSE)
    back = nn.MultiheadAttention(DIM, 4, bias=bias, batch_first=True, **widths)
    back.load_state_dict(to_torch(module))
    assert all(torch.equal(x, layer.state_dict()[name]) for name, x in back.state_dict().items())


def test_torch_is_causal_where_asked() -> None:
    layer = randomized(nn.MultiheadAttention(DIM, 4))
    assert isinstance(layer, nn.MultiheadAttention)
    x = torch.randn(B, N, DIM)
    rows_first = x.transpose(0, 1)
    exact, _ = layer(rows_first, rows_first, rows_first, attn_mask=causal_bias(N)[0, 0])
    torch.testing.assert_close(from_torch(layer, causal=True)(x), exact.transpose(0, 1), **CLOSE)


LLAMA_ROPE: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, None),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, LinearScaling(4.0)),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, DynamicNTK(2.0, 16)),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        Llama3(8.0, 64, 1.0, 4.0),
    ),
    "yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
        },
        YaRN(4.0, 16, 4.0, 1.0),
    ),
}


@pytest.mark.parametrize("rope", LLAMA_ROPE)
@pytest.mark.parametrize(("kv_heads", "bias"), [(1, False), (2, True), (4, False)])
def test_llama(rope: str, kv_heads: int, bias: bool) -> None:
    parameters, scaling = LLAMA_ROPE[rope]
    config = LlamaConfig(
        hidden_size=DIM,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        attention_bias=bias,
        max_position_embeddings=16 if rope == "dynamic" else 64,
        rope_parameters=parameters,
        attn_implementation="eager",
    )
    layer = randomized(LlamaAttention(config, 0))
    x = torch.randn(B, N, DIM)
    positions = torch.arange(N)[None]
    turn = LlamaRotaryEmbedding(config)(x, positions)
    exact, _ = layer(x, turn, attention_mask=causal_bias(N))
    module = from_llama(layer)
    assert module.rotary is not None
    assert module.rotary.scaling == scaling
    torch.testing.assert_close(module(x), exact, **CLOSE)
    if rope != "dynamic":
        assert_decodes(module, x, exact)
    back = LlamaAttention(config, 0)
    back.load_state_dict(to_llama(module))
    assert all(torch.equal(x, layer.state_dict()[name]) for name, x in back.state_dict().items())


def test_dynamic_ntk_is_for_whole_sequences() -> None:
    parameters, _ = LLAMA_ROPE["dynamic"]
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=4, max_position_embeddings=16, rope_parameters=parameters)
    module = from_llama(LlamaAttention(config, 0).eval())
    with torch.no_grad(), pytest.raises(ValueError, match="at\\(the longest length\\)"):
        module(torch.randn(B, N, DIM), cache=DenseCache(KV(4, 8), B, 64))


@pytest.mark.parametrize("by_layer", [False, True])
def test_gpt2(by_layer: bool) -> None:
    config = GPT2Config(n_embd=DIM, n_head=4, scale_attn_by_inverse_layer_idx=by_layer, attn_implementation="eager")
    layer = randomized(GPT2Attention(config, layer_idx=2))
    x = torch.randn(B, N, DIM)
    exact, _ = layer(x, attention_mask=causal_bias(N))
    module = from_gpt2(layer)
    torch.testing.assert_close(module(x), exact, **CLOSE)
    assert_decodes(module, x, exact)
    assert (module.dropout, module.residual_dropout) == (0.1, 0.1)
    back = GPT2Attention(config, layer_idx=2)
    back.load_state_dict(to_gpt2(module))
    assert all(torch.equal(x, layer.state_dict()[name]) for name, x in back.state_dict().items())


DEEPSEEK_ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}


@pytest.mark.parametrize("rope", DEEPSEEK_ROPE)
@pytest.mark.parametrize(("q_rank", "bias"), [(None, False), (24, True)])
@pytest.mark.parametrize("version", ["V2", "V3", "V3-half-split"])
def test_deepseek(version: str, q_rank: int | None, bias: bool, rope: str) -> None:
    options: dict[str, Any] = {
        "hidden_size": DIM,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": q_rank,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "attention_bias": bias,
        "rope_parameters": dict(DEEPSEEK_ROPE[rope]),
        "attn_implementation": "eager",
    }
    if version == "V2":
        config: Any = DeepseekV2Config(**options)
        layer, turns = randomized(DeepseekV2Attention(config, 0)), DeepseekV2RotaryEmbedding(config)
    else:
        config = DeepseekV3Config(**options, rope_interleave=version == "V3")
        layer, turns = randomized(DeepseekV3Attention(config, 0)), DeepseekV3RotaryEmbedding(config)
    x = torch.randn(B, N, DIM)
    turn = turns(x, torch.arange(N)[None])
    exact, _ = layer(x, position_embeddings=turn, attention_mask=causal_bias(N))
    module = from_deepseek(layer)
    torch.testing.assert_close(module(x), exact, **CLOSE)
    torch.testing.assert_close(module(x, absorbed=True), exact, **CLOSE)
    assert_decodes(module, x, exact)
    scale = MultiHeadLatentAttention(
        DIM, 4, q_rank=q_rank, kv_rank=16, nope_dim=12, rope_dim=8, v_dim=10, rotary=module.rotary
    ).scale
    assert scale == pytest.approx(module.scale)
    back = type(layer)(config, 0)
    back.load_state_dict(to_deepseek(module))
    assert all(torch.equal(x, layer.state_dict()[name]) for name, x in back.state_dict().items())


def test_weights_are_copies() -> None:
    layer = nn.MultiheadAttention(DIM, 4, dtype=torch.float64)
    module = from_torch(layer)
    assert module.q_proj.weight.dtype == torch.float64
    before = layer.in_proj_weight.detach().clone()
    with torch.no_grad():
        module.q_proj.weight.zero_()
        to_torch(module)["out_proj.weight"].zero_()
    assert torch.equal(layer.in_proj_weight, before)
    assert module.o_proj.weight.abs().max() > 0
    assert module.training == layer.training


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="layer: got Linear; wants a LlamaAttention"):
        from_llama(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="DeepseekV2Attention or DeepseekV3Attention"):
        from_deepseek(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="bias_k"):
        from_torch(nn.MultiheadAttention(DIM, 4, add_bias_kv=True))
    with pytest.raises(UnsupportedError, match="bias_k"):
        from_torch(nn.MultiheadAttention(DIM, 4, add_zero_attn=True))
    with pytest.raises(UnsupportedError, match="self-attention converts"):
        from_gpt2(GPT2Attention(GPT2Config(n_embd=DIM, n_head=4), is_cross_attention=True))
    with pytest.raises(UnsupportedError, match="H key/value heads"):
        to_torch(GroupedQueryAttention(DIM, 4, 2))
    with pytest.raises(UnsupportedError, match="no place for q_norm, sinks"):
        to_llama(MultiHeadAttention(DIM, 4, qk_norm=1e-6, sinks=True))
    with pytest.raises(UnsupportedError, match="have biases"):
        to_gpt2(MultiHeadAttention(DIM, 4))
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 16,
    }
    config = LlamaConfig(hidden_size=DIM, num_attention_heads=4, rope_parameters=longrope)
    with pytest.raises(UnsupportedError, match="'longrope' is not known here"):
        from_llama(LlamaAttention(config, 0))
