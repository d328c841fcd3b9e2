"""`attention_decode` against the oracle: every cache, feature and backend that runs on a CPU; and packed queries."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tilewise
from decode_cases import FEATURES, LAYOUTS, check, fill, make_cache
from tilewise.caches import KV, DenseCache, PagedCache
from tilewise.errors import UnsupportedError
from tilewise.ops.decode import _paths, _tree_matrix
from tilewise.ops.views import KVView

BACKENDS = ("standard", "tiled")


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_like_the_oracle(layout: str, feature: str, tokens: int) -> None:
    capped = feature in ("softcap", "everything")
    for backend in BACKENDS[: 1 if capped else 2]:
        check(layout, feature, backend, tokens=tokens)


@pytest.mark.parametrize("contents", ["latent", "int8"])
@pytest.mark.parametrize("layout", ["dense", "ring", "page 16", "page 17"])
def test_other_contents(layout: str, contents: str) -> None:
    for backend in BACKENDS:
        for tokens in (1, 4):
            check(layout, "window", backend, tokens=tokens, contents=contents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        check("dense", "tree", backend, tokens=5, dtype=dtype)
        check("page 17", "sink", backend, tokens=1, dtype=dtype)
        check("page 16", "alibi batch", backend, tokens=3, dtype=dtype)


@pytest.mark.parametrize("window", [None, (11, None)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_by_token_equals_one_forward(layout: str, window: tuple[int, None] | None) -> None:
    """Prefill in chunks of different sizes, then single tokens: each step is the row of a full causal call."""
    if layout == "ring" and window is None:
        pytest.skip("a rolling cache is for windows")
    batch, total = 3, 61
    q, k = torch.randn(batch, 6, total, 16), torch.randn(batch, 2, total, 16)
    v = torch.randn(batch, 2, total, 8)
    full, full_lse = tilewise.attention(q, k, v, causal=True, window=window, return_lse=True)
    cache = make_cache(layout, KV(2, 16, 8), batch, torch.float32, "cpu", capacity=total)
    at = 0
    for step in [7, 9, 1, 5, 8, *[1] * 31]:
        part = slice(at, at + step)
        cache.append(k[:, :, part], v[:, :, part])
        out, lse = tilewise.attention_decode(q[:, :, part], cache, window=window, return_lse=True)
        torch.testing.assert_close(out, full[:, :, part])
        torch.testing.assert_close(lse, full_lse[:, :, part])
        at += step
    assert at == total


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "window": (9, 0)}, {"alibi": True}], ids=str
)
@pytest.mark.parametrize("page_size", [1, 16, 17, 64])
def test_prefill_and_decoding_packed_together(page_size: int, options: dict[str, Any]) -> None:
    """Chunks of a prompt and single tokens in one call, against pages or against the used part of packed keys."""
    held, queries = [40, 7, 1, 0, 30], [5, 7, 1, 0, 1]
    batch = len(held)
    k, v = torch.randn(batch, 2, 40, 16), torch.randn(batch, 2, 40, 16)
    cache = PagedCache(KV(2, 16), batch, batch * -(-40 // page_size), page_size)
    fill(cache, k, v, tuple(held), "cpu")
    view = cache.view()
    q = torch.randn(sum(queries), 4, 16)
    cu = torch.tensor([0, *queries]).cumsum(0).int()
    packed = [torch.cat([x[b, :, : held[b]].transpose(0, 1) for b in range(batch)]) for x in (k, v)]
    cu_k = torch.tensor([0, *held]).cumsum(0).int()
    given = {**options, "alibi": torch.rand(batch, 4)} if "alibi" in options else dict(options)
    expected = tilewise.attention_varlen(q, *packed, cu, cu_k, 7, 40, return_lse=True, **given)
    spare = [torch.cat([x[b, :, :40].transpose(0, 1) for b in range(batch)]) for x in (k, v)]
    cu_spare = torch.arange(batch + 1, dtype=torch.int32) * 40
    for backend in BACKENDS:
        given["backend"] = backend
        pages = tilewise.attention_varlen(
            q, view.k, view.v, cu, None, 7, 40, seqused_k=view.lengths, page_table=view.page_table, return_lse=True,
            **given,
        )  # fmt: skip
        used = tilewise.attention_varlen(
            q, *spare, cu, cu_spare, 7, 40, seqused_k=view.lengths, return_lse=True, **given
        )
        for found in (pages, used):
            for ours, reference in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, reference)


def test_left_padding_of_packed_keys() -> None:
    q, k = torch.randn(3, 2, 8), torch.randn(20, 2, 8)
    cu, cu_k = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 12, 20], dtype=torch.int32)
    pad = torch.tensor([5, 2], dtype=torch.int32)
    found = tilewise.attention_varlen(q, k, k, cu, cu_k, 2, 12, leftpad_k=pad, causal=True)
    kept = torch.cat([k[5:12], k[14:20]])
    cut = torch.tensor([0, 7, 13], dtype=torch.int32)
    torch.testing.assert_close(found, tilewise.attention_varlen(q, kept, kept, cu, cut, 2, 7, causal=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, -(2**31), 12, 2**31 - 1])
def test_pages_outside_the_pool_hold_nothing(wrong: int, backend: str) -> None:
    size, pool = 4, torch.full((12, 1, 4, 8), float("nan"))
    k = torch.randn(1, 1, 20, 8)
    for page in range(5):
        pool[page] = k[0, :, page * size : (page + 1) * size]
    table = torch.tensor([[0, 1, wrong, 3, 4]], dtype=torch.int32)
    view = KVView(pool, pool, torch.tensor([19], dtype=torch.int32), table)
    q = torch.randn(1, 2, 3, 8)
    there = torch.ones(1, 1, 3, 19, dtype=torch.bool)
    there[..., 8:12] = False
    found = tilewise.attention_decode(q, view, backend=backend)
    torch.testing.assert_close(found, tilewise.attention(q, k[:, :, :19], k[:, :, :19], there, causal=True))


def test_what_lies_behind_the_length_is_not_read() -> None:
    k = torch.randn(2, 1, 16, 8)
    lengths = torch.tensor([9, 16], dtype=torch.int32)
    clean = [tilewise.attention_decode(torch.ones(2, 2, 1, 8), KVView(k, k, lengths), backend=b) for b in BACKENDS]
    k[0, :, 9:] = float("nan")
    for backend, before in zip(BACKENDS, clean, strict=True):
        after = tilewise.attention_decode(torch.ones(2, 2, 1, 8), KVView(k, k, lengths), backend=backend)
        torch.testing.assert_close(after, before)


def test_layout_and_strides() -> None:
    cache = DenseCache(KV(2, 16), 2, 20)
    cache.append(torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 16))
    q = torch.randn(2, 3, 4, 16)
    rows_first = tilewise.attention_decode(q, cache, layout="bshd")
    assert rows_first.is_contiguous()
    torch.testing.assert_close(rows_first.transpose(1, 2), tilewise.attention_decode(q.transpose(1, 2), cache))
    pool = cache.view()
    token_major = pool._replace(k=pool.k.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(tilewise.attention_decode(q, token_major, layout="bshd"), rows_first, rtol=0, atol=0)


def test_explain() -> None:
    cache = DenseCache(KV(2, 16), 2, 20)
    cache.append(torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 16))
    plan = tilewise.explain_decode(torch.randn(2, 4, 1, 16), cache)
    assert plan.backend == "tiled"
    assert set(plan.rejected) == {"standard", "sdpa", "triton", "hopper"}
    assert "M≤16" in str(plan)
    capped = tilewise.explain_decode(torch.randn(2, 4, 1, 16), cache, softcap=2.0)
    assert capped.backend == "standard"
    assert "soft cap" in capped.rejected["tiled"]
    with pytest.raises(UnsupportedError, match="backend='standard' can"):
        tilewise.attention_decode(torch.randn(2, 4, 1, 16), cache, softcap=2.0, backend="tiled")


def test_a_growing_cache_does_not_make_new_plans() -> None:
    from tilewise.ops.decode import route

    cache = DenseCache(KV(1, 8), 1, 64)
    route.cache_clear()
    for _ in range(60):
        cache.append(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8))
        tilewise.attention_decode(torch.randn(1, 1, 1, 8), cache)
    assert route.cache_info().misses <= 7


def _view(**changes: Any) -> KVView:
    k = torch.randn(2, 2, 10, 8)
    return KVView(k, k, torch.tensor([3, 4], dtype=torch.int32))._replace(**changes)


Q = torch.randn(2, 4, 1, 8)


@pytest.mark.parametrize(
    ("q", "kv", "options", "error", "message"),
    [
        (Q[0], _view(), {}, ValueError, "q: got shape"),
        (Q.half(), _view(), {}, TypeError, "kv.k: got dtype"),
        (Q[:1], _view(), {}, ValueError, "q: got batch 1; wants the cache's batch 2"),
        (Q[:, :3], _view(), {}, ValueError, "q: got 3 heads; wants a multiple of the cache's 2"),
        (Q[..., :4], _view(), {}, ValueError, "q: got head dim 4"),
        (Q, torch.randn(2, 2, 3, 8), {}, TypeError, "kv: got Tensor; wants a cache"),
        (Q, _view(lengths=torch.tensor([3, 4])), {}, ValueError, "kv.lengths: got torch.int64"),
        (Q, _view(v=torch.randn(2, 2, 9, 8)), {}, ValueError, "kv.v: got shape"),
        (Q, _view(v=None), {}, ValueError, "kv.v_dim: got 0"),
        (Q, _view(ring=True, max_length=11), {}, ValueError, "window: got None with 1 query tokens"),
        (Q, _view(page_table=torch.zeros(3, 2, dtype=torch.int32)), {}, ValueError, "kv.page_table"),
        (Q, _view(), {"window": (-1, 0)}, ValueError, "window"),
        (Q, _view(), {"num_splits": 0}, ValueError, "num_splits: got 0"),
        (Q, _view(), {"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask: got shape"),
        (Q, _view(), {"mask": torch.ones(1, 1)}, TypeError, "mask: got dtype"),
        (Q, _view(), {"mask": tilewise.masks.Causal()}, UnsupportedError, "masks.Tree"),
        (Q, _view(), {"mask": tilewise.masks.Tree([-1, 0])}, ValueError, "mask: got a tree of 2 nodes"),
        (Q, _view(), {"backend": "fast"}, ValueError, "backend"),
        (Q, _view(), {"sink": torch.zeros(3)}, ValueError, "sink"),
        (Q.transpose(1, 2), _view(), {}, ValueError, r"q: got 1 heads.*transpose\(1, 2\)"),
        (Q, _view(), {"mask": torch.zeros(1, 1)}, TypeError, "mask: got dtype torch.float32.*mask != 0"),
        (Q, _view(lengths=torch.tensor([-1, 4], dtype=torch.int32)), {}, ValueError, r"kv.lengths: got \[-1, 4\]"),
        (Q, _view(lengths=torch.tensor([3, 11], dtype=torch.int32)), {}, ValueError, "at most the 10 tokens"),
        (Q, _view(max_length=2), {}, ValueError, "kv.max_length: got 2; wants an upper bound of lengths"),
        (Q, _view(start=torch.tensor([-1, 0], dtype=torch.int32)), {}, ValueError, r"kv.start: got \[-1, 0\]"),
        (Q.clone().requires_grad_(), _view(), {}, ValueError, "no gradient.*no_grad"),
    ],
)  # fmt: skip
def test_bad_input(q: Tensor, kv: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        tilewise.attention_decode(q, kv, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 0.5}, UnsupportedError, "dropout"),
        ({"bias": torch.zeros(2, 1, 1)}, UnsupportedError, "bias"),
        ({"seqused_k": torch.tensor([3])}, ValueError, "seqused_k: got torch.int64"),
        ({"page_table": torch.zeros(1, 1, dtype=torch.int32)}, ValueError, "seqused_k: got None"),
        ({"q_offset": 0}, UnsupportedError, "q_offset"),
        ({"seqused_k": [3]}, TypeError, "seqused_k: got list; wants a torch.Tensor"),
        ({"seqused_k": torch.tensor([4], dtype=torch.int32)}, ValueError, r"got \[4\]; wants at most the \[3\]"),
        ({"leftpad_k": torch.tensor([-1], dtype=torch.int32)}, ValueError, r"leftpad_k: got \[-1\]"),
    ],
)
def test_bad_input_packed(options: dict[str, Any], error: type[Exception], message: str) -> None:
    q, cu = torch.randn(3, 2, 4), torch.tensor([0, 3], dtype=torch.int32)
    given = {"num_splits": 1, **options}
    with pytest.raises(error, match=message):
        tilewise.attention_varlen(q, q, q, cu, cu, 3, 3, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens_k": torch.tensor([0, 3], dtype=torch.int32)}, "cu_seqlens_k: got a tensor; wants None"),
        ({"max_seqlen_k": 3}, r"seqused_k: got \[5\]; wants at most the 3 tokens of max_seqlen_k"),
        ({"max_seqlen_k": None}, "max_seqlen_k: got NoneType; wants an int"),
        ({"seqused_k": torch.tensor([9], dtype=torch.int32)}, "at most the 8 tokens that its pages hold"),
        ({"page_table": torch.zeros(1, 2).long()}, r"page_table: got torch.int64.*page_table.to\(torch.int32\)"),
    ],
)
def test_bad_input_paged(options: dict[str, Any], message: str) -> None:
    q, pool = torch.randn(3, 2, 4), torch.randn(2, 2, 4, 4)
    given: dict[str, Any] = {
        "cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32),
        "cu_seqlens_k": None,
        "max_seqlen_q": 3,
        "max_seqlen_k": 8,
        "seqused_k": torch.tensor([5], dtype=torch.int32),
        "page_table": torch.tensor([[1, 0]], dtype=torch.int32),
    }
    assert tilewise.attention_varlen(q, pool, pool, **given, deterministic=True).shape == q.shape
    with pytest.raises((ValueError, TypeError), match=message):
        tilewise.attention_varlen(q, pool, pool, **{**given, **options})


def test_explain_decode_names_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match=r"explain_decode\(\) has no argument 'dropout'"):
        tilewise.explain_decode(Q, _view(), dropout=0.1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("parents", [[-1], [-1, 0, 0, 1, 1, 2, 4, -1, 7], [-1, -1, 0], list(range(-1, 19))], ids=len)
def test_a_tree_is_its_mask(parents: list[int]) -> None:
    tree = tilewise.masks.Tree(parents)
    for tokens in (len(parents), len(parents) + 1, 30):
        want = torch.from_numpy(tree.to_dense(tokens, tokens))[None]
        kept = _tree_matrix(tree, tokens, torch.device("cpu"))
        assert torch.equal(kept, want)
        assert torch.equal(_paths(torch.tensor(parents), tokens, torch.device("cpu")), want)
    assert _tree_matrix(tilewise.masks.Tree(parents), 30, torch.device("cpu")) is kept


def test_a_tree_inside_a_compiled_function() -> None:
    tree, cache = tilewise.masks.Tree([-1, 0, 0, 1]), DenseCache(KV(2, 8), 2, 40)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def step(q: Tensor, k: Tensor) -> Tensor:
        cache.append(k, k)
        return tilewise.attention_decode(q, cache, mask=tree)

    for tokens in (4, 6, 5):
        q = torch.randn(2, 4, tokens, 8)
        found = step(q, torch.randn(2, 2, tokens, 8))
        torch.testing.assert_close(found, tilewise.attention_decode(q, cache, mask=tree))


def test_vmap() -> None:
    q, view = torch.randn(3, 2, 4, 2, 8), _view()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's own rule is a loop, too, but warns of it
        found = torch.func.vmap(lambda x: tilewise.attention_decode(x, view))(q)
    torch.testing.assert_close(found, torch.stack([tilewise.attention_decode(x, view) for x in q]))


def test_vmap_over_lengths_and_starts() -> None:
    q, k = torch.randn(3, 2, 4, 2, 8), torch.randn(2, 2, 10, 8)
    lengths = torch.tensor([[3, 10], [5, 2], [9, 9]], dtype=torch.int32)

    def decode(x: Tensor, n: Tensor) -> Tensor:
        return tilewise.attention_decode(x, KVView(k, k, n, start=n // 2))

    found = torch.func.vmap(decode)(q, lengths)
    torch.testing.assert_close(found, torch.stack([decode(x, n) for x, n in zip(q, lengths, strict=True)]))


def test_tensors_without_values() -> None:
    """Nothing of them is kept for tensors that have values."""
    tree = tilewise.masks.Tree([-1, 0, 0, 2, 1])

    def step() -> Tensor:
        k, lengths = torch.randn(2, 2, 10, 8), torch.tensor([6, 10], dtype=torch.int32)
        return tilewise.attention_decode(torch.randn(2, 4, 5, 8), KVView(k, k, lengths), mask=tree)

    with FakeTensorMode():
        assert step().shape == (2, 4, 5, 8)
    assert type(step()) is Tensor


def test_opcheck() -> None:
    k = torch.randn(2, 2, 10, 8)
    lengths = torch.tensor([3, 10], dtype=torch.int32)
    arguments = (
        torch.randn(2, 4, 2, 8), k, k, lengths, None, None, None, None, None, None, None, None, 8, False, 2, 10, True,
        None, None, None, None, None, "auto",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tilewise.attention_decode.default, arguments)
    appended = (k, k.clone(), None, None, lengths, torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8), None, None, False)
    torch.library.opcheck(torch.ops.tilewise.cache_append.default, appended)
