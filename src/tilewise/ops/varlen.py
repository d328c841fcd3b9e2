"""`attention_varlen`: packed batches of sequences of different lengths."""

from __future__ import annotations

from typing import Literal, Unpack, overload

from torch import Tensor

from tilewise.errors import bad_value
from tilewise.masks import Mask
from tilewise.ops import checks
from tilewise.ops.arguments import Options, Packed, autocast, build, known
from tilewise.ops.library import attend
from tilewise.ops.varlen_paged import attention_varlen_paged
from tilewise.spec import Window


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_table: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_table: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    page_table: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over B sequences packed one after another, without padding.

    Args:
        q: [T, H, D], the tokens of all sequences.
        k: [Tk, Hkv, D].
        v: [Tk, Hkv, Dv].
        cu_seqlens_q: [B + 1] int32: sequence s is the rows `cu_seqlens_q[s] : cu_seqlens_q[s + 1]`; it may be empty.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: the longest query sequence, in tokens.
        max_seqlen_k: the longest key sequence, in tokens.
        mask: a mask value, applied to each sequence; a tensor only if it is per head, [H, 1, 1].
        causal: as in `attention`; positions count within each sequence, and bottom-right alignment uses its lengths.
        window: as in `attention`.
        seqused_k: [B] int32: only the first `seqused_k[s]` keys of sequence s are used; its queries stand at their end.
        leftpad_k: [B] int32: the first `leftpad_k[s]` keys are padding, which nothing sees.
        page_table: [B, max_pages] int32: k and v are pools [pages, Hkv, page_size, D] of a cache (`KVView`), and token
            t of sequence s lies in page `page_table[s, t // page_size]`. `seqused_k` then gives the lengths, and
            cu_seqlens_k is None.
        num_splits: into how many parts the keys are cut, as in `attention_decode`.
        return_lse: also return the LSE.
        options: as in `attention`: bias (`Relative`, or per head), alibi ([H] or [B, H]), softcap, sink, scale,
            dropout, q_offset (an int or int32 [B]), deterministic, backend.

    With any of seqused_k, leftpad_k, page_table and num_splits the call is inference against a cache: prefill in chunks
    and decoding mixed as they come, without a gradient, dropout, mask, bias or q_offset.

    Returns:
        out [T, H, Dv]; with `return_lse`, also lse [H, T].

    Raises:
        ValueError, TypeError: bad input, before anything runs. Values of `cu_seqlens` are checked on the CPU only.
        UnsupportedError: an [N, M] mask or bias tensor, or a named backend that cannot do this.
    """
    known("attention_varlen", options)
    if seqused_k is not None or leftpad_k is not None or page_table is not None or num_splits is not None:
        found = attention_varlen_paged(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            mask=mask,
            causal=causal,
            window=window,
            seqused_k=seqused_k,
            leftpad_k=leftpad_k,
            page_table=page_table,
            num_splits=num_splits,
            options=options,
        )
        return found if return_lse else found[0]
    checks.floats(q, k, v)
    q, k, v = autocast(q), autocast(k), autocast(v)
    checks.qkv(q, k, v, rank=3)
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q.shape[0], max_seqlen_q)
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, k.shape[0], max_seqlen_k)
    assert cu_seqlens_k is not None
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"{cu_seqlens_k.shape[0] - 1} sequences"
        raise bad_value("cu_seqlens_k", got, f"as many as cu_seqlens_q, {cu_seqlens_q.shape[0] - 1}")
    dense = _one_batch(q), _one_batch(k), _one_batch(v)
    checks.heads_and_lengths(*dense, "bhsd")
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    arguments = build(*dense, packed=packed, mask=mask, causal=causal, window=window, **options)
    out, lse = attend(arguments.seeded())
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def _one_batch(x: Tensor) -> Tensor:
    """[tokens, heads, dim] as [1, heads, tokens, dim]."""
    return x.transpose(0, 1).unsqueeze(0)
