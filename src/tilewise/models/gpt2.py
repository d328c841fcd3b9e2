"""GPT-2's weights in the format of Transformers: a folder with config.json and model.safetensors.

Transformers keeps q, k and v in one matrix and all matrices as [in, out]; beyond that the two models are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise.errors import UnsupportedError, bad_value
from tilewise.models.gpt import GPT, GPTConfig

PREFIX = "transformer."
_NAMES = {
    "ln_1.weight": "ln_1.weight",
    "ln_1.bias": "ln_1.bias",
    "ln_2.weight": "ln_2.weight",
    "ln_2.bias": "ln_2.bias",
    "mlp.c_fc.bias": "fc.bias",
    "mlp.c_proj.bias": "proj.bias",
    "attn.c_proj.bias": "attn.o_proj.bias",
}
_TURNED = {
    "attn.c_proj.weight": "attn.o_proj.weight",
    "mlp.c_fc.weight": "fc.weight",
    "mlp.c_proj.weight": "proj.weight",
}
_FIXED: dict[str, Any] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "n_inner": (None,),
}
"""Settings of a GPT2Config that change what is computed, and the values that are served."""


def load_gpt2(folder: Path | str) -> GPT:
    """GPT-2 from a folder that Transformers' `save_pretrained` wrote, in the dtype of its weights, on the CPU.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing.
        UnsupportedError: settings that change what is computed, and that this model does not have.
        ValueError: weights that do not fit the config.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if described.get("model_type") != "gpt2":
        raise UnsupportedError(f"{folder}: a {described.get('model_type')} model. Fix: this reads GPT-2's format")
    for name, served in _FIXED.items():
        if described.get(name, served[0]) not in served:
            raise UnsupportedError(f"{folder}: {name} = {described[name]!r}; the model here has {served[0]!r}")
    config = GPTConfig(
        vocab_size=described["vocab_size"],
        length=described["n_positions"],
        dim=described["n_embd"],
        layers=described["n_layer"],
        heads=described["n_head"],
        positions="learned",
    )
    # Checkpoints on the hub lack the prefix and carry causal masks.
    theirs = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    state = {"wte.weight": "wte.weight", "wpe.weight": "wpe.weight", "ln_f.weight": "ln_f.weight"}
    state |= {"ln_f.bias": "ln_f.bias"}
    try:
        weights = {ours: theirs[name] for name, ours in state.items()}
        for i in range(config.layers):
            weights |= {f"blocks.{i}.{ours}": tensor for ours, tensor in _block(theirs, f"h.{i}.").items()}
    except KeyError as missing:
        raise bad_value(str(folder), f"weights without {missing}", f"those of {config.layers} layers") from missing
    model = GPT(config).to(theirs["wte.weight"].dtype)
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        raise bad_value(str(folder), str(problem), "weights of the sizes in config.json") from problem
    return model


def _block(theirs: dict[str, Tensor], at: str) -> dict[str, Tensor]:
    ours = {name: theirs[at + other] for other, name in _NAMES.items()}
    ours |= {name: theirs[at + other].t() for other, name in _TURNED.items()}
    parts = zip(theirs[at + "attn.c_attn.weight"].chunk(3, 1), theirs[at + "attn.c_attn.bias"].chunk(3), strict=True)
    for name, (weight, bias) in zip("qkv", parts, strict=True):
        ours |= {f"attn.{name}_proj.weight": weight.t(), f"attn.{name}_proj.bias": bias}
    return ours


def save_gpt2(model: GPT, folder: Path | str) -> None:
    """Write config.json and model.safetensors that Transformers' `GPT2LMHeadModel.from_pretrained` reads.

    Weights that `load_gpt2` read from Transformers' own file are written back byte for byte.

    Raises:
        UnsupportedError: a model that is not GPT-2's: another mechanism, or no learned positions.
        OSError: the folder cannot be made or written.
    """
    from safetensors.torch import save_file

    config = model.config
    if config.mechanism != "mha" or model.wpe is None or config.kv_heads not in (None, config.heads):
        what = f"{config.mechanism} with {config.placed} positions"
        raise UnsupportedError(f"model: {what}; GPT-2's format holds mha with learned positions")
    ours = model.state_dict()
    theirs = {PREFIX + name: ours[name] for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    for i in range(config.layers):
        at, block = f"{PREFIX}h.{i}.", f"blocks.{i}."
        theirs |= {at + other: ours[block + name] for other, name in _NAMES.items()}
        theirs |= {at + other: ours[block + name].t() for other, name in _TURNED.items()}
        parts = [f"{block}attn.{each}_proj" for each in "qkv"]
        theirs[at + "attn.c_attn.weight"] = torch.cat([ours[f"{part}.weight"].t() for part in parts], 1)
        theirs[at + "attn.c_attn.bias"] = torch.cat([ours[f"{part}.bias"] for part in parts])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in theirs.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.length,
        "n_embd": config.dim,
        "n_layer": config.layers,
        "n_head": config.heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
