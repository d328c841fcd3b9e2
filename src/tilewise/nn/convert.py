"""Weights from and to other libraries' attention layers.

`from_*` reads a layer, its settings and its weights, and gives the module that computes the same. `to_*` gives the
state dict that such a layer loads. Nothing is imported from those libraries: a layer is what its class is called and
what it holds. Weights are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tilewise.errors import UnsupportedError, bad_type
from tilewise.nn.attention import GroupedQueryAttention, MultiHeadAttention
from tilewise.nn.latent import MultiHeadLatentAttention
from tilewise.nn.rotary import RotaryEmbedding
from tilewise.ops.rotary_scaling import DynamicNTK, LinearScaling, Llama3, YaRN

State = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


def from_torch(layer: nn.MultiheadAttention, *, causal: bool = False) -> MultiHeadAttention:
    """The `MultiHeadAttention` that computes what `nn.MultiheadAttention` does, on [B, N, dim] whatever batch_first is.

    Raises UnsupportedError for bias_k / bias_v and add_zero_attn, which append a key.
    """
    _is(layer, "MultiheadAttention")
    if layer.bias_k is not None or layer.add_zero_attn:
        raise UnsupportedError(
            "layer: bias_k, bias_v and add_zero_attn append a key of their own, which no module here has"
        )
    module = MultiHeadAttention(
        layer.embed_dim,
        layer.num_heads,
        k_dim=layer.kdim,
        v_dim=layer.vdim,
        bias=layer.in_proj_bias is not None,
        out_bias=layer.out_proj.bias is not None,
        causal=causal,
        dropout=layer.dropout,
        **_place(layer.out_proj.weight),
    )
    names = ("q_proj", "k_proj", "v_proj")
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    state = {f"{name}.weight": w for name, w in zip(names, weights, strict=True)}
    if layer.in_proj_bias is not None:
        state |= {f"{name}.bias": b for name, b in zip(names, layer.in_proj_bias.chunk(3), strict=True)}
    state |= {f"o_proj.{name}": x for name, x in layer.out_proj.state_dict().items()}
    return _load(module, layer, state)


def to_torch(module: GroupedQueryAttention) -> State:
    """A state dict for `nn.MultiheadAttention(dim, heads, bias=…, kdim=…, vdim=…, batch_first=True)`.

    Raises UnsupportedError for what that class cannot hold: fewer K/V heads, another head dim, norms, sinks, a relative
    bias; masks, ALiBi, rotary and caps are not weights, and are the caller's to apply.
    """
    _plain(module, "nn.MultiheadAttention")
    if (
        module.kv_heads != module.heads
        or not module.dim == module.heads * module.head_dim == module.heads * module.v_head_dim
    ):
        raise UnsupportedError("module: nn.MultiheadAttention has H key/value heads of dim / H")
    projections = (module.q_proj, module.k_proj, module.v_proj)
    state = {f"out_proj.{name}": x.clone() for name, x in module.o_proj.state_dict().items()}
    if module.k_dim == module.v_dim == module.dim:
        state["in_proj_weight"] = torch.cat([p.weight.detach() for p in projections])
    else:
        state |= {f"{n}_proj_weight": p.weight.detach().clone() for n, p in zip("qkv", projections, strict=True)}
    if module.q_proj.bias is not None:
        state["in_proj_bias"] = torch.cat([p.bias.detach() for p in projections])
    return state


def from_llama(layer: nn.Module) -> GroupedQueryAttention:
    """The module that computes what Transformers' `LlamaAttention` does, its rotary embedding and causal rule included.

    Raises TypeError for another class, UnsupportedError for a rotary scaling that is not known here.
    """
    _is(layer, "LlamaAttention")
    config: Any = layer.config
    weights = layer.state_dict()
    head_dim = int(layer.head_dim)  # pyright: ignore[reportArgumentType]
    module = GroupedQueryAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim=head_dim,
        bias="q_proj.bias" in weights,
        out_bias="o_proj.bias" in weights,
        rotary=rotary_of(config, head_dim),
        causal=True,
        dropout=config.attention_dropout,
        **_place(weights["q_proj.weight"]),
    )
    return _load(module, layer, weights)


def to_llama(module: GroupedQueryAttention) -> State:
    """A state dict for Transformers' `LlamaAttention` of the same sizes.

    Raises UnsupportedError for weights that it has no place for.
    """
    _plain(module, "LlamaAttention")
    return _copied(module)


def from_gpt2(layer: nn.Module) -> MultiHeadAttention:
    """The module that computes what Transformers' `GPT2Attention` does (self-attention), its causal rule included.

    Raises TypeError for another class, UnsupportedError for a cross-attention layer.
    """
    _is(layer, "GPT2Attention")
    if layer.is_cross_attention:
        raise UnsupportedError("layer: only GPT-2's self-attention converts")
    config: Any = layer.config
    weights = layer.state_dict()
    module = MultiHeadAttention(
        config.hidden_size,
        config.num_attention_heads,
        bias=True,
        causal=True,
        scale=float(layer.scaling),  # pyright: ignore[reportArgumentType]
        dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
        **_place(weights["c_attn.weight"]),
    )
    state = {"o_proj.weight": weights["c_proj.weight"].T, "o_proj.bias": weights["c_proj.bias"]}
    for name, weight, bias in zip(
        ("q_proj", "k_proj", "v_proj"),
        weights["c_attn.weight"].chunk(3, dim=1),  # Conv1D keeps [in, out]
        weights["c_attn.bias"].chunk(3),
        strict=True,
    ):
        state |= {f"{name}.weight": weight.T, f"{name}.bias": bias}
    return _load(module, layer, state)


def to_gpt2(module: GroupedQueryAttention) -> State:
    """A state dict for Transformers' `GPT2Attention` of the same sizes.

    Raises UnsupportedError for weights that it has no place for, and for a module without biases.
    """
    _plain(module, "GPT2Attention")
    sizes = module.heads * module.head_dim, module.heads * module.v_head_dim, module.k_dim, module.v_dim
    if module.kv_heads != module.heads or set(sizes) != {module.dim}:
        raise UnsupportedError("module: GPT-2 has H key/value heads of dim / H, and one input")
    projections = (module.q_proj, module.k_proj, module.v_proj)
    if module.o_proj.bias is None or any(p.bias is None for p in projections):
        raise UnsupportedError("module: GPT-2's projections have biases")
    return {
        "c_attn.weight": torch.cat([p.weight.detach().T for p in projections], dim=1),
        "c_attn.bias": torch.cat([p.bias.detach() for p in projections]),
        "c_proj.weight": module.o_proj.weight.detach().T.contiguous(),
        "c_proj.bias": module.o_proj.bias.detach().clone(),
    }


_DEEPSEEK = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}
"""Names here and there."""


def from_deepseek(layer: nn.Module) -> MultiHeadLatentAttention:
    """The module that computes what Transformers' `DeepseekV2Attention` or `DeepseekV3Attention` does.

    Raises TypeError for another class, UnsupportedError for a rotary scaling that is not known here.
    """
    _is(layer, "DeepseekV2Attention", "DeepseekV3Attention")
    config: Any = layer.config
    weights = layer.state_dict()
    norm: Any = layer.kv_a_layernorm
    module = MultiHeadLatentAttention(
        config.hidden_size,
        config.num_attention_heads,
        q_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        v_dim=config.v_head_dim,
        rotary=rotary_of(config, config.qk_rope_head_dim, interleaved=getattr(config, "rope_interleave", True)),
        bias="o_proj.bias" in weights,
        eps=norm.variance_epsilon,
        scale=float(layer.scaling),  # pyright: ignore[reportArgumentType]
        dropout=config.attention_dropout,
        **_place(weights["o_proj.weight"]),
    )
    return _load(module, layer, _renamed(weights, {theirs: ours for ours, theirs in _DEEPSEEK.items()}))


def to_deepseek(module: MultiHeadLatentAttention) -> State:
    """A state dict for Transformers' `DeepseekV2Attention` or `DeepseekV3Attention` of the same sizes."""
    return _renamed(_copied(module), _DEEPSEEK)


def rotary_of(config: Any, head_dim: int, *, interleaved: bool = False) -> RotaryEmbedding:
    """The rotary embedding that a Transformers config describes, for heads of `head_dim` columns.

    Raises UnsupportedError for a kind of scaling that is not known here.
    """
    found: dict[str, Any] = config.rope_parameters
    kind = found.get("rope_type", "default")
    trained = found.get("original_max_position_embeddings") or config.max_position_embeddings
    make: dict[str, Callable[[], Any]] = {
        "default": lambda: None,
        "linear": lambda: LinearScaling(found["factor"]),
        "dynamic": lambda: DynamicNTK(found["factor"], config.max_position_embeddings),
        "llama3": lambda: Llama3(found["factor"], trained, found["low_freq_factor"], found["high_freq_factor"]),
        "yarn": lambda: YaRN(
            found.get("factor") or config.max_position_embeddings / trained,
            trained,
            found.get("beta_fast") or 32.0,
            found.get("beta_slow") or 1.0,
            found.get("truncate", True),
            found.get("mscale") or 0.0,
            found.get("mscale_all_dim") or 0.0,
            found.get("attention_factor"),
        ),
    }
    if kind not in make:
        raise UnsupportedError(f"config: rotary scaling {kind!r} is not known here; {', '.join(make)} are")
    dim = int(head_dim * found.get("partial_rotary_factor", 1.0))
    return RotaryEmbedding(dim, base=found["rope_theta"], interleaved=interleaved, scaling=make[kind]())


def _is(layer: object, *names: str) -> None:
    if type(layer).__name__ not in names:
        raise bad_type("layer", layer, f"a {' or '.join(names)}", "other layers may compute something else")


def _place(weight: Tensor) -> dict[str, Any]:
    return {"device": weight.device, "dtype": weight.dtype}


def _load(module: Module, layer: nn.Module, state: State) -> Module:
    """The module with these weights and the layer's mode."""
    module.load_state_dict(state)
    return module.train(layer.training)


def _copied(module: nn.Module) -> State:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def _renamed(state: State, names: dict[str, str]) -> State:
    return {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": x for key, x in state.items()}


def _plain(module: GroupedQueryAttention, target: str) -> None:
    extra = [name for name in ("q_norm", "relative", "sinks") if getattr(module, name) is not None]
    if extra:
        raise UnsupportedError(f"module: {target} has no place for {', '.join(extra)}")
