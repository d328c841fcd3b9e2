"""A problem as a frozen value: what dispatch, the cost model, the benchmark and the reports all speak.

A spec holds sizes, names and numbers, never a tensor, and this file imports no torch.
Notation as everywhere: B batch, H query heads, Hkv key/value heads, N query length, M key length,
D query/key head dim, Dv value head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

Window = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One call of `attention` or `attention_varlen`.

    A packed problem (`packed=True`) holds `batch` sequences one after another: `q_len` and `k_len` are then the
    longest lengths, `q_total` and `k_total` the token counts. A dense one leaves the totals at 0.

    `device` is a device type with its architecture where that matters: "cpu", "sm_90", "gfx942".
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    v_head_dim: int
    dtype: str = "float32"
    device: str = "cpu"
    scale: float = 1.0
    causal: bool = False
    window: Window = (None, None)
    q_offset: int | Literal["tensor"] | None = None
    """None aligns bottom-right (`M − N`); "tensor" is one offset a sequence, known only on the device."""
    mask: str | None = None
    """Canonical mask expression (`str(mask)`), or None."""
    bias: tuple[int, int, int, int] | None = None
    """Shape of the dense additive bias before broadcasting to [B, H, N, M], or None."""
    relative: int | None = None
    """Radius R of the relative bias `[H, 2R+1]`, or None."""
    alibi: bool = False
    softcap: float | None = None
    sink: bool = False
    dropout: float = 0.0
    packed: bool = False
    q_total: int = 0
    k_total: int = 0
    deterministic: bool = False
    needs_bias_grad: bool = False
    """The dense bias wants a gradient: some fast paths can take a bias but not differentiate it."""

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def windowed(self) -> bool:
        return self.window != (None, None)

    @property
    def offset(self) -> int | None:
        """Position of query row 0 where it is the same for the whole batch and known here; else None."""
        if self.q_offset is None:
            return None if self.packed else self.k_len - self.q_len
        return self.q_offset if isinstance(self.q_offset, int) else None

    @property
    def reach(self) -> Window:
        """Causal and window as one (left, right), without the sides that forbid nothing at these sizes.

        One query at the end of its keys, for example, sees them all, causal or not.
        """
        left, right = self.window
        if self.causal:
            right = 0 if right is None else min(right, 0)
        offset = self.offset
        if offset is not None and not self.packed:
            if right is not None and offset + right >= self.k_len - 1:
                right = None
            if left is not None and offset + self.q_len - 1 - left <= 0:
                left = None
        return left, right

    @property
    def features(self) -> tuple[str, ...]:
        """The names of what goes beyond plain softmax(QKᵀ)V, for messages and reports."""
        present = {
            "causal": self.causal,
            "window": self.windowed,
            "q_offset": self.q_offset is not None,
            "mask": self.mask is not None,
            "bias": self.bias is not None,
            "relative bias": self.relative is not None,
            "alibi": self.alibi,
            "softcap": self.softcap is not None,
            "sink": self.sink,
            "dropout": self.dropout > 0.0,
            "GQA": self.group > 1,
            "D≠Dv": self.head_dim != self.v_head_dim,
            "packed": self.packed,
        }
        return tuple(name for name, there in present.items() if there)

    def as_dict(self) -> dict[str, object]:
        """A JSON-ready form; `AttentionSpec(**d)` with lists turned to tuples gives the spec back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        heads = f"H={self.heads}" if self.group == 1 else f"H={self.heads}/{self.kv_heads}"
        dim = f"D={self.head_dim}" if self.head_dim == self.v_head_dim else f"D={self.head_dim}/{self.v_head_dim}"
        shape = f"B={self.batch} {heads} N={self.q_len} M={self.k_len} {dim} {self.dtype} {self.device}"
        return f"{shape} [{', '.join(self.features)}]" if self.features else shape


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """One call of `attention_decode`, or of `attention_varlen` against pages: queries at the end of each sequence.

    `max_length` is the host's bound of the sequences' lengths, rounded up to a power of two so that a growing cache
    does not make a new spec at every step; the lengths themselves are known on the device only.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    """Query tokens of each sequence; of the longest where they are packed."""
    max_length: int
    head_dim: int
    v_head_dim: int
    capacity: int
    """Tokens of one sequence that the cache can hold at once."""
    dtype: str = "float32"
    device: str = "cpu"
    scale: float = 1.0
    causal: bool = True
    window: Window = (None, None)
    page_size: int | None = None
    """Tokens of a page, or None for a dense cache."""
    ring: bool = False
    latent: bool = False
    """The values are the first columns of the keys."""
    int8: bool = False
    padded: bool = False
    tree: bool = False
    alibi: bool = False
    softcap: float | None = None
    sink: bool = False
    packed: bool = False
    q_total: int = 0
    num_splits: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def k_len(self) -> int:
        """Most keys that a query can see."""
        return min(self.max_length, self.capacity)

    @property
    def limits(self) -> Window:
        """Causal and window as one (left, right)."""
        left, right = self.window
        return left, 0 if self.causal and (right is None or right > 0) else right

    @property
    def features(self) -> tuple[str, ...]:
        """The names of what goes beyond plain softmax(QKᵀ)V over a dense cache, for messages and reports."""
        present = {
            "causal": self.causal,
            "window": self.window != (None, None),
            f"pages of {self.page_size}": self.page_size is not None,
            "ring": self.ring,
            "latent": self.latent,
            "int8": self.int8,
            "left padding": self.padded,
            "tree": self.tree,
            "alibi": self.alibi,
            "softcap": self.softcap is not None,
            "sink": self.sink,
            "GQA": self.group > 1,
            "packed": self.packed,
        }
        return tuple(name for name, there in present.items() if there)

    def as_dict(self) -> dict[str, object]:
        """A JSON-ready form; `DecodeSpec(**d)` with lists turned to tuples gives the spec back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        heads = f"H={self.heads}" if self.group == 1 else f"H={self.heads}/{self.kv_heads}"
        dim = f"D={self.head_dim}" if self.head_dim == self.v_head_dim else f"D={self.head_dim}/{self.v_head_dim}"
        shape = f"B={self.batch} {heads} T={self.q_len} M≤{self.max_length} {dim} {self.dtype} {self.device}"
        return f"{shape} [{', '.join(self.features)}]" if self.features else shape


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One call of `linear_attention`, after feature maps that have no name: `head_dim` is then the feature size.

    A packed problem (`packed=True`) holds `batch` sequences in `q_len` tokens altogether.
    """

    batch: int
    heads: int
    q_len: int
    k_len: int
    head_dim: int
    v_head_dim: int
    dtype: str = "float32"
    device: str = "cpu"
    causal: bool = True
    feature_map: Literal["identity", "elu", "relu"] = "identity"
    """What is computed on the way: other maps come before."""
    decay: Literal["none", "token", "channel"] = "none"
    """None; one factor a token and head (retention, scalar gates, FAVOR+'s stabiliser); one a key channel (GLA)."""
    exclusive: bool = False
    """Token i reads S_{i−1}, as in RWKV-6."""
    delta: bool = False
    """The delta rule: what a token writes takes the place of what its key found."""
    normalize: bool = False
    scale: float = 1.0
    state: bool = False
    """Starts from a given state."""
    packed: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """What goes beyond `Σ_j (q_i·k_j) v_j`, for messages and reports."""
        present = {
            "causal": self.causal,
            self.feature_map: self.feature_map != "identity",
            f"{self.decay} decay": self.decay != "none",
            "exclusive": self.exclusive,
            "delta rule": self.delta,
            "normalised": self.normalize,
            "state": self.state,
            "packed": self.packed,
        }
        return tuple(name for name, there in present.items() if there)

    def as_dict(self) -> dict[str, object]:
        """A JSON-ready form; `LinearSpec(**d)` gives the spec back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        dim = f"D={self.head_dim}" if self.head_dim == self.v_head_dim else f"D={self.head_dim}/{self.v_head_dim}"
        shape = f"B={self.batch} H={self.heads} N={self.q_len} M={self.k_len} {dim} {self.dtype} {self.device}"
        return f"{shape} [{', '.join(self.features)}]" if self.features else shape
