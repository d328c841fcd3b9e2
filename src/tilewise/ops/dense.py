"""`attention` and `explain`: the dense functional API."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from tilewise.backends.base import Backend
from tilewise.errors import bad_value
from tilewise.masks import Mask
from tilewise.ops import checks
from tilewise.ops.arguments import Arguments, DenseOptions, Options, autocast, build, known
from tilewise.ops.biases import Relative
from tilewise.ops.dispatch import Plan
from tilewise.ops.library import attend, attend_plainly, route
from tilewise.spec import AttentionSpec, Window


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    bias: Tensor | Relative | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    q_offset: int | Tensor | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(QKᵀ·scale)V and everything that is commonly added to it, in O(N) memory.

    Row i of the queries has position `p = i + M − N`, or `p = i + q_offset` where that is given. With
    `s = softcap(scale·q·k) + bias + alibi`, entries that a restriction forbids become −∞, then comes the softmax over
    the keys (and the sink), then dropout, then the sum of values.

    Args:
        q: [B, H, N, D], float32, float16, bfloat16 or float64 (on the PyTorch backends).
        k: [B, Hkv, M, D] with H a multiple of Hkv: query head h reads key head h // (H / Hkv) (GQA, MQA).
        v: [B, Hkv, M, Dv].
        mask: a mask value, or a boolean tensor broadcastable to [B, H, N, M], True = attend.
        causal: allow keys j ≤ p.
        window: (left, right): allow p − left ≤ j ≤ p + right; None for an unlimited side.
        bias: a floating tensor broadcastable to [B, H, N, M], or `biases.Relative(values)`; both have a gradient.
        alibi: slopes [H] or [B, H], constants: adds −slope·|p − j|.
        softcap: c > 0: scores become c·tanh(scale·q·k / c).
        sink: [H]: one more logit per head whose value row is zero; has a gradient.
        scale: of the scores; 1/√D by default.
        dropout: the probability of dropping an entry of P; what is kept is divided by 1 − dropout. The mask is a pure
            function of one seed drawn from torch's generator: `torch.manual_seed` reproduces it on every backend.
        q_offset: position of query row 0: an int, or int32 [B]. 0 is top-left alignment.
        layout: "bhsd" as above, or "bshd" for q, k, v and out as [B, N, H, D]. Mask and bias stay [B, H, N, M].
        return_lse: also return the natural log of the softmax denominator.
        deterministic: only use algorithms that give the same bits every time.
        backend: "auto", or one of "hopper", "triton", "tiled", "sdpa", "standard", which then runs or raises.

    Returns:
        out, shaped as q with Dv for D, in q's dtype; with `return_lse`, also lse [B, H, N] in float32 (float64 for
        float64 inputs), which has a gradient too. A row that may see nothing gives 0 and, without a sink, −∞.

    Raises:
        ValueError, TypeError: bad input, before anything runs.
        UnsupportedError: the named backend cannot do this; the message says which one can.

    A tensor whose last dim is not contiguous is copied once; all other strides are used as they are. Under autocast,
    float32 and half-precision q, k and v are cast as in `scaled_dot_product_attention`. First derivatives only.

    Source: Dao, FlashAttention-2 (2023); Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
    """
    signature = None
    if mask is None and bias is None and alibi is None and sink is None and not dropout:
        options = (causal, window, softcap, scale, q_offset, layout, deterministic, backend)
        signature, call = _recall(q, k, v, options)
        if call is not None:
            if layout == "bshd":
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out, lse = attend_plainly(q, k, v, *call)
            if layout == "bshd":
                out = out.transpose(1, 2)
            return (out, lse) if return_lse else out
    arguments = _arguments(
        q,
        k,
        v,
        layout,
        mask=mask,
        causal=causal,
        window=window,
        bias=bias,
        alibi=alibi,
        softcap=softcap,
        sink=sink,
        scale=scale,
        dropout=dropout,
        q_offset=q_offset,
        deterministic=deterministic,
        backend=backend,
    )
    out, lse = attend(arguments.seeded())
    if signature is not None:
        _remember(signature, arguments)
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


Call = tuple[tuple[object, ...], Plan[AttentionSpec], Backend]
"""What a call became: the op's arguments after q, k and v, and its plan."""

_calls: dict[tuple[object, ...], Call] = {}


def _recall(
    q: Tensor, k: Tensor, v: Tensor, options: tuple[object, ...]
) -> tuple[tuple[object, ...] | None, Call | None]:
    """The signature of a call whose only tensors are q, k and v, and what an equal call became.

    Its checks and its plan depend on nothing else, and take longer than a small call computes. No signature where a
    call must be looked at anew.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return None, None
    try:
        if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
            return None, None
        signature = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, options)
        return signature, _calls.get(signature)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None, None  # no tensors, or options of a strange type: the checks will name them


def _remember(signature: tuple[object, ...], arguments: Arguments) -> None:
    if len(_calls) >= 4096:
        _calls.clear()
    if arguments.q_offset is None and not arguments.q.is_meta:
        _calls[signature] = (arguments[3:], *route(arguments.signature(), arguments.backend))


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    *,
    layout: str = "bhsd",
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Plan[AttentionSpec]:
    """What `attention` would do with these arguments, without doing it: the backend, its configuration and the reason,
    and for each other backend one sentence on why not.

    Args and errors as for `attention`. The tensors are only looked at.
    """
    del return_lse  # every backend computes the LSE anyway
    known("explain", options)
    arguments = _arguments(q, k, v, layout, mask=mask, causal=causal, window=window, **options)
    if q.device.type == "meta":
        fix = "q.expand(...) of one element on the device that you ask about needs no memory either"
        raise bad_value("q", "device meta", "a device that something runs on", fix)
    plan, _ = route(arguments.signature(), arguments.backend)
    return replace(plan, rejected=dict(plan.rejected))


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    *,
    mask: Mask | Tensor | None,
    causal: bool,
    window: Window | None,
    **options: Unpack[Options],
) -> Arguments:
    checks.layout_name(layout)
    checks.floats(q, k, v)
    q, k, v = autocast(q), autocast(k), autocast(v)
    checks.qkv(q, k, v, rank=4)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    checks.heads_and_lengths(q, k, v, layout)
    return build(q, k, v, mask=mask, causal=causal, window=window, **options)
