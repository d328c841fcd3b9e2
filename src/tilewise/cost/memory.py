"""Bytes of memory: the tensors of attention, what each method holds beside them, and KV caches.

Three quantities, kept apart because folklore mixes them: `qkvo`, the inputs and the output, which every method has;
`working`, what the forward holds beyond them at its peak; `saved`, what must be kept beyond them until the backward.
Sizes are in bytes; 1 KB = 1024 bytes wherever this project prints one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tilewise import errors
from tilewise.cost.counts import accumulator_itemsize, itemsize, visible_scores
from tilewise.spec import AttentionSpec

Method = Literal["standard", "flash_v1", "flash_v2", "linear", "sparse"]
METHODS: tuple[Method, ...] = ("standard", "flash_v1", "flash_v2", "linear", "sparse")


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """Bytes of one attention layer by one method."""

    qkvo: int
    """Q, K, V and O."""
    working: int
    """Beyond them, at the peak of the forward."""
    saved: int
    """Beyond them, from the forward to the backward."""

    @property
    def inference(self) -> int:
        """Peak of a forward that keeps nothing."""
        return self.qkvo + self.working

    @property
    def training(self) -> int:
        """Held by the layer between its forward and its backward."""
        return self.qkvo + self.saved

    @property
    def share_beyond_qkvo(self) -> float:
        """Part of the forward's peak that is not Q, K, V, O: the O(N²) share, for standard attention."""
        return self.working / self.inference if self.inference else 0.0


def qkvo_bytes(spec: AttentionSpec) -> int:
    """Q and O of all query heads, K and V of all K/V heads, in the spec's dtype."""
    q_rows = spec.batch * spec.heads * spec.q_len
    k_rows = spec.batch * spec.kv_heads * spec.k_len
    return (q_rows + k_rows) * (spec.head_dim + spec.v_head_dim) * itemsize(spec.dtype)


def score_matrix_bytes(spec: AttentionSpec) -> int:
    """One `[B, H, N, M]` matrix, S or P, in the spec's dtype."""
    return spec.batch * spec.heads * spec.q_len * spec.k_len * itemsize(spec.dtype)


def row_statistic_bytes(spec: AttentionSpec) -> int:
    """One number a row, `[B, H, N]` in the accumulator dtype: lse, or m, or l, or delta."""
    return spec.batch * spec.heads * spec.q_len * accumulator_itemsize(spec.dtype)


def attention_memory(
    spec: AttentionSpec,
    method: Method,
    *,
    scores: int | None = None,
    block: int = 128,
    feature_dim: int | None = None,
    chunk: int = 64,
) -> AttentionMemory:
    """Memory of one layer.

    - `standard`: the forward holds S and P at once; autograd keeps P alone, as the softmax gradient needs no S. (That
      "S and P are stored for the backward" is said of kernels that keep both.)
    - `flash_v1`: m and l, and O in the accumulator dtype while it is rewritten; m and l are saved.
    - `flash_v2`: lse, saved.
    - `sparse`: as flash_v2, and a 4-byte index for each visited block×block tile. `scores` is the number of visible
      scores of one head (a tile map's count), `visible_scores(spec)` unless given; with tiles only partly filled the
      indices are more, and a tile map knows how many.
    - `linear`: a state `[feature_dim, Dv]` and a normaliser `[feature_dim]` a head and chunk, in the accumulator dtype,
      all of which are saved. `feature_dim` is D unless given.

    Raises ValueError for an unknown method.
    """
    statistic = row_statistic_bytes(spec)
    wide = accumulator_itemsize(spec.dtype)
    if method == "standard":
        working, saved = 2 * score_matrix_bytes(spec), score_matrix_bytes(spec)
    elif method == "flash_v1":
        working, saved = 2 * statistic + statistic * spec.v_head_dim, 2 * statistic
    elif method == "flash_v2":
        working = saved = statistic
    elif method == "sparse":
        visible = visible_scores(spec) if scores is None else scores
        working = saved = statistic + 4 * spec.batch * spec.heads * math.ceil(visible / block**2)
    elif method == "linear":
        features = spec.head_dim if feature_dim is None else feature_dim
        states = spec.batch * spec.heads * math.ceil(spec.k_len / chunk)
        working = saved = states * features * (spec.v_head_dim + 1) * wide
    else:
        raise errors.bad_value("method", repr(method), f"one of {', '.join(METHODS)}")
    return AttentionMemory(qkvo_bytes(spec), working, saved)


# KV caches: what one layer keeps for one token, in elements


def kv_cache_elements(kv_heads: int, head_dim: int, v_head_dim: int | None = None) -> int:
    """`Hkv·(D + Dv)`: MHA with Hkv = H, GQA with Hkv groups, MQA with Hkv = 1."""
    return kv_heads * (head_dim + (head_dim if v_head_dim is None else v_head_dim))


def latent_cache_elements(kv_rank: int, rope_dim: int) -> int:
    """`r_kv + d_rope`: MLA keeps one latent and one rotary key for all heads."""
    return kv_rank + rope_dim


def cache_bytes(elements: int, *, tokens: int, layers: int = 1, batch: int = 1, dtype: str = "float16") -> int:
    """A cache with `elements` a token and layer."""
    return elements * tokens * layers * batch * itemsize(dtype)


def int8_cache_bytes(
    kv_heads: int, head_dim: int, v_head_dim: int | None = None, *, tokens: int, layers: int = 1, batch: int = 1
) -> int:
    """Keys and values in int8, one byte an element, and one float32 scale a token and head for each of the two."""
    return (kv_cache_elements(kv_heads, head_dim, v_head_dim) + 2 * 4 * kv_heads) * tokens * layers * batch
