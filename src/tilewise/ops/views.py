"""`KVView`: what kernels see of a cache. A cache is bookkeeping; a view is tensors and a few integers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class KVView(NamedTuple):
    """The keys and values that sequences hold, where they lie, and how many there are.

    A *page* is a stretch of tokens that lie one after another, `[Hkv, tokens, D]`, for every K/V head: one head of one
    page is then a rectangle in memory, which is what a tile load (and the copy engine) wants. A dense cache is the
    case in which each sequence owns one page as long as its capacity, so one layout serves both. Any strides work as
    long as the last dim is contiguous: a pool kept as `[pages, page_size, Hkv, D]` is passed as `pool.transpose(1, 2)`.

    Token t of sequence b lies at `k[b, :, t]` (dense), `k[b, :, t % capacity]` (`ring`), or
    `k[page_table[b, t // page_size], :, t % page_size]` (paged).
    """

    k: Tensor
    """Dense and ring: [B, Hkv, capacity, D]. Paged: the pool [pages, Hkv, page_size, D]. int8 with `k_scale`."""
    v: Tensor | None
    """The same with Dv; None where the values are the first `v_dim` columns of `k` (a latent cache)."""
    lengths: Tensor
    """[B] int32 on k's device: tokens that each sequence has; token t of a sequence has position t."""
    page_table: Tensor | None = None
    """[B, max_pages] int32: the pages of each sequence in order. Entries outside the pool hold no token."""
    k_scale: Tensor | None = None
    """[B | pages, Hkv, capacity | page_size] float32: the stored int8 times this is the key. None: k is as it is."""
    v_scale: Tensor | None = None
    start: Tensor | None = None
    """[B] int32: tokens before it are left padding, which nothing sees. None: no padding."""
    ring: bool = False
    """A rolling buffer: only the last `capacity` tokens are there."""
    max_length: int = 0
    """An upper bound of `lengths` that the host knows; it decides how work is split, never the result."""
    v_dim: int = 0
    """Dv."""

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def page_size(self) -> int:
        """Tokens of one page; the capacity where there is no page table."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Most tokens of one sequence that can be there at once."""
        return self.page_size if self.page_table is None else self.page_table.shape[1] * self.page_size


class Viewed(Protocol):
    """Anything that has a view: every cache."""

    def view(self) -> KVView: ...
