"""The decoding kernels against the oracle: every layout and feature, with and without splits, in the interpreter and on
a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, ON_GPU

import tilewise
from decode_cases import FEATURES, LAYOUTS, check
from tilewise.backends.triton import interpreting
from tilewise.caches import KV, Int8, Latent, PagedCache
from tilewise.ops.append import quantize
from tilewise.ops.decode import build, decode_op
from tilewise.ops.views import KVView

pytestmark = pytest.mark.usefixtures("kernels")

SHORT = (37, 1, 0, 33) if ON_GPU else (35, 2, 0)
"""Small enough for the interpreter."""


CASES = [
    (layout, feature)
    for layout in LAYOUTS
    for feature in FEATURES
    if ON_GPU or layout == "dense" or (layout != "page 64" and feature in ("window", "everything"))
]


@pytest.mark.parametrize(("layout", "feature"), CASES)
def test_like_the_oracle(layout: str, feature: str) -> None:
    shapes = ((4, 3), (1, 1)) if feature == "everything" else ((4, 3),)
    # Every dtype meets every feature and layout, but not all at once: a kernel takes a second to compile.
    dtype = DTYPES[CASES.index((layout, feature)) % len(DTYPES)] if ON_GPU else torch.float32
    for tokens, splits in ((1, None), (4, 3)) if ON_GPU else shapes:
        check(layout, feature, "triton", tokens=tokens, num_splits=splits, dtype=dtype, device=DEVICE, lengths=SHORT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contents", ["kv", "int8", "latent"])
@pytest.mark.parametrize("layout", ["dense", "ring", "page 16", "page 17"] if ON_GPU else ["page 16", "page 17"])
def test_contents(layout: str, contents: str, dtype: torch.dtype) -> None:
    for tokens, splits in ((1, 2), (5, 1)) if ON_GPU else ((2, 2),):
        check(
            layout, "window", "triton", tokens=tokens, num_splits=splits, dtype=dtype, device=DEVICE,
            contents=contents, lengths=SHORT,
        )  # fmt: skip


@pytest.mark.parametrize("dim", [8, 59, 64, 80, 128])
def test_head_dims(dim: int) -> None:
    check("page 16", "sink", "triton", dim=dim, dim_v=dim, device=DEVICE, lengths=(19, 3), num_splits=2)


@pytest.mark.parametrize("heads", [2, 8, 34])
def test_groups(heads: int) -> None:
    """One query head a K/V head, four, and more rows than one tile has."""
    check("dense", "plain", "triton", heads=heads, tokens=5, device=DEVICE, lengths=(19, 3), num_splits=1)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 12, 2**31 - 1])
@pytest.mark.parametrize("size", [4, 16])
def test_pages_outside_the_pool_are_not_read(size: int, wrong: int) -> None:
    """The pool is one view in poisoned memory: a read before, behind or in another page shows as NaN."""
    memory = torch.full((36, 1, size, 8), float("nan"), device=DEVICE)
    pool = memory[12:24]
    k = torch.randn(1, 1, 5 * size, 8, device=DEVICE)
    for page in range(5):
        pool[page] = k[0, :, page * size : (page + 1) * size]
    pool[2] = float("nan")
    length = 5 * size - 1
    table = torch.tensor([[0, 1, wrong, 3, 4]], dtype=torch.int32, device=DEVICE)
    view = KVView(pool, pool, torch.tensor([length], dtype=torch.int32, device=DEVICE), table)
    there = torch.ones(1, 1, 2, length, dtype=torch.bool, device=DEVICE)
    there[..., 2 * size : 3 * size] = False
    q = torch.randn(1, 2, 2, 8, device=DEVICE)
    kept = k[:, :, :length]
    expected = tilewise.attention(q, kept, kept, there, causal=True, backend="standard")
    for splits in (1, 3):
        found = tilewise.attention_decode(q, view, backend="triton", num_splits=splits)
        torch.testing.assert_close(found, expected)


def test_a_table_with_too_few_pages() -> None:
    """Lengths beyond the table's reach, which only a mistake of the host makes, read nothing outside it."""
    memory = torch.full((9,), 10**6, dtype=torch.int32, device=DEVICE)
    memory[3:5] = torch.tensor([1, 0], dtype=torch.int32)
    pool = torch.randn(2, 1, 16, 8, device=DEVICE)
    q = torch.randn(1, 2, 1, 8, device=DEVICE)
    lengths = torch.tensor([100], dtype=torch.int32, device=DEVICE)
    view = KVView(pool, pool, torch.zeros_like(lengths), memory[3:5].view(1, 2))
    arguments = build(q, view, q_len=1, backend="triton")  # which would refuse such lengths on a CPU
    found, _ = decode_op(*arguments._replace(lengths=lengths))
    k = torch.cat([pool[1], pool[0]], 1)[None]
    torch.testing.assert_close(found, tilewise.attention(q, k, k, backend="standard"))


@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
def test_small_operands_may_be_slices_or_expanded(int8: bool) -> None:
    torch.manual_seed(0)
    pages = torch.randperm(12, device=DEVICE).int()
    k, v = torch.randn(12, 2, 16, 8, device=DEVICE), torch.randn(12, 2, 16, 8, device=DEVICE)
    k_scale = v_scale = None
    if int8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        v_scale = v_scale.transpose(1, 2).contiguous().transpose(1, 2)
    three = torch.tensor([[50, 7], [33, 1], [60, 0]], dtype=torch.int32, device=DEVICE)
    view = KVView(k, v, three[:, 0], pages.view(4, 3).t(), k_scale, v_scale, three[:, 1])
    same = KVView(*(x.contiguous() if isinstance(x, torch.Tensor) else x for x in view))
    q = torch.randn(3, 4, 2, 8, device=DEVICE)
    slopes, sink = torch.rand(3, 4, 2, device=DEVICE)[..., 1], torch.randn(1, device=DEVICE).expand(4)
    for splits in (1, 3):
        found = tilewise.attention_decode(q, view, alibi=slopes, sink=sink, num_splits=splits, backend="triton")
        expected = tilewise.attention_decode(
            q, same, alibi=slopes.contiguous(), sink=sink.contiguous(), num_splits=splits, backend="triton"
        )
        assert torch.equal(found, expected)
        exact = tilewise.attention_decode(q, same, alibi=slopes, sink=sink, backend="standard")
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_packed_queries() -> None:
    held, queries = [40, 7, 1, 0, 30], [5, 7, 1, 0, 1]
    cache = PagedCache(KV(2, 16), 5, 15, 16, device=DEVICE)
    cache.append(*(torch.randn(5, 2, 40, 16, device=DEVICE) for _ in range(2)), counts=held)
    view = cache.view()
    q = torch.randn(sum(queries), 4, 16, device=DEVICE)
    cu = torch.tensor([0, *queries], device=DEVICE).cumsum(0).int()
    slopes = torch.rand(5, 4, device=DEVICE)

    def run(backend: str, splits: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        return tilewise.attention_varlen(
            q, view.k, view.v, cu, None, 7, 40, seqused_k=view.lengths, page_table=view.page_table, causal=True,
            window=(20, 0), alibi=slopes, num_splits=splits, return_lse=True, backend=backend,
        )  # fmt: skip

    expected = run("standard", None)
    for splits in (1, 3):
        for ours, reference in zip(run("triton", splits), expected, strict=True):
            torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("layout", ["dense", "paged", "ring"])
@pytest.mark.parametrize("contents", [KV(2, 24, 40), Int8(2, 24, 40), Latent(24, 8)], ids=lambda c: type(c).__name__)
def test_append_writes_what_pytorch_writes(contents: KV, layout: str) -> None:
    from tilewise.backends.triton.append import append
    from tilewise.ops.append import _scatter

    size, ring = (8, False) if layout == "paged" else (20, layout == "ring")
    table = None
    if layout == "paged":
        table = torch.tensor([[3, 1, -1], [0, 99, 2], [4, 5, 6]], dtype=torch.int32, device=DEVICE)
    pages = 7 if layout == "paged" else 3
    k = torch.randn(3, contents.kv_heads, 23, contents.head_dim, device=DEVICE)
    v = None if isinstance(contents, Latent) else torch.randn(3, contents.kv_heads, 23, contents.v_dim, device=DEVICE)
    lengths = torch.tensor([0, 5, 19], dtype=torch.int32, device=DEVICE)
    for counts in (None, torch.tensor([23, 0, 7], dtype=torch.int32, device=DEVICE)):
        written = []
        for write in (append, _scatter):
            pools = contents.pools(pages, size, torch.float32, torch.device(DEVICE)).map(lambda x: x.zero_())
            arguments = (pools.k, pools.v, pools.k_scale, pools.v_scale, lengths, k, v, counts, table, ring)
            write(*arguments) if write is append else _scatter(*arguments, 24 if table is not None else 20)
            written.append(pools)
        for ours, reference in zip(*written, strict=True):
            if ours is not None and ours.dtype == torch.int8:
                # Half way between two steps the two round differently.
                assert (ours.int() - reference.int()).abs().max() <= 1
            elif ours is not None:
                torch.testing.assert_close(ours, reference)


def test_quantised_values_of_any_size() -> None:
    """Scales from 10⁻²⁰ to 10²⁰, equal ones and zeros: nothing overflows or vanishes in float16."""
    torch.manual_seed(0)
    for size in (0.0, 1e-20, 1e-6, 1.0, 1e4, 1e20):
        k, v = torch.randn(1, 2, 40, 16, device=DEVICE), torch.randn(1, 2, 40, 16, device=DEVICE) * size
        (k8, k_scale), (v8, v_scale) = quantize(k), quantize(v)
        view = KVView(k8, v8, torch.tensor([40], dtype=torch.int32, device=DEVICE), None, k_scale, v_scale, v_dim=16)
        q = torch.randn(1, 4, 1, 16, device=DEVICE)
        for dtype in DTYPES if ON_GPU else DTYPES[:2]:
            given = q.to(dtype)
            if size > 1e3 and dtype == torch.float16:
                continue  # the result itself does not fit
            found = tilewise.attention_decode(given, view, backend="triton").double()
            exact = tilewise.attention_decode(given.double(), view, backend="standard")
            # A score and the logarithm of a scale are added in float32: a weight is off by the rounding of their sum.
            exponent = 10.0 + v_scale.clamp(min=1e-30).log2().abs().max()
            relative = 4 * torch.finfo(dtype).eps + 2 * exponent * torch.finfo(torch.float32).eps
            assert (found - exact).abs().max() <= relative * v.abs().max() + torch.finfo(dtype).tiny


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True], ids=["half", "int8"])
@pytest.mark.parametrize(
    ("dtype", "page_size"),
    [(torch.bfloat16, size) for size in (None, 16, 64, 256, 17)] + [(torch.float16, size) for size in (None, 64)],
    ids=str,
)
@pytest.mark.parametrize("dim", [64, 96, 128, 256, 512])
def test_every_row_of_the_tables(dtype: torch.dtype, dim: int, page_size: int | None, int8: bool) -> None:
    layout = "dense" if page_size is None else f"page {page_size}"
    contents = "int8" if int8 else "kv"
    for tokens, splits in ((1, None), (40, 2)):
        check(
            layout, "plain", "triton", dim=dim, dim_v=dim, dtype=dtype, device=DEVICE, contents=contents,
            tokens=tokens, num_splits=splits, lengths=(513, 300, 40), step=97,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [16, 128])
def test_latent_of_deepseek(heads: int, dtype: torch.dtype) -> None:
    for layout in ("dense", "page 64", "page 16"):
        for tokens, splits in ((1, None), (2, 3)):
            check(
                layout, "plain", "triton", dim=64, dim_v=512, dtype=dtype, device=DEVICE, contents="latent",
                tokens=tokens, num_splits=splits, lengths=(513, 300, 40), heads=heads, step=97,
            )  # fmt: skip


def test_where_it_runs() -> None:
    q, cache = torch.randn(1, 2, 1, 16, dtype=torch.float64), PagedCache(KV(1, 16), 1, 2, dtype=torch.float64)
    with pytest.raises(tilewise.UnsupportedError, match="float32 at most"):
        tilewise.attention_decode(q, cache, backend="triton")
    assert interpreting() or ON_GPU
