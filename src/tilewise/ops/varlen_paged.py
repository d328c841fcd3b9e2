"""`attention_varlen` against a cache: packed queries, keys in pages or used in part. Inference, by the decoding op.

Chunks of prefill and single decoding tokens mix freely in one call: each sequence has as many queries as it has, at the
end of the keys that it uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.masks import Mask
from tilewise.ops import checks
from tilewise.ops.arguments import Options, autocast
from tilewise.ops.decode import build, decode_op
from tilewise.ops.library import readable
from tilewise.ops.views import KVView
from tilewise.spec import Window

ANYWHERE = {"softcap", "sink", "alibi", "scale", "backend", "deterministic"}
"""Options of `attention_varlen` that decoding has too. It adds in a fixed order, so it is deterministic always."""


def attention_varlen_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Mask | Tensor | None,
    causal: bool,
    window: Window | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    page_table: Tensor | None,
    num_splits: int | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """out [T, H, Dv] and lse [H, T]; `attention_varlen` documents the arguments."""
    beyond: dict[str, Any] = {name: value for name, value in options.items() if name not in ANYWHERE}
    for name, value in {"mask": mask, **beyond}.items():
        if value is not None and (name != "dropout" or value != 0.0):
            raise UnsupportedError(
                f"{name}: attention over a cache (page_table, seqused_k, leftpad_k, num_splits) has none. "
                "Fix: attention_varlen over all keys of packed tensors"
            )
    checks.floats(q, k, v)
    q, k, v = autocast(q), autocast(k), autocast(v)
    if q.dim() != 3:
        raise bad_value("q", f"shape {list(q.shape)}", "3 dimensions, [tokens, heads, dim]")
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q.shape[0], max_seqlen_q)
    batch = cu_seqlens_q.shape[0] - 1
    for name, x in (("seqused_k", seqused_k), ("leftpad_k", leftpad_k)):
        if x is not None:
            _integers(name, x, (batch,), q)
    if isinstance(max_seqlen_k, bool) or not isinstance(max_seqlen_k, int | torch.SymInt):
        raise bad_type("max_seqlen_k", max_seqlen_k, "an int", "int(max_seqlen_k)")
    if page_table is None:
        view = _rows_as_pages(q, k, v, cu_seqlens_k, max_seqlen_k, seqused_k, leftpad_k)
    else:
        if seqused_k is None:
            raise bad_value("seqused_k", None, "with page_table, int32 [B]: the tokens that each sequence has")
        if k.dim() != 4 or v.dim() != 4:
            got = f"shapes {list(k.shape)} and {list(v.shape)}"
            raise bad_value("k", got, "with page_table, pools [pages, Hkv, page_size, dim]", "pool.transpose(1, 2)")
        if cu_seqlens_k is not None:
            raise bad_value("cu_seqlens_k", "a tensor", "None with page_table: seqused_k gives the lengths")
        _integers("page_table", page_table, (batch, None), q)
        _within("seqused_k", seqused_k, page_table.shape[1] * k.shape[2], "tokens that its pages hold")
        _within("seqused_k", seqused_k, max_seqlen_k, "tokens of max_seqlen_k")
        view = KVView(k, v, seqused_k, page_table, start=leftpad_k, max_length=max_seqlen_k)
    arguments = build(
        q.transpose(0, 1).unsqueeze(0),
        view,
        q_len=max_seqlen_q,
        cu_seqlens_q=cu_seqlens_q,
        causal=causal,
        window=window,
        softcap=options.get("softcap"),
        sink=options.get("sink"),
        alibi=options.get("alibi"),
        scale=options.get("scale"),
        num_splits=num_splits,
        backend=options.get("backend", "auto"),
    )
    out, lse = decode_op(*arguments)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0)


def _integers(name: str, x: Any, shape: tuple[int | None, ...], q: Tensor) -> None:
    """Raises TypeError or ValueError unless x is an int32 tensor of this shape (None: any size) on q's device; on a CPU
    also for negative numbers, except in a page table, where they stand for no page."""
    checks.is_tensor(name, x)
    fits = x.dim() == len(shape) and all(want in (None, have) for have, want in zip(x.shape, shape, strict=True))
    if x.dtype != torch.int32 or not fits:
        want = "int32 of shape [B, max_pages]" if None in shape else "int32 of shape [B]"
        fix = f"{name}.to(torch.int32)" if fits else None
        raise bad_value(name, f"{x.dtype} of shape {list(x.shape)}", f"{want} with B = {shape[0]}", fix)
    checks.same_place(name, x, q)
    if None not in shape and readable(x) and int(x.min()) < 0:
        raise bad_value(name, x.tolist(), "numbers of tokens, at least 0")


def _within(name: str, x: Tensor, most: int | Tensor, what: str) -> None:
    """Raises ValueError where a number is larger than `most`; a tensor on a GPU is not read."""
    if readable(x) and bool((x > most).any()):
        limit = most.tolist() if isinstance(most, Tensor) else most
        raise bad_value(name, x.tolist(), f"at most the {limit} {what}")


def _rows_as_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
) -> KVView:
    """Packed keys [Tk, Hkv, D] as a pool of pages of one token: row cu_seqlens_k[b] + t is token t of sequence b."""
    checks.qkv(q, k, v, rank=3)
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, k.shape[0], max_seqlen_k)
    assert cu_seqlens_k is not None
    lengths = cu_seqlens_k.diff()
    token = torch.arange(max(max_seqlen_k, 1), dtype=torch.int32, device=k.device)
    table = (cu_seqlens_k[:-1, None] + token).contiguous()
    if seqused_k is not None:
        _within("seqused_k", seqused_k, lengths, "keys of each sequence")
        lengths = torch.minimum(lengths, seqused_k)
    pools = k.unsqueeze(2), v.unsqueeze(2)
    return KVView(*pools, lengths.contiguous(), table, start=leftpad_k, max_length=max_seqlen_k)
