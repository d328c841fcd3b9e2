"""`append_kv`: write new tokens behind those that a cache's pools hold; the operator `tilewise::cache_append`.

The only thing that writes into a cache. It mutates its pools and lengths in place, reads nothing on the host where
Triton runs it, and so works inside a CUDA graph and under `torch.compile`. Tokens that find no room are dropped: what
can be checked on the host is checked by the cache, before this is called.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from tilewise.backends.triton import import_obstacle, interpreting
from tilewise.ops.views import KVView

INT8_LEVELS = 127

_library = Library("tilewise", "FRAGMENT")
_library.define(
    "cache_append(Tensor(a!) pool_k, Tensor(b!)? pool_v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor(e!) lengths, "
    "Tensor k, Tensor? v, Tensor? counts, Tensor? page_table, bool ring) -> ()"
)


def append_kv(view: KVView, k: Tensor, v: Tensor | None, counts: Tensor | None = None) -> None:
    """Write k [B, Hkv, T, D] and v [B, Hkv, T, Dv] behind the tokens of `view`, and add to its lengths, in place.

    counts [B] int32: sequence b takes only its first `counts[b]` of the T tokens. A ring keeps the last `capacity`
    tokens of all; elsewhere tokens beyond the capacity, or without a page in the pool, are dropped.
    """
    torch.ops.tilewise.cache_append.default(
        view.k, view.v, view.k_scale, view.v_scale, view.lengths, k, v, counts, view.page_table, view.ring
    )


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 and float32 scales [...]: x ≈ int8·scale with scale = max|x| / 127, and |error| ≤ scale/2."""
    wide = x.to(torch.float32)
    scale = wide.abs().amax(-1) / INT8_LEVELS
    steps = wide / scale.masked_fill(scale == 0.0, 1.0)[..., None]
    return steps.round().to(torch.int8), scale


def _append(
    pool_k: Tensor,
    pool_v: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    lengths: Tensor,
    k: Tensor,
    v: Tensor | None,
    counts: Tensor | None,
    page_table: Tensor | None,
    ring: bool,
) -> None:
    page_size = pool_k.shape[2]
    capacity = page_size if page_table is None else page_table.shape[1] * page_size
    if k.numel() and (interpreting() or k.is_cuda) and import_obstacle() is None:
        from tilewise.backends.triton.append import append

        append(pool_k, pool_v, k_scale, v_scale, lengths, k, v, counts, page_table, ring)
    elif k.numel():
        _scatter(pool_k, pool_v, k_scale, v_scale, lengths, k, v, counts, page_table, ring, capacity)
    if counts is None:
        lengths.add_(k.shape[2])
    else:
        lengths.add_(counts.clamp(0, k.shape[2]))
    if not ring:
        lengths.clamp_(max=capacity)


def _scatter(
    pool_k: Tensor,
    pool_v: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    lengths: Tensor,
    k: Tensor,
    v: Tensor | None,
    counts: Tensor | None,
    page_table: Tensor | None,
    ring: bool,
    capacity: int,
) -> None:
    """The same in plain PyTorch, on any device; off the CPU the host waits for the device once."""
    page_size = pool_k.shape[2]
    steps = torch.arange(k.shape[2], device=k.device)
    count = torch.full_like(lengths, k.shape[2]) if counts is None else counts.clamp(0, k.shape[2])
    token = lengths[:, None] + steps
    taken = steps < count[:, None]
    if ring:
        taken &= token >= (lengths + count)[:, None] - capacity
        token %= capacity
    else:
        taken &= token < capacity
    b, t = taken.nonzero(as_tuple=True)
    token = token[b, t]
    page, slot = b, token
    if page_table is not None:
        page, slot = page_table[b, token // page_size].long(), token % page_size
        inside = (page >= 0) & (page < pool_k.shape[0])
        b, t, page, slot = b[inside], t[inside], page[inside], slot[inside]
    for pool, scales, x in ((pool_k, k_scale, k), (pool_v, v_scale, v)):
        if pool is None or x is None:
            continue
        rows = x[b, :, t]
        if scales is not None:
            rows, scale = quantize(rows)
            scales[page, :, slot] = scale
        pool[page, :, slot] = rows


_library.impl("cache_append", _append, "CompositeExplicitAutograd")
torch.library.register_fake("tilewise::cache_append", lambda *args: None)
