"""`attention_decode`: one or a few query tokens at the end of each sequence, against a cache; and its operator.

Inference only. The operator `tilewise::attention_decode` has tensors and numbers in its schema; the spec and the plan
exist only inside it, on concrete shapes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.library import Library

from tilewise.backends.decoding import DecodeBackend, DecodeOperands, empty_decoded
from tilewise.backends.registry import REGISTRY
from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.masks import Mask
from tilewise.masks.patterns import Tree
from tilewise.masks.tensors import pack
from tilewise.ops import checks
from tilewise.ops.arguments import _device_name, _unit_stride, autocast
from tilewise.ops.dispatch import Plan, check_name, choose
from tilewise.ops.library import one_by_one, readable
from tilewise.ops.views import KVView, Viewed
from tilewise.resident import used
from tilewise.spec import DecodeSpec, Window


class DecodeOptions(TypedDict, total=False):
    """What `attention_decode` takes beside q and kv."""

    causal: bool
    window: Window | None
    softcap: float | None
    sink: Tensor | None
    alibi: Tensor | None
    scale: float | None
    mask: Mask | Tensor | None
    num_splits: int | None
    layout: str
    backend: str


class DecodeArguments(NamedTuple):
    """The arguments of `tilewise::attention_decode`, in the order of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    lengths: Tensor
    page_table: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    start: Tensor | None
    sink: Tensor | None
    alibi: Tensor | None
    tree: Tensor | None
    cu_seqlens_q: Tensor | None
    v_dim: int
    ring: bool
    q_len: int
    max_length: int
    causal: bool
    left: int | None
    right: int | None
    scale: float | None
    softcap: float | None
    num_splits: int | None
    backend: str

    def operands(self) -> DecodeOperands:
        return DecodeOperands(*self[:12])

    def signature(self) -> tuple[Any, ...]:
        """All that the spec depends on; `describe` turns it into the spec."""
        return (
            self.q.shape,
            self.k.shape,
            None if self.page_table is None else self.page_table.shape[1],
            self.lengths.shape[0],
            self.q.dtype,
            self.q.device,
            self.v is None,
            self.k_scale is not None,
            self.start is not None,
            self.sink is not None,
            self.alibi is not None,
            self.tree is not None,
            self.cu_seqlens_q is not None,
            *self[12:15],
            1 << max(self.max_length - 1, 0).bit_length(),
            *self[16:22],
        )


def describe(
    q_shape: torch.Size,
    k_shape: torch.Size,
    pages: int | None,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    latent: bool,
    int8: bool,
    padded: bool,
    sink: bool,
    alibi: bool,
    tree: bool,
    packed: bool,
    v_dim: int,
    ring: bool,
    q_len: int,
    max_length: int,
    causal: bool,
    left: int | None,
    right: int | None,
    scale: float | None,
    softcap: float | None,
    num_splits: int | None,
) -> DecodeSpec:
    """The spec of a call with this signature."""
    head_dim = q_shape[3]
    capacity = k_shape[2] * (1 if pages is None else pages)
    return DecodeSpec(
        batch=batch,
        heads=q_shape[1],
        kv_heads=k_shape[1],
        q_len=q_len,
        max_length=max_length,
        head_dim=head_dim,
        v_head_dim=v_dim,
        capacity=capacity,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        scale=head_dim**-0.5 if scale is None else scale,
        causal=causal,
        window=(left, right),
        page_size=None if pages is None else k_shape[2],
        ring=ring,
        latent=latent,
        int8=int8,
        padded=padded,
        tree=tree,
        alibi=alibi,
        softcap=softcap,
        sink=sink,
        packed=packed,
        q_total=q_shape[2] if packed else 0,
        num_splits=num_splits,
    )


@lru_cache(maxsize=4096)
def route(signature: tuple[Any, ...], backend: str) -> tuple[Plan[DecodeSpec], DecodeBackend]:
    """The plan and the implementation for a call; one look-up on the hot path."""
    plan = choose(describe(*signature), backend, "decode")
    return plan, REGISTRY["decode", plan.backend]


_library = Library("tilewise", "FRAGMENT")
_library.define(
    "attention_decode(Tensor q, Tensor k, Tensor? v, Tensor lengths, Tensor? page_table, Tensor? k_scale, "
    "Tensor? v_scale, Tensor? start, Tensor? sink, Tensor? alibi, Tensor? tree, Tensor? cu_seqlens_q, SymInt v_dim, "
    "bool ring, SymInt q_len, SymInt max_length, bool causal, SymInt? left, SymInt? right, float? scale, "
    "float? softcap, int? num_splits, str backend) -> (Tensor, Tensor)"
)


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = DecodeArguments(*args)
    plan, backend = route(arguments.signature(), arguments.backend)
    assert isinstance(plan.spec, DecodeSpec)
    return backend.forward(arguments.operands(), plan.spec, plan.config)


_library.impl("attention_decode", _decode, "CompositeExplicitAutograd")
torch.library.register_fake("tilewise::attention_decode", lambda *args: empty_decoded(args[0], args[12]))
decode_op = torch.ops.tilewise.attention_decode.default
torch.library.register_vmap("tilewise::attention_decode", one_by_one(decode_op))


@overload
def attention_decode(
    q: Tensor, kv: KVView | Viewed, *, return_lse: Literal[False] = False, **options: Unpack[DecodeOptions]
) -> Tensor: ...


@overload
def attention_decode(
    q: Tensor, kv: KVView | Viewed, *, return_lse: Literal[True], **options: Unpack[DecodeOptions]
) -> tuple[Tensor, Tensor]: ...


def attention_decode(
    q: Tensor,
    kv: KVView | Viewed,
    *,
    causal: bool = True,
    window: Window | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    mask: Mask | Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    layout: str = "bhsd",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last T tokens of each sequence over all that a cache holds. The cache is not appended to.

    The T queries of sequence b are its last tokens: query t has position `p = lengths[b] − T + t`. The rest is as in
    `attention`, for each sequence at its own length.

    Args:
        q: [B, H, T, D], T small (all else works too); H a multiple of Hkv.
        kv: a cache, or its view. int8 keys and values are dequantised where they are read.
        causal: allow tokens j ≤ p. With one query it says nothing.
        window: (left, right) as in `attention`. A rolling cache needs a left side with left + T ≤ capacity, once
            tokens have been overwritten.
        softcap, sink, alibi, scale: as in `attention`.
        mask: which of the last T tokens each query may see, as `masks.Tree(parents)` (a draft tree) or a boolean tensor
            [T, T] or [B, T, T], True = attend. Tokens before them are all seen.
        return_lse: also return the natural log of the softmax denominator.
        num_splits: into how many parts the tokens of a sequence are cut, so that few sequences fill a GPU; the parts
            are merged. None chooses by the device, the batch and the bound of the lengths.
        layout: "bhsd", or "bshd" for q and out as [B, T, H, D].
        backend: "auto", or one of "hopper", "triton", "tiled", "sdpa", "standard", which then runs or raises.

    Returns:
        out, shaped as q with Dv for D, in q's dtype; with `return_lse`, also lse [B, H, T] in float32 (float64 for
        float64). A query that may see nothing gives 0 and, without a sink, −∞. No gradient.

    Raises:
        ValueError, TypeError: bad input, before anything runs; also a q that requires grad.
        UnsupportedError: another mask value, or a named backend that cannot do this.

    Source: Dao et al., Flash-Decoding for long-context inference (2023).
    """
    arguments = _arguments(
        q,
        kv,
        layout,
        causal=causal,
        window=window,
        softcap=softcap,
        sink=sink,
        alibi=alibi,
        scale=scale,
        mask=mask,
        num_splits=num_splits,
        backend=backend,
    )
    out, lse = decode_op(*arguments)
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def explain_decode(q: Tensor, kv: KVView | Viewed, **options: Unpack[DecodeOptions]) -> Plan[DecodeSpec]:
    """What `attention_decode` would do with these arguments, without doing it: see `explain`."""
    for name in options:
        if name not in DecodeOptions.__annotations__:
            raise TypeError(f"explain_decode() has no argument {name!r}")
    given: dict[str, Any] = {"layout": "bhsd", **options}
    arguments = _arguments(q, kv, **given)
    plan, _ = route(arguments.signature(), arguments.backend)
    return replace(plan, rejected=dict(plan.rejected))


def _arguments(q: Tensor, kv: KVView | Viewed, layout: str, **options: Any) -> DecodeArguments:
    checks.layout_name(layout)
    checks.is_float("q", q)
    if q.dim() != 4:
        want = "4 dimensions, [B, H, T, D] or, with layout='bshd', [B, T, H, D]"
        raise bad_value("q", f"shape {list(q.shape)}", want)
    q = autocast(q)
    if layout == "bshd":
        q = q.transpose(1, 2)
    view = as_view(kv)
    if q.shape[0] != view.batch:
        raise bad_value("q", f"batch {q.shape[0]}", f"the cache's batch {view.batch}")
    return build(q, view, q_len=q.shape[2], **options)


def as_view(kv: KVView | Viewed) -> KVView:
    if isinstance(kv, KVView):
        return kv
    if not hasattr(kv, "view") or isinstance(kv, Tensor):
        raise bad_type("kv", kv, "a cache or a KVView", "attention(q, k, v) takes keys and values as tensors")
    return kv.view()


def build(
    q: Tensor,
    view: KVView,
    *,
    q_len: int,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: Window | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    alibi: Tensor | None = None,
    scale: float | None = None,
    mask: Mask | Tensor | None = None,
    num_splits: int | None = None,
    backend: str = "auto",
) -> DecodeArguments:
    """The op's arguments for q [B, H, T, D], or packed [1, H, tokens, D], against `view`.

    Raises ValueError, TypeError or UnsupportedError for any bad argument.
    """
    check_name(backend)
    checks.flag("causal", causal)
    if q.requires_grad and torch.is_grad_enabled():
        fix = "torch.no_grad() or torch.inference_mode() around decoding; attention() trains"
        raise bad_value("q", "a tensor that requires grad", "one that does not: decoding has no gradient", fix)
    _check_view(view, q)
    left, right = checks.window_pair(window)
    checks.finite("scale", scale)
    checks.finite("softcap", softcap, positive=True)
    if num_splits is not None and (isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1):
        raise bad_value("num_splits", num_splits, "an int of at least 1, or None to choose")
    if alibi is not None:
        checks.per_head("alibi", alibi, q, q.shape[1], view.batch)
        alibi = torch.atleast_2d(alibi.detach().to(torch.float32))
    if sink is not None:
        checks.per_head("sink", sink, q, q.shape[1])
        sink = sink.detach()
    bound = view.max_length if view.max_length > 0 else view.capacity
    if view.ring and bound > view.capacity and (left is None or left + q_len > view.capacity):
        got = f"{window} with {q_len} query tokens"
        want = f"a left side with left + T ≤ {view.capacity}, what the rolling cache keeps"
        raise bad_value("window", got, want, "fewer query tokens at once, or a cache with more room")
    return DecodeArguments(
        q=_unit_stride(q),
        k=view.k,
        v=view.v,
        lengths=view.lengths,
        page_table=view.page_table,
        k_scale=view.k_scale,
        v_scale=view.v_scale,
        start=view.start,
        sink=sink,
        alibi=alibi,
        tree=None if mask is None else _tree(mask, q, view.batch, q_len, cu_seqlens_q is not None),
        cu_seqlens_q=cu_seqlens_q,
        v_dim=view.v_dim or (view.k if view.v is None else view.v).shape[3],
        ring=view.ring,
        q_len=q_len,
        max_length=bound,
        causal=causal,
        left=left,
        right=right,
        scale=scale,
        softcap=softcap,
        num_splits=num_splits,
        backend=backend,
    )


def _check_view(view: KVView, q: Tensor) -> None:
    """Whether a view is sound and fits q [·, H, ·, D]. Values on the device are not read."""
    k, v = view.k, view.v
    if k.device != q.device:
        raise bad_value("kv", f"device {k.device}", f"q's device {q.device}", f"cache.to({str(q.device)!r})")
    int8 = view.k_scale is not None
    want = torch.int8 if int8 else q.dtype
    for name, pool in (("kv.k", k), ("kv.v", v)):
        if pool is None:
            continue
        if pool.dim() != 4 or (pool.shape[-1] > 1 and pool.stride(-1) != 1):
            got = f"shape {list(pool.shape)}, strides {list(pool.stride())}"
            raise bad_value(name, got, "[B | pages, Hkv, tokens, D] with a contiguous last dim")
        if pool.dtype != want:
            fix = "q.to(cache.dtype)" if not int8 else None
            raise bad_type(name, f"dtype {pool.dtype}", f"{want}, as {'k_scale' if int8 else 'q'} says", fix)
        if pool.shape[:3] != k.shape[:3]:
            raise bad_value(name, f"shape {list(pool.shape)}", f"k's {list(k.shape[:3])} before the last dim")
    if k.shape[3] != q.shape[3]:
        raise bad_value("q", f"head dim {q.shape[3]}", f"the cache's {k.shape[3]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        fits = k.shape[1] and q.shape[2] % k.shape[1] == 0
        fix = "q.transpose(1, 2), or the other layout=" if fits else None
        raise bad_value("q", f"{q.shape[1]} heads", f"a multiple of the cache's {k.shape[1]} heads", fix)
    if v is None and not 0 < view.v_dim <= k.shape[3]:
        raise bad_value("kv.v_dim", view.v_dim, f"1 to {k.shape[3]}, the columns of k that are values")
    batch = view.lengths.shape[0]
    if view.page_table is None and k.shape[0] != batch:
        raise bad_value("kv.k", f"batch {k.shape[0]}", f"that of lengths, {batch}")
    if view.ring and view.page_table is not None:
        raise bad_value("kv.ring", True, "False with a page table")
    integers = (("kv.lengths", view.lengths), ("kv.start", view.start), ("kv.page_table", view.page_table))
    for name, x in integers:
        if x is None:
            continue
        rank = 2 if name == "kv.page_table" else 1
        if x.dtype != torch.int32 or x.dim() != rank or x.shape[0] != batch or x.device != q.device:
            got = f"{x.dtype} of shape {list(x.shape)} on {x.device}"
            raise bad_value(name, got, f"int32 [B{', max_pages' if rank == 2 else ''}] with B = {batch} on {q.device}")
    if int8 and (v is None) != (view.v_scale is None):
        raise bad_value("kv.v_scale", view.v_scale, "scales exactly where there are int8 values")
    for name, x in (("kv.k_scale", view.k_scale), ("kv.v_scale", view.v_scale)):
        if x is not None and (x.dtype != torch.float32 or x.shape != k.shape[:3]):
            raise bad_value(name, f"{x.dtype} of shape {list(x.shape)}", f"float32 {list(k.shape[:3])}")
    if batch and readable(view.lengths):
        _check_lengths(view)


def _check_lengths(view: KVView) -> None:
    """What only the values say; where they lie on a GPU, reading them would stall the stream."""
    lengths = view.lengths.tolist()
    most = max(lengths)
    if min(lengths) < 0:
        raise bad_value("kv.lengths", lengths, "numbers of tokens, at least 0")
    if most > view.capacity and not view.ring:
        raise bad_value("kv.lengths", lengths, f"at most the {view.capacity} tokens that k has room for")
    if 0 < view.max_length < most:
        raise bad_value("kv.max_length", view.max_length, f"an upper bound of lengths, here at least {most}")
    if view.start is not None and readable(view.start) and min(view.start.tolist()) < 0:
        raise bad_value("kv.start", view.start.tolist(), "numbers of tokens, at least 0")


def _tree(mask: Mask | Tensor, q: Tensor, batch: int, q_len: int, packed: bool) -> Tensor:
    """[1 | B, T, T] bool."""
    if packed:
        raise UnsupportedError(
            "mask: packed queries have no common T, so a draft tree has no place. Fix: a padded batch"
        )
    if isinstance(mask, Tree):
        nodes = mask.parents.shape[0]
        if nodes > q_len:
            raise bad_value("mask", f"a tree of {nodes} nodes", f"at most T = {q_len} nodes")
        parents = pack(mask)[1][0]
        if torch.compiler.is_compiling():
            return _paths(parents, q_len, q.device)
        matrix = _tree_matrix if readable(parents) else _tree_matrix.__wrapped__  # a tracer's tensors are not kept
        return used(matrix(mask, q_len, q.device), q.device)
    if isinstance(mask, Mask):
        raise UnsupportedError(
            f"mask: decoding takes masks.Tree or a boolean [T, T] tensor over the last T tokens, not {mask}. "
            "Fix: causal=, window=; or attention() over keys and values as tensors"
        )
    if not isinstance(mask, Tensor):
        raise bad_type("mask", mask, "masks.Tree or a boolean tensor, True = attend")
    if mask.dtype != torch.bool:
        raise bad_type("mask", f"dtype {mask.dtype}", "masks.Tree or a boolean tensor, True = attend", "mask != 0")
    if tuple(mask.shape) not in ((q_len, q_len), (batch, q_len, q_len)):
        raise bad_value("mask", f"shape {list(mask.shape)}", f"[T, T] or [B, T, T] with T = {q_len}, B = {batch}")
    checks.same_place("mask", mask, q)
    return mask.reshape(-1, q_len, q_len)


@lru_cache(maxsize=256)
def _tree_matrix(mask: Tree, q_len: int, device: torch.device) -> Tensor:
    """A tree's matrix, kept: a step that is captured, or must not wait, copies nothing from the host."""
    with torch.inference_mode(False):
        return torch.from_numpy(mask.to_dense(q_len, q_len)).to(device)[None]


def _paths(parents: Tensor, q_len: int, device: torch.device) -> Tensor:
    """[1, T, T] bool of a tree given by `parents` [nodes]: node t sees its ancestors, itself and what is before node 0;
    rows before node 0 are causal. In operators that torch.compile traces."""
    nodes = parents.shape[0]
    node = torch.arange(nodes, device=parents.device)
    seen = (parents[:, None] == node) | (node[:, None] == node)
    for _ in range((nodes - 1).bit_length()):  # each product doubles the length of the paths
        seen = (seen.float() @ seen.float()) > 0.0
    matrix = torch.ones(q_len, q_len, dtype=torch.bool, device=parents.device).tril()
    matrix[q_len - nodes :, q_len - nodes :] = seen
    return matrix[None].to(device)
