"""What the attention modules share where there is a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.caches import Cache
from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.masks import Mask, Tree
from tilewise.ops import checks
from tilewise.ops.decode import attention_decode, explain_decode
from tilewise.ops.dense import explain
from tilewise.ops.views import KVView


def check_cache(cache: Any, batch: int, counts: Any, dropping: bool, make: str) -> None:
    """Raises TypeError or ValueError for a cache that cannot serve a module with a batch of this size; `make` is how
    one that can is made."""
    if not hasattr(cache, "append") or not hasattr(cache, "view"):
        raise bad_type("cache", cache, "a cache of keys and values of tilewise.caches", make)
    if counts is not None and not isinstance(counts, Tensor):
        raise bad_type("counts", counts, "an int32 tensor [B]", "torch.tensor(counts, dtype=torch.int32)")
    if cache.batch != batch:
        raise bad_value("cache", f"room for {cache.batch} sequences", f"q's batch {batch}")
    if dropping:
        raise bad_value("cache", "a cache in training, with dropout", "a module in evaluation", "module.eval()")


def append(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cache: Cache,
    counts: Tensor | None,
    mask: Mask | Tensor | None,
    whole: Callable[[], tuple[Tensor, Tensor, Tensor]],
    **options: Any,
) -> bool:
    """Append k and v [B, Hkv, T, ·] for the queries q [B, H, T, D]; whether the cache was empty before.

    `whole` gives tensors of the shapes that `attention` would then get, which are only looked at.

    If so, the tokens at hand are all there is, and `attention` serves them, with gradients of nothing but the same
    result; if not, `attend` does. A captured or compiled step is replayed over a cache that has grown, so there nothing
    is taken for empty. All that can be wrong with the options is said before the cache has changed.
    """
    if q.requires_grad and torch.is_grad_enabled():
        fix = "torch.no_grad() or torch.inference_mode() around decoding"
        raise bad_value("cache", "a cache where gradients are wanted", "no gradients: decoding has none", fix)
    if torch.compiler.is_compiling():  # what the host knows would be compiled in
        fresh = False
        _check_mask(mask, q, counts, fresh)
    else:
        view = cache.view()
        fresh = _is_empty(cache, view, counts, causal=options["causal"])
        _check_mask(mask, q, counts, fresh)
        if fresh:
            explain(*whole(), mask=over_batch(mask), **options)
        else:
            _check_ring(view, options["window"], q.shape[2])
        if not fresh and options["backend"] != "auto":
            explain_decode(q.new_empty(*q.shape[:3], view.head_dim), view, **options)
    cache.append(k, v, counts=counts)
    return fresh


def _is_empty(cache: Cache, view: KVView, counts: Tensor | None, *, causal: bool) -> bool:
    """Padding hides behind the causal rule only on the right; left padding is known to the cache alone."""
    if cache.max_length > 0 or view.start is not None:
        return False
    if view.k.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return counts is None or causal


def over_batch(mask: Mask | Tensor | None) -> Mask | Tensor | None:
    """A mask over new tokens as `attention` takes it: [B, T, T] becomes [B, 1, T, T]."""
    return mask.unsqueeze(1) if isinstance(mask, Tensor) and mask.dim() == 3 else mask


def _check_mask(mask: Mask | Tensor | None, q: Tensor, counts: Tensor | None, fresh: bool) -> None:
    if mask is None or isinstance(mask, Tree):
        return
    if isinstance(mask, Mask):
        if fresh:
            return
        raise UnsupportedError(
            f"mask: over a cache that holds tokens it is masks.Tree or a boolean [T, T] tensor over the T new ones, "
            f"not {mask}. Fix: causal and window are the module's own; or a whole sequence without a cache"
        )
    checks.boolean_mask(mask)
    t = q.shape[2]
    if tuple(mask.shape) not in ((t, t), (q.shape[0], t, t)):
        want = f"[T, T] or [B, T, T] over the T = {t} new tokens"
        raise bad_value("mask", f"shape {list(mask.shape)}", want, "cache.pad(start) hides left padding")
    if counts is not None:
        raise bad_value("mask", "a tensor beside counts", "one of the two")


def _check_ring(view: KVView, window: Any, tokens: int) -> None:
    if not view.ring or view.max_length + tokens <= view.capacity:
        return
    left = None if window is None else window[0]
    if left is None or left + tokens > view.capacity:
        want = f"a left side with left + T ≤ {view.capacity}, what the rolling cache keeps"
        raise bad_value("window", f"{window} with T = {tokens} tokens", want, "fewer tokens at once, or a larger cache")


def normalized(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """norm(x) in x's dtype, computed in that of the norm's weights (under autocast the two differ)."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


def attend(q: Tensor, cache: Cache, counts: Tensor | None, *, mask: Mask | Tensor | None, **options: Any) -> Tensor:
    """Attention of the T tokens q [B, H, T, D], just appended, over all that the cache holds: [B, H, T, Dv].

    With `counts` [B] only the first of them were. The kernel takes queries that end where their sequence ends, so each
    sequence's rows are rolled until its last real token is the last row, and rolled back.
    """
    if counts is None:
        return attention_decode(q, cache, mask=mask, **options)
    rows = torch.arange(q.shape[2], device=q.device)
    shift = counts.to(q.device)[:, None]
    out = attention_decode(_rows(q, rows + shift), cache, mask=mask, **options)
    return _rows(out, rows - shift)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, D] with row t of sequence b taken from row index[b, t] mod T."""
    index = index.remainder(x.shape[2]).long()[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
