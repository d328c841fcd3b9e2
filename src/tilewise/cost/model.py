"""What a whole GPT costs: parameters, optimizer, activations, logits. The answer to "why am I still out of memory?".

Once attention is O(N) the rest decides: activations grow with tokens times layers, logits with tokens times vocabulary,
weights and optimizer not at all. The training step is that of mixed precision as PyTorch's autocast does it: weights,
their gradients and the residual stream in float32, products in 16 bits.

Source for the activations' form: Korthikanti et al., "Reducing activation recomputation in large transformer models"
(2022), section 4.1, which counts 34 bytes a token, layer and unit of width for a stream in 16 bits; here the stream is
in float32, as autocast leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tilewise import errors
from tilewise.cost.counts import itemsize, self_attention, standard_traffic
from tilewise.cost.hardware import Device
from tilewise.cost.tiles import flash_v1_counts, flash_v2_counts

AttentionKind = Literal["standard", "flash"]
ATTENTIONS: tuple[AttentionKind, ...] = ("standard", "flash")
AttentionVersion = Literal["standard", "flash_v1", "flash_v2"]
Checkpointing = Literal["none", "block"]
CHECKPOINTINGS: tuple[Checkpointing, ...] = ("none", "block")


@dataclass(frozen=True, slots=True)
class GPT:
    """A decoder-only transformer of GPT-2's form: learned positions, biases, GELU, the output tied to the embedding."""

    layers: int
    dim: int
    heads: int
    vocab: int = 50257
    context: int = 1024
    kv_heads: int | None = None
    """Key/value heads; `heads` unless given."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return (self.heads if self.kv_heads is None else self.kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Two norms, the four projections of attention, the two of the feed-forward part, all with biases."""
        d, kv = self.dim, self.kv_dim
        attention = 2 * (d * d + d) + 2 * (d * kv + kv)
        return 4 * d + attention + 8 * d * d + 5 * d

    @property
    def parameters(self) -> int:
        """Embeddings of tokens and positions (the first is also the output), the layers, the last norm."""
        return (self.vocab + self.context) * self.dim + self.layers * self.layer_parameters + 2 * self.dim


MODELS: dict[str, GPT] = {
    "gpt2": GPT(12, 768, 12),
    "gpt2-medium": GPT(24, 1024, 16),
    "gpt2-large": GPT(36, 1280, 20),
    "gpt2-xl": GPT(48, 1600, 25),
}


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one training step, by what holds them; all but `recomputed` are there at once when the loss is taken."""

    weights: int
    """float32."""
    half_weights: int
    """The 16-bit copies of the layers' weights that autocast keeps during a step."""
    gradients: int
    optimizer: int
    """Adam: two float32 numbers a parameter."""
    activations: int
    """Kept from the forward to the backward, all layers."""
    scores: int
    """Of them, what standard attention keeps: P, and its 16-bit copy for the product with V."""
    logits: int
    recomputed: int
    """With checkpointing: one layer's activations, rebuilt during its backward."""

    @property
    def fixed(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The higher of two moments: the loss (logits there, no recomputation yet), and the first layer's backward."""
        return self.fixed + self.half_weights + self.activations + max(self.logits, self.recomputed)


def layer_activation_bytes(
    model: GPT, batch: int, seq: int, *, attention: AttentionKind = "flash", dtype: str = "bfloat16"
) -> tuple[int, int]:
    """What one layer keeps for its backward under autocast, and how much of it is standard attention's N×N part.

    A token and unit of width, in bytes: the inputs of both norms in float32 (4 + 4), their outputs cast for the
    products (2 + 2), Q, K, V (6 for MHA), the attention's output (2), the feed-forward part's hidden values before and
    after GELU (8 + 8): 36. Beside them 16 bytes a token for the two norms' mean and deviation, and 4 bytes a head for
    the LSE. Standard attention keeps P in float32 and in 16 bits, 6 bytes a score, instead of the LSE.

    Raises ValueError for an unknown kind of attention.
    """
    if attention not in ATTENTIONS:
        raise errors.bad_value("attention", repr(attention), f"one of {', '.join(ATTENTIONS)}")
    half, tokens = itemsize(dtype), batch * seq
    width = model.dim
    elements_half = 2 * width + (width + 2 * model.kv_dim) + width + 8 * width
    kept = tokens * (2 * 4 * width + half * elements_half + 16)
    if attention == "flash":
        return kept + tokens * model.heads * 4, 0
    scores = batch * model.heads * seq * seq * (4 + half)
    return kept + scores, scores


def logits_bytes(model: GPT, batch: int, seq: int, *, dtype: str = "bfloat16", chunk: int | None = None) -> int:
    """The loss: logits in `dtype`, their float32 copy, its log-softmax and its gradient, `(2 + 12)` bytes each.

    With `chunk` tokens at a time (the fused linear and cross-entropy) only that many rows exist at once.
    """
    rows = batch * seq if chunk is None else min(chunk, batch * seq)
    return rows * model.vocab * (itemsize(dtype) + 3 * 4)


def training_memory(
    model: GPT,
    batch: int,
    seq: int,
    *,
    attention: AttentionKind = "flash",
    checkpointing: Checkpointing = "none",
    chunked_loss: int | None = None,
    optimizer: bool = True,
    dtype: str = "bfloat16",
) -> TrainingMemory:
    """Memory of one training step with `batch` sequences of `seq` tokens.

    Args:
        checkpointing: "block" keeps each layer's float32 input alone and recomputes the layer in its backward.
        chunked_loss: tokens whose logits exist at once; all unless given.

    Raises ValueError for an unknown choice.
    """
    if checkpointing not in CHECKPOINTINGS:
        raise errors.bad_value("checkpointing", repr(checkpointing), f"one of {', '.join(CHECKPOINTINGS)}")
    each, scores = layer_activation_bytes(model, batch, seq, attention=attention, dtype=dtype)
    checkpointed = checkpointing == "block"
    tokens = batch * seq
    last = tokens * model.dim * (4 + itemsize(dtype))
    return TrainingMemory(
        weights=4 * model.parameters,
        half_weights=itemsize(dtype) * model.parameters,
        gradients=4 * model.parameters,
        optimizer=8 * model.parameters if optimizer else 0,
        activations=last + model.layers * (tokens * model.dim * 4 if checkpointed else each),
        scores=0 if checkpointed else model.layers * scores,
        logits=logits_bytes(model, batch, seq, dtype=dtype, chunk=chunked_loss),
        recomputed=each if checkpointed else 0,
    )


def least_step_seconds(
    model: GPT, batch: int, seq: int, device: Device, version: AttentionVersion = "flash_v2", *, dtype: str = "bfloat16"
) -> float:
    """The least that a device's peak and bandwidth allow for a training step, by how attention is computed.

    Every product at the peak rate, and attention's own traffic at the full bandwidth after it; three times the
    forward's traffic for both passes. Real steps take longer: nothing reaches either peak, and norms, activations and
    the optimizer are left out. `standard` moves S and P through memory, `flash_v1` rewrites O, m and l for every tile,
    `flash_v2` reads K and V again for every Q tile (128×64 tiles, no cache).

    Raises ValueError for an unknown version.
    """
    spec = self_attention(
        seq, model.head_dim, batch=batch, heads=model.heads, kv_heads=model.kv_heads, dtype=dtype, causal=True
    )
    traffic = {
        "standard": lambda: standard_traffic(spec),
        "flash_v1": lambda: flash_v1_counts(spec, 128, 64).traffic,
        "flash_v2": lambda: flash_v2_counts(spec, 128, 64).traffic,
    }
    if version not in traffic:
        raise errors.bad_value("version", repr(version), f"one of {', '.join(traffic)}")
    flops = step_flops(model, batch, seq, causal=version != "standard")
    return flops / device.peak(dtype) + 3 * model.layers * traffic[version]().bytes / device.bandwidth


def step_flops(model: GPT, batch: int, seq: int, *, causal: bool = False) -> int:
    """One training step: `6·parameters` a token (without the position embedding), and attention's 3.5 forwards.

    Attention is counted whole by convention; `causal` counts the half that is needed.
    """
    tokens = batch * seq
    dense = 6 * tokens * (model.parameters - model.context * model.dim)
    scores = batch * model.heads * seq * seq // (2 if causal else 1)
    return dense + model.layers * 14 * scores * model.head_dim
