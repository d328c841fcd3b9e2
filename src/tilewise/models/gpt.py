"""A GPT with any mechanism: GPT-2's block (Radford et al., 2019) around one of the modules of `tilewise.nn`.

The output layer is the embedding's weight, and is only multiplied chunk by chunk where a loss is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tilewise import nn as modules
from tilewise.caches import KV, DenseCache, Latent
from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.masks import BigBird, Documents, Longformer, Mask
from tilewise.ops import checks
from tilewise.ops.cross_entropy import linear_cross_entropy
from tilewise.ops.library import attention_op

Positions = Literal["auto", "learned", "rotary", "none"]
Saving = Literal["none", "block", "selective"]

BLOCK = 64
"""Tokens of a BigBird block."""


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The sizes of a GPT; its checkpoints carry them."""

    vocab_size: int
    length: int
    """Most tokens of a sequence, with learned positions; what it is trained on, with others."""
    dim: int = 128
    layers: int = 4
    heads: int = 4
    mechanism: str = "mha"
    """One of MECHANISMS."""
    positions: Positions = "auto"
    """"learned" vectors added to the embedding, "rotary" queries and keys, or "none"; "auto" takes what the mechanism
    is usually given."""
    kv_heads: int | None = None
    """Of "gqa" and the sparse ones; by default heads / 4 of gqa (at least 1), all heads of the others."""
    window: int = 256
    """Keys that a query of "window", "longformer" or "bigbird" sees behind it, besides the global and random ones."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        checks.whole(
            vocab_size=self.vocab_size, length=self.length, dim=self.dim, layers=self.layers, heads=self.heads,
            window=self.window,
        )  # fmt: skip
        if self.mechanism not in MECHANISMS:
            raise bad_value("mechanism", repr(self.mechanism), f"one of {', '.join(MECHANISMS)}")
        allowed = MECHANISMS[self.mechanism].positions
        if self.positions not in ("auto", *allowed):
            raise bad_value("positions", repr(self.positions), f"{' or '.join(allowed)} with {self.mechanism}")
        if self.dim % self.heads:
            raise bad_value("heads", self.heads, f"a divisor of dim = {self.dim}")
        if self.placed == "rotary" and (self.dim // self.heads) % 2:
            raise bad_value("heads", self.heads, f"an even head dim dim / heads, not {self.dim // self.heads}")
        checks.probability("dropout", self.dropout)

    @property
    def placed(self) -> str:
        """How positions are told."""
        return MECHANISMS[self.mechanism].positions[0] if self.positions == "auto" else self.positions


class Mechanism(NamedTuple):
    """How a name becomes a module."""

    make: Callable[[GPTConfig], nn.Module]
    positions: tuple[str, ...]
    """What may tell positions, the usual first."""
    mask: Callable[[GPTConfig, int], Mask | None] | None = None
    """What queries may see beyond the module's own rule, for n tokens."""
    documents: bool = True
    """Packed sequences can be kept apart."""


def _multi_head(config: GPTConfig, kv_heads: int | None = None, **settings: Any) -> nn.Module:
    rotary = modules.RotaryEmbedding(config.dim // config.heads) if config.placed == "rotary" else None
    return modules.GroupedQueryAttention(
        config.dim, config.heads, config.kv_heads or kv_heads or config.heads, bias=True, causal=True, rotary=rotary,
        dropout=config.dropout, residual_dropout=config.dropout, **settings,
    )  # fmt: skip


def _latent(config: GPTConfig) -> nn.Module:
    """With DeepSeek's proportions: latents of four heads, a rotated part of half a head."""
    head_dim = config.dim // config.heads
    return modules.MultiHeadLatentAttention(
        config.dim, config.heads, kv_rank=4 * head_dim, nope_dim=head_dim, rope_dim=max(2, head_dim // 4 * 2),
        v_dim=head_dim, dropout=config.dropout, residual_dropout=config.dropout,
    )  # fmt: skip


def _bigbird(config: GPTConfig, n: int) -> Mask | None:
    return BigBird(BLOCK, max(2, 2 * config.window // BLOCK), 1, 2) if n > BLOCK else None


_ANY = ("rotary", "learned", "none")
MECHANISMS: dict[str, Mechanism] = {
    "mha": Mechanism(_multi_head, _ANY),
    "mqa": Mechanism(partial(_multi_head, kv_heads=1), _ANY),
    "gqa": Mechanism(lambda config: _multi_head(config, max(1, config.heads // 4)), _ANY),
    "mla": Mechanism(_latent, ("none", "learned")),
    "window": Mechanism(lambda config: _multi_head(config, window=(config.window, 0)), _ANY),
    "longformer": Mechanism(_multi_head, _ANY, lambda config, _: Longformer(2 * config.window, 0)),
    "bigbird": Mechanism(_multi_head, _ANY, _bigbird),
    "linear": Mechanism(
        lambda config: modules.LinearAttention(config.dim, config.heads, causal=True, bias=True),
        ("learned", "none"),
        documents=False,
    ),
    "retention": Mechanism(
        lambda config: modules.Retention(config.dim, config.heads), ("none", "learned"), documents=False
    ),
    "gla": Mechanism(
        lambda config: modules.GatedLinearAttention(config.dim, config.heads), ("none", "learned"), documents=False
    ),
    "rwkv6": Mechanism(
        lambda config: modules.RWKV6TimeMix(config.dim, config.heads), ("none", "learned"), documents=False
    ),
    "delta": Mechanism(
        lambda config: modules.GatedDeltaNet(config.dim, config.heads), ("none", "learned"), documents=False
    ),
}
"""What mixes the tokens, by name. MLA and retention rotate by themselves; gates and decays tell order by themselves."""


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.dim)
        self.attn = MECHANISMS[config.mechanism].make(config)
        self.ln_2 = nn.LayerNorm(config.dim)
        self.fc = nn.Linear(config.dim, 4 * config.dim)
        self.proj = nn.Linear(4 * config.dim, config.dim)
        self.dropout = config.dropout

    def forward(self, x: Tensor, mask: Mask | None, cache: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask=mask, cache=cache)
        y = self.proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))
        return x + (F.dropout(y, self.dropout, self.training) if self.dropout else y)


class GPT(nn.Module):
    """A language model, [B, N] tokens to [B, N, V] logits or to a loss.

    Args:
        config: its sizes and mechanism.

    `saving` says what a backward pass finds: "none" keeps everything, "block" computes each block again from its input,
    "selective" does so too but keeps what attention returned.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.saving: Saving = "none"
        self.wte = nn.Embedding(config.vocab_size, config.dim)
        self.wpe = nn.Embedding(config.length, config.dim) if config.placed == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.dim)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """GPT-2's: normal, and the layers that write into the stream smaller by √(2·layers). Its 0.02 belongs to a
        width of 1024; other widths get what gives sums of the same size."""
        std = 0.02 * math.sqrt(1024 / self.config.dim)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith((".o_proj", ".proj"))
                module.weight.normal_(0.0, std / (math.sqrt(2 * self.config.layers) if writes else 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        caches: list[Any] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Logits, or the mean loss where there are targets.

        Args:
            ids: [B, N] int64 tokens.
            targets: [B, N] int64, the token after each; −100 counts for nothing.
            documents: [B, N] integers: tokens see those of their own document only.
            caches: of `make_caches`; the tokens go on from what they hold.
            start: position of the first token, for learned positions.

        Returns:
            [B, N, V] logits, or a scalar in float32.

        Raises:
            ValueError, TypeError: bad input; more tokens than there are learned positions.
            UnsupportedError: documents with a mechanism that cannot keep them apart.
        """
        self.check(ids, documents, start)
        n = ids.shape[1]
        x = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe.weight[start : start + n]
        x = F.dropout(x, self.config.dropout, self.training)
        rule = MECHANISMS[self.config.mechanism].mask
        mask = None if rule is None else rule(self.config, n)
        if documents is not None:
            mask = Documents(documents) if mask is None else mask & Documents(documents)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = self._run(block, x, mask, cache)
        x = self.ln_f(x)
        if targets is None:
            return F.linear(x, self.wte.weight)
        return linear_cross_entropy(x, self.wte.weight, targets)

    def _run(self, block: nn.Module, x: Tensor, mask: Mask | None, cache: Any) -> Tensor:
        if self.saving == "none" or not torch.is_grad_enabled():
            return block(x, mask, cache)
        options: dict[str, Any] = {}
        if self.saving == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, [attention_op])
        return checkpoint(block, x, mask, cache, use_reentrant=False, **options)  # type: ignore[return-value]

    def check(self, ids: Any, documents: Any = None, start: int = 0) -> None:
        """Raises what `forward` raises of its arguments; runs nothing."""
        checks.is_tensor("ids", ids)
        if ids.dtype != torch.int64 or ids.dim() != 2:
            raise bad_type("ids", f"{ids.dtype} of shape {list(ids.shape)}", "int64 [B, N]")
        if self.wpe is not None and start + ids.shape[1] > self.config.length:
            fix = "a shorter sequence, or a model with positions='rotary'"
            raise bad_value("ids", f"{start + ids.shape[1]} tokens", f"at most {self.config.length} positions", fix)
        if documents is not None and not MECHANISMS[self.config.mechanism].documents:
            raise UnsupportedError(
                f"documents: {self.config.mechanism} sums over all that came before. Fix: leave them out, or a batch "
                "row for each document"
            )

    def make_caches(self, batch: int, capacity: int) -> list[Any] | None:
        """A cache for each block, for `batch` sequences of up to `capacity` tokens.

        None for "longformer" and "bigbird": their patterns depend on the length, so each token takes a whole pass.
        """
        if MECHANISMS[self.config.mechanism].mask is not None:
            return None
        weight = self.wte.weight
        caches = []
        for block in self.blocks:
            attn: Any = block.attn
            if hasattr(attn, "make_cache"):
                caches.append(attn.make_cache(batch))
                continue
            latent = self.config.mechanism == "mla"
            contents = Latent(attn.kv_rank, attn.rope_dim) if latent else KV(attn.kv_heads, attn.head_dim)
            caches.append(DenseCache(contents, batch, capacity, dtype=weight.dtype, device=weight.device))
        return caches
