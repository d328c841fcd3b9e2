"""`attention_varlen` against a cache: packed queries, keys in pages or used in part. Inference, by the decoding op.

Chunks of prefill and single decoding tokens mix freely in one call: each sequence has as many queries as it has, at the
end of the keys that it uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tilewise.errors import UnsupportedError, bad_value
from tilewise.masks import Mask
from tilewise.ops import checks
from tilewise.ops.arguments import Options, autocast
from tilewise.ops.decode import build, decode_op
from tilewise.ops.views import KVView
from tilewise.spec import Window

ANYWHERE = {"softcap", "sink", "alibi", "scale", "backend"}
"""Options of `attention_varlen` that decoding has too."""


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
        if isinstance(value, Tensor) or value not in (None, False, 0.0):
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
        if x is not None and (x.dtype != torch.int32 or tuple(x.shape) != (batch,)):
            raise bad_value(name, f"{x.dtype} of shape {list(x.shape)}", f"int32 of shape [B] = [{batch}]")
    if page_table is None:
        view = _rows_as_pages(q, k, v, cu_seqlens_k, max_seqlen_k, seqused_k, leftpad_k)
    else:
        if seqused_k is None:
            raise bad_value("seqused_k", None, "with page_table, int32 [B]: the tokens that each sequence has")
        if k.dim() != 4 or v.dim() != 4:
            got = f"shapes {list(k.shape)} and {list(v.shape)}"
            raise bad_value("k", got, "with page_table, pools [pages, Hkv, page_size, dim]", "pool.transpose(1, 2)")
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
        lengths = torch.minimum(lengths, seqused_k)
    pools = k.unsqueeze(2), v.unsqueeze(2)
    return KVView(*pools, lengths.contiguous(), table, start=leftpad_k, max_length=max_seqlen_k)
