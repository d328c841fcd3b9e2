"""Attention of Transformers' models by tilewise: `attn_implementation="tilewise"` after one `register()`.

Transformers looks up two functions by that name: one that makes the mask, once a forward pass, and one that attends, in
every layer. Its masks are functions of four indices that are composed in nested closures. `mask` reads the compositions
it knows (causal, sliding window, padding, packed sequences) into a `Restriction`, which needs O(N) memory; anything
else, and what a compiled static cache wants, becomes the boolean [B, 1, N, M] that Transformers' own `sdpa` gets.

Where an argument changes the result and tilewise cannot do it, an error says so; nothing is ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilewise.errors import UnsupportedError, bad_value
from tilewise.masks import Documents, Mask
from tilewise.ops.dense import attention

NAME = "tilewise"
"""What to give as `attn_implementation`. (A name with "flash" in it would be looked for on a server.)"""

REFUSED = {
    "output_attentions": "the attention weights are never formed; attn_implementation='eager' returns them",
    "head_mask": "weights are not scaled head by head after the softmax; attn_implementation='eager' can",
    "layer_head_mask": "weights are not scaled head by head after the softmax; attn_implementation='eager' can",
    "cache": "the paged cache of Transformers' continuous batching; attn_implementation='paged|eager' reads it",
    "block_indices": "a block table; attn_implementation='eager' reads it",
    "indices": "a choice of keys; attn_implementation='eager' makes it",
}
"""Arguments that change the result and that are not served, with what to do instead."""

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
"""Arguments that say where packed sequences begin. Position ids say so too, and become part of the mask."""

# fmt: off
HARMLESS = frozenset((
    "max_length_q", "max_length_k", "position_ids", "position_embeddings", "cache_position", "past_key_values",
    "past_key_value", "use_cache", "return_dict", "output_hidden_states", "output_router_logits",
    "num_items_in_batch", "training", "hidden_states", "encoder_hidden_states", "logits_to_keep", "seq_idx",
    "token_type_ids", "labels", "deterministic",
))
# fmt: on
"""Arguments of whole models that Transformers hands down to attention, where they mean nothing more."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """Which keys a query may see, in O(N) memory: everything below at once.

    Key columns are those that the layer will have, M of them; query row i has position `i + offset` among them.
    """

    batch: int
    q_len: int
    k_len: int
    offset: int = 0
    causal: bool = False
    left: int | None = None
    """Furthest key behind a query."""
    right: int | None = None
    """Furthest key ahead of a query."""
    padding: Tensor | None = None
    """[B, M] booleans, True = a token."""
    documents: Tensor | None = None
    """[B, N] integers from 0, equal within a packed sequence; then N = M."""

    ndim = 4
    """What Transformers asks of a mask that is finished, such as one made before the model is called, in `generate`."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the boolean mask that this stands for."""
        return self.batch, 1, self.q_len, self.k_len

    def contiguous(self) -> Restriction:
        """Itself: `generate` asks this of the masks that it hands on."""
        return self


def register() -> None:
    """Make `attn_implementation="tilewise"` known to Transformers, for every model that goes through its interfaces.

    Raises:
        ImportError: Transformers is not installed.
        UnsupportedError: its interfaces are older than version 5's.
    """
    interface, masks = _interfaces()
    interface.register(NAME, attend)
    masks.register(NAME, mask)


def unregister() -> None:
    """Undo `register`; models that were given the name can then no longer run."""
    for each in _interfaces():
        each._global_mapping.pop(NAME, None)


def _interfaces() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ModuleNotFoundError as missing:
        raise ImportError(f"no {missing.name} here. Fix: pip install 'tilewise[hf]'") from missing
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        from transformers import __version__

        raise UnsupportedError(f"Transformers {__version__}: its mask interface has no q_offset. Fix: a newer one")
    return AttentionInterface, AttentionMaskInterface


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Restriction | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls in every layer.

    Args:
        module: the layer; only its `is_causal` is read.
        query: [B, H, N, D].
        key, value: [B, Hkv, M, D], with what the cache held.
        attention_mask: a `Restriction`, which `mask` made; a boolean tensor [B, 1, N, M], True = attend; a floating
            one, added to the scores; or None, for what the layer's `is_causal` says.
        dropout: of attention weights.
        scaling: of the scores; 1/√D by default.
        is_causal: overrules the layer's.
        softcap: as in Gemma 2.
        s_aux: [H], the sinks of GPT-OSS.
        position_bias: broadcastable to [B, H, N, M], as in T5; has a gradient.
        sliding_window: what the mask was made from already; looked at only where there is no mask.
        others: see REFUSED, PACKED and HARMLESS.

    Returns:
        ([B, N, H, Dv], None).

    Raises:
        ValueError, TypeError: as `attention`.
        UnsupportedError: an option that would be ignored.
    """
    _refuse(others, attention_mask)
    options: dict[str, Any] = {"scale": scaling, "dropout": dropout, "softcap": softcap, "sink": s_aux}
    n, m = query.shape[2], key.shape[2]
    bias = position_bias
    if isinstance(attention_mask, Restriction):
        options |= _restricted(attention_mask, n, m)
    elif attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        options |= _unmasked(bool(causal), n, m, sliding_window)
    elif attention_mask.dim() != 4:
        fix = "the model's own mask functions make one of a [B, M] mask"
        raise bad_value("attention_mask", f"shape {list(attention_mask.shape)}", "[B, 1, N, M] in a layer", fix)
    elif attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask[..., :m]
    else:
        bias = attention_mask[..., :m] if bias is None else bias + attention_mask[..., :m]
    if bias is not None:
        options["bias"] = bias
    return attention(query, key, value, **options).transpose(1, 2), None


def _refuse(others: dict[str, Any], attention_mask: Restriction | Tensor | None) -> None:
    for name, value in others.items():
        if value is None or value is False or name in HARMLESS:
            continue
        if name in PACKED:
            if isinstance(attention_mask, Restriction) and attention_mask.documents is not None:
                continue
            what = "packed sequences are told by position_ids that begin anew; leave out this argument and the mask"
        else:
            what = REFUSED.get(name, "tilewise does not know this argument and will not ignore it")
        raise UnsupportedError(f"{name}: {what}")


def _unmasked(causal: bool, n: int, m: int, window: int | None) -> dict[str, Any]:
    """The layer's own rule, where the model made no mask."""
    if not causal or n == 1:
        if window is not None and m > window:
            raise UnsupportedError("sliding_window without a mask: the model has to make one")
        return {}
    if n != m:
        raise UnsupportedError(
            f"no mask for {n} causal queries and {m} keys: which keys the first query may see is not said. "
            "Fix: give the model an attention_mask"
        )
    return {"causal": True, "window": None if window is None else (window - 1, 0)}


def _restricted(rows: Restriction, n: int, m: int) -> dict[str, Any]:
    if (rows.q_len, rows.k_len) != (n, m):
        got, want = f"{rows.q_len} queries and {rows.k_len} keys", f"the layer's {n} and {m}"
        raise bad_value(
            "attention_mask", f"a mask for {got}", want, "layers whose caches differ need masks of their own"
        )
    allowed: Mask | Tensor | None = None
    if rows.documents is not None:
        keys = rows.documents if rows.padding is None else rows.documents.masked_fill(~rows.padding, -1)
        allowed = Documents(rows.documents, keys)
    elif rows.padding is not None:
        allowed = rows.padding[:, None, None, :]
    windowed = rows.left is not None or rows.right is not None
    return {
        "mask": allowed,
        "causal": rows.causal,
        "window": (rows.left, rows.right) if windowed else None,
        "q_offset": None if rows.offset == m - n else rows.offset,
    }


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Restriction | Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Restriction | Tensor:
    """What Transformers calls to make a mask, once a forward pass.

    Args:
        batch_size: B.
        q_length, kv_length: N and M.
        q_offset, kv_offset: positions of the first query and the first key in the sequence.
        mask_function: (b, h, i, j) -> may query i see key j?
        attention_mask: [B, tokens] booleans, True = a token, False = padding; or what this function made before.
        use_vmap: `mask_function` takes single indices only.
        device: of the mask.
        others: what other implementations want to know.

    Returns:
        A `Restriction`; or, for a function it cannot read or an offset that is known on the device only, booleans
        [B, 1, N, M].
    """
    from transformers.masking_utils import prepare_padding_mask, sdpa_mask

    if isinstance(attention_mask, Restriction):
        return attention_mask
    rule = None if use_vmap or isinstance(q_offset, Tensor) or torch.compiler.is_compiling() else _read(mask_function)
    if rule is None or isinstance(q_offset, Tensor):
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        made = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # pyright: ignore[reportArgumentType]  (static caches give a tensor)
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
            **(others | skips),
        )
        assert made is not None
        return made
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if not _capturing(padding) and bool(padding.all()):
            padding = None
    return Restriction(batch_size, q_length, kv_length, q_offset - kv_offset, padding=padding, **rule)


def _capturing(x: Tensor) -> bool:
    """Whether the host must not wait for x."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _read(function: Callable[..., Any]) -> dict[str, Any] | None:
    """A mask function of Transformers as fields of a `Restriction`, or None if it is none of those known here."""
    from transformers import masking_utils as theirs

    if function is theirs.causal_mask_function:
        return {"causal": True}
    if function is theirs.bidirectional_mask_function:
        return {}
    if getattr(function, "__module__", None) != theirs.__name__:
        return None
    maker = getattr(function, "__qualname__", "").split(".")[0]
    held = inspect.getclosurevars(function).nonlocals
    if maker == "sliding_window_overlay":
        return {"left": held["sliding_window"] - 1}
    if maker == "sliding_window_bidirectional_overlay":
        return {"left": held["sliding_window"], "right": held["sliding_window"]}
    if maker == "packed_sequence_mask_function":
        return {"documents": held["packed_sequence_mask"]}
    if maker == "remap_positions_for_packed_sequence":
        # Positions inside a packed sequence count on one by one, so distances between its tokens are those of the rows.
        return _read(held["mask_function"])
    if maker != "and_masks":
        return None
    joined: dict[str, Any] = {}
    for each in held["mask_functions"]:
        rule = _read(each)
        if rule is None or joined.keys() & rule.keys():
            return None
        joined |= rule
    return joined
