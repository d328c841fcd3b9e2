"""Caches hold what was put in: against plain lists of tensors, in fixed cases and in random sequences of operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

import tilewise
from tilewise.caches import KV, Cache, DenseCache, Int8, Latent, PagedCache, RollingCache
from tilewise.caches.base import SlotCache
from tilewise.cost.memory import cache_bytes, int8_cache_bytes, kv_cache_elements, latent_cache_elements

BATCH, CAPACITY, WINDOW, SLACK = 3, 40, 11, 5
MAKERS: dict[str, Callable[[KV], SlotCache]] = {
    "dense": lambda contents: DenseCache(contents, BATCH, CAPACITY),
    "rolling": lambda contents: RollingCache(contents, BATCH, WINDOW, SLACK),
    "pages of 1": lambda contents: PagedCache(contents, BATCH, BATCH * CAPACITY, 1),
    "pages of 4": lambda contents: PagedCache(contents, BATCH, BATCH * CAPACITY // 4, 4, CAPACITY),
    "pages of 7": lambda contents: PagedCache(contents, BATCH, BATCH * 6, 7, CAPACITY),
}
CONTENTS = {"kv": KV(2, 4, 6), "int8": Int8(2, 4, 6), "latent": Latent(4, 2)}


def held(cache: SlotCache) -> list[tuple[Tensor, Tensor | None]]:
    """What each sequence holds, [Hkv, L, ·] by its view, element by element: slow, obvious, independent of kernels."""
    view = cache.view()
    found: list[tuple[Tensor, Tensor | None]] = []
    for b, length in enumerate(view.lengths.tolist()):
        first = max(0, length - view.capacity) if view.ring else 0
        rows: list[list[Tensor]] = [[], []]
        for t in range(first, length):
            if view.page_table is not None:
                page, slot = int(view.page_table[b, t // view.page_size]), t % view.page_size
                assert 0 <= page < view.k.shape[0]
            else:
                page, slot = b, t % view.page_size
            for pool, scales, into in ((view.k, view.k_scale, rows[0]), (view.v, view.v_scale, rows[1])):
                if pool is not None:
                    row = pool[page, :, slot].float()
                    into.append(row if scales is None else row * scales[page, :, slot, None])
        k, v = (torch.stack(part, 1) if part else torch.empty(view.kv_heads, 0, 0) for part in rows)
        found.append((k, None if view.v is None else v))
    return found


def assert_holds(cache: SlotCache, history: list[tuple[Tensor, Tensor]], *, exact: bool = True) -> None:
    """The cache holds the end of each sequence's history ([Hkv, L, D], [Hkv, L, Dv])."""
    assert cache.lengths.tolist() == [k.shape[1] for k, _ in history]
    assert cache.max_length >= max(k.shape[1] for k, _ in history)
    for (k, v), (all_k, all_v) in zip(held(cache), history, strict=True):
        for ours, everything in ((k, all_k), (v, all_v)):
            if ours is None or everything.shape[1] == 0:
                continue
            expected = everything[:, everything.shape[1] - ours.shape[1] :]
            step = expected.abs().amax(-1, keepdim=True) / 127
            assert (ours - expected).abs().le(0.0 if exact else step * 0.501).all()


def tokens(g: torch.Generator, contents: KV, count: int) -> tuple[Tensor, Tensor]:
    k = torch.randn(BATCH, contents.kv_heads, count, contents.head_dim, generator=g)
    return k, torch.randn(BATCH, contents.kv_heads, count, contents.v_dim, generator=g)


def empty(contents: KV) -> list[tuple[Tensor, Tensor]]:
    heads = contents.kv_heads
    return [(torch.empty(heads, 0, contents.head_dim), torch.empty(heads, 0, contents.v_dim)) for _ in range(BATCH)]


def append(cache: Cache, history: list[tuple[Tensor, Tensor]], k: Tensor, v: Tensor, counts: list[int] | None) -> None:
    """To the cache and to the plain lists."""
    latent = isinstance(getattr(cache, "contents", None), Latent)
    cache.append(k, None if latent else v, counts=counts)
    for b, count in enumerate(counts or [k.shape[2]] * BATCH):
        old_k, old_v = history[b]
        history[b] = torch.cat([old_k, k[b, :, :count]], 1), torch.cat([old_v, v[b, :, :count]], 1)


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("layout", MAKERS)
def test_append_is_concatenation(layout: str, contents: str) -> None:
    g = torch.Generator().manual_seed(0)
    kind = CONTENTS[contents]
    cache, history = MAKERS[layout](kind), empty(kind)
    for count, counts in ((5, None), (3, [3, 0, 1]), (1, None), (4, [4, 4, 0]), (0, None), (2, None)):
        append(cache, history, *tokens(g, kind, count), counts)
        assert_holds(cache, history, exact=contents != "int8")


class Steps:
    """A random life of a cache beside plain lists of tensors."""

    def __init__(self, layout: str, seed: int) -> None:
        self.kind = CONTENTS["kv"]
        self.cache = MAKERS[layout](self.kind)
        self.history = empty(self.kind)
        self.freed: set[int] = set()
        self.g = torch.Generator().manual_seed(seed)

    def step(self, name: str, a: int, b: int, n: int) -> None:
        before = [k.shape[1] for k, _ in self.history]
        try:
            getattr(self, name)(a, b, n)
        except ValueError:
            # A refusal changes nothing.
            assert [k.shape[1] for k, _ in self.history] == before
        assert_holds(self.cache, self.history)
        if isinstance(self.cache, PagedCache):
            assert_no_leak(self.cache)

    def append(self, a: int, b: int, n: int) -> None:
        counts = [n, (n * a) % (n + 1), (n * b) % (n + 1)]
        k, v = tokens(self.g, self.kind, n)
        append(self.cache, self.history, k, v, counts)
        self.freed -= {row for row, count in enumerate(counts) if count}

    def fork(self, a: int, b: int, n: int) -> None:
        keep = min(n, self.history[a][0].shape[1])
        self.cache.fork(a, b, keep)
        if a != b:
            self.history[b] = tuple(x[:, :keep] for x in self.history[a])  # type: ignore[assignment]
            self.freed.discard(b)

    def trim(self, a: int, b: int, n: int) -> None:
        lengths = [k.shape[1] for k, _ in self.history]
        lengths[a] = max(0, lengths[a] - n)
        self.cache.trim(lengths)
        self.history = [(k[:, :m], v[:, :m]) for (k, v), m in zip(self.history, lengths, strict=True)]

    def free(self, a: int, b: int, n: int) -> None:
        self.cache.free(a)
        self.history[a] = tuple(x[:, :0] for x in self.history[a])  # type: ignore[assignment]
        self.freed.add(a)

    def reorder(self, a: int, b: int, n: int) -> None:
        rows = [a, b, n % BATCH]
        if self.freed & set(rows):
            with pytest.raises(ValueError, match="freed"):
                self.cache.reorder(rows)
            return
        self.cache.reorder(rows)
        self.history = [self.history[row] for row in rows]
        self.freed = set()

    def save(self, a: int, b: int, n: int) -> None:
        state = {name: x.clone() for name, x in self.cache.state_dict().items()}
        self.cache.reset()
        self.cache.load_state_dict(state)
        self.freed = set()


def assert_no_leak(cache: PagedCache) -> None:
    """Every page is free or used, by as many sequences as the count says, and the table says the same."""
    users = Counter(page for row in range(cache.batch) for page in cache.pages_of(row))
    assert cache.free_pages == cache.pools.k.shape[0] - len(users)
    assert cache._users.tolist() == [users[page] for page in range(cache.pools.k.shape[0])]
    for row in range(cache.batch):
        own = cache.pages_of(row)
        assert cache.page_table[row].tolist() == [*own, *[-1] * (cache.page_table.shape[1] - len(own))]
        assert len(own) == -(-int(cache.lengths[row]) // cache.page_size)


@pytest.mark.parametrize("layout", MAKERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["append"] * 4 + ["fork", "fork", "trim", "free", "reorder", "save"]),
            st.integers(0, BATCH - 1),
            st.integers(0, BATCH - 1),
            st.integers(0, 9),
        ),
        max_size=14,
    ),
)
def test_random_lives(layout: str, seed: int, steps: list[tuple[str, int, int, int]]) -> None:
    life = Steps(layout, seed)
    for step in steps:
        if layout == "rolling" and step[0] in ("fork", "trim", "reorder"):
            continue  # what they can give back depends on what was overwritten: tested below
        life.step(*step)


def test_rolling_gives_back_what_it_promised() -> None:
    g = torch.Generator().manual_seed(0)
    kind = CONTENTS["kv"]
    cache, history = RollingCache(kind, BATCH, WINDOW, SLACK), empty(kind)
    append(cache, history, *tokens(g, kind, 30), None)
    cache.trim(30 - SLACK)
    history = [(k[:, :25], v[:, :25]) for k, v in history]
    for row in range(BATCH):
        for t in range(25 - WINDOW, 25):
            assert torch.equal(cache.view().k[row, :, t % cache.capacity], history[row][0][:, t])
    with pytest.raises(ValueError, match="at least 25: the tokens before that window are overwritten"):
        cache.trim(24)
    append(cache, history, *tokens(g, kind, SLACK), None)
    cache.fork(0, 1)
    cache.reorder([2, 1, 0])
    history = [history[2], history[0], history[0]]
    assert_holds(cache, history)
    cache.free(1)
    append(cache, history, *tokens(g, kind, 1), [0, 1, 0])
    assert cache.lengths.tolist() == [30, 1, 30]


def test_prefix_sharing_copies_only_what_is_written() -> None:
    kind = CONTENTS["kv"]
    cache = PagedCache(kind, BATCH, 9, 4)
    g = torch.Generator().manual_seed(0)
    history = empty(kind)
    append(cache, history, *tokens(g, kind, 10), [10, 0, 0])
    cache.fork(0, [1, 2])
    history = [history[0]] * BATCH
    assert cache.free_pages == 6
    assert_holds(cache, history)
    append(cache, history, *tokens(g, kind, 1), None)
    # The two whole pages stay shared, and the last user of the third one keeps it.
    assert cache.free_pages == 4
    assert len({cache.pages_of(row)[:2] for row in range(BATCH)}) == 1
    assert_holds(cache, history)
    assert_no_leak(cache)


def test_a_reservation_is_all_that_appends_take() -> None:
    kind = CONTENTS["kv"]
    cache = PagedCache(kind, BATCH, 12, 4)
    cache.reserve(6)
    free, table = cache.free_pages, cache.page_table.clone()
    assert free == 6
    g = torch.Generator().manual_seed(0)
    history = empty(kind)
    for _ in range(6):
        append(cache, history, *tokens(g, kind, 1), None)
        assert cache.free_pages == free
        assert torch.equal(cache.page_table, table)
    assert_holds(cache, history)
    cache.reserve([0, 1, 0])
    assert cache.free_pages == free
    with pytest.raises(ValueError, match="pool is full"):
        cache.reserve(16)
    assert cache.free_pages == free


def test_a_shared_page_behind_an_upper_bound_is_not_written_to() -> None:
    """A trim on a device leaves the host with an upper bound; the next token may belong into a page shared before."""
    kind = CONTENTS["kv"]
    cache, history = PagedCache(kind, BATCH, 12, 4), empty(kind)
    g = torch.Generator().manual_seed(0)
    append(cache, history, *tokens(g, kind, 10), [10, 0, 0])
    cache.fork(0, 1)
    history[1] = history[0]
    append(cache, history, *tokens(g, kind, 3), [3, 0, 0])
    # What a trim on an accelerator does.
    cache.lengths[0], cache._exact = 5, False
    history[0] = tuple(x[:, :5] for x in history[0])  # type: ignore[assignment]
    append(cache, history, *tokens(g, kind, 1), [1, 0, 0])
    assert_holds(cache, history)


@pytest.mark.parametrize("layout", ["dense", "pages of 7"])
@pytest.mark.parametrize("contents", CONTENTS)
def test_bytes_are_the_cost_models(layout: str, contents: str) -> None:
    kind = CONTENTS[contents]
    cache = MAKERS[layout](kind)
    slots = cache.pools.k.shape[0] * cache.pools.k.shape[2]
    if contents == "latent":
        expected = cache_bytes(latent_cache_elements(4, 2), tokens=slots, dtype="float32")
    elif contents == "int8":
        expected = int8_cache_bytes(2, 4, 6, tokens=slots)
    else:
        expected = cache_bytes(kv_cache_elements(2, 4, 6), tokens=slots, dtype="float32")
    assert cache.nbytes == expected


@pytest.mark.parametrize(
    ("kv_heads", "elements"), [(8, 2 * 8 * 64), (2, 2 * 2 * 64), (1, 2 * 64)], ids=["MHA", "GQA", "MQA"]
)
def test_bytes_of_the_multi_head_family(kv_heads: int, elements: int) -> None:
    cache = DenseCache(KV(kv_heads, 64), 2, 100, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * 100 * elements * 2


def test_left_padding_stays_with_its_sequence() -> None:
    cache = DenseCache(KV(1, 4), 3, 10)
    cache.append(torch.randn(3, 1, 6, 4), torch.randn(3, 1, 6, 4))
    cache.pad([0, 2, 4])
    cache.reorder([2, 0, 1])
    assert cache.start is not None
    assert cache.start.tolist() == [4, 0, 2]
    cache.fork(0, 2)
    assert cache.start.tolist() == [4, 0, 4]
    again = DenseCache(KV(1, 4), 3, 10)
    again.load_state_dict(cache.state_dict())
    q = torch.randn(3, 2, 1, 4)
    assert torch.equal(tilewise.attention_decode(q, again), tilewise.attention_decode(q, cache))


def test_left_padding_is_copied() -> None:
    """A cache writes into its own starts: never into those it was given, and where a captured graph reads them."""
    cache, mine = DenseCache(KV(1, 4), 3, 10), torch.tensor([1, 2, 3], dtype=torch.int32)
    cache.pad(mine)
    known = cache.start
    cache.append(torch.randn(3, 1, 6, 4), torch.randn(3, 1, 6, 4))
    state = {name: x.clone() for name, x in cache.state_dict().items()}
    cache.reorder([2, 0, 1])
    cache.free(0)
    assert cache.start is known
    assert mine.tolist() == [1, 2, 3]
    cache.load_state_dict(state)
    cache.free(1)
    assert state["start"].tolist() == [1, 2, 3]
    assert cache.start is known


@pytest.mark.parametrize("layout", MAKERS)
def test_made_and_padded_in_inference_mode_and_used_outside(layout: str) -> None:
    with torch.inference_mode():
        cache = MAKERS[layout](KV(2, 4)).to("cpu")
        cache.pad([0, 1, 2])
        cache.append(*[torch.ones(3, 2, 5, 4)] * 2)
    with torch.no_grad():
        cache.append(*[torch.ones(3, 2, 2, 4)] * 2)
        cache.reorder([2, 0, 1])
        cache.fork(0, 1)
        cache.free(2)
        cache.trim(6)
    assert cache.lengths.tolist() == [6, 6, 0]
    assert cache.start is not None
    assert cache.start.tolist() == [2, 2, 0]


def test_a_reordered_sequence_is_alive() -> None:
    cache = _full()
    cache.free(1)
    cache.reorder([0, 0])
    cache.fork(1, 0)
    cache.reorder([1, 0])
    assert cache.lengths.tolist() == [6, 6]


def _full() -> DenseCache:
    cache = DenseCache(KV(2, 4), 2, 8)
    cache.append(torch.ones(2, 2, 6, 4), torch.ones(2, 2, 6, 4))
    return cache


BAD: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (
        lambda c: c.append(*[torch.ones(2, 2, 3, 4)] * 2),
        ValueError,
        "k: got 3 more tokens .*which has 6.* cache is full",
    ),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 4).half()] * 2), TypeError, "k: got dtype torch.float16"),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 4, device="meta")] * 2), ValueError, "k: got device meta"),
    (lambda c: c.append(*[torch.ones(3, 2, 1, 4)] * 2), ValueError, "k: got batch 3; wants the cache's batch 2"),
    (lambda c: c.append(*[torch.ones(2, 1, 2, 4)] * 2), ValueError, r"k: got 1 heads.*transpose\(1, 2\)"),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 5)] * 2), ValueError, "k: got head dim 5"),
    (lambda c: c.append(torch.ones(2, 2, 1, 4)), TypeError, "v: got NoneType"),
    (lambda c: c.append(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 2, 4)), ValueError, "v: got 2 tokens"),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 4)] * 2, counts=[1, 2]), ValueError, "counts: got"),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 4)] * 2, counts=[-1, 1]), ValueError, "counts: got"),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 4)] * 2, counts=[1]), ValueError, "counts: got shape"),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 4).requires_grad_()] * 2), ValueError, "no_grad"),
    (lambda c: c.append(*[torch.ones(2, 2, 1, 4)] * 2, counts=[0.5, 1]), TypeError, r"counts: got \[0.5, 1\]; wants i"),
    (lambda c: c.trim(1.5), TypeError, "lengths: got 1.5; wants integers"),
    (lambda c: c.trim(True), TypeError, "lengths: got True; wants integers"),
    (lambda c: c.fork(0, 1, 1.5), TypeError, "tokens: got 1.5"),
    (lambda c: c.fork(0.5, 1), TypeError, "source: got 0.5"),
    (lambda c: c.reorder(torch.tensor([0.0, 1.0])), TypeError, "indices: got"),
    (lambda c: c.pad([0.5, 1]), TypeError, "start: got"),
    (lambda c: c.load_state_dict({**c.state_dict(), "scale": torch.ones(2)}), ValueError, "state: got scale; wants"),
    (lambda c: c.load_state_dict({**c.state_dict(), "start": torch.ones(3)}), ValueError, "state: got start of shape"),
    (lambda c: c.trim(-1), ValueError, "lengths: got -1; wants lengths of at least 0"),
    (lambda c: c.trim([7, 1]), ValueError, "lengths: got 7; wants at most the 6 tokens of sequence 0"),
    (lambda c: c.trim([1, 2, 3]), ValueError, "lengths: got shape"),
    (lambda c: c.fork(0, 2), ValueError, "destinations: got 2; wants sequences from 0 to 1"),
    (lambda c: c.fork(0, 1, 7), ValueError, "tokens: got 7; wants 0 to 6"),
    (lambda c: (c.free(0), c.fork(0, 1)), ValueError, "source: got 0; wants a sequence that was not freed"),
    (lambda c: (c.free(1), c.reorder([1, 0])), ValueError, "indices: got 1; wants a sequence that was not freed"),
    (lambda c: c.reorder([0]), ValueError, "indices: got 1 indices"),
    (lambda c: c.free(5), ValueError, "rows: got 5"),
    (lambda c: c.pad([-1, 0]), ValueError, "start"),
    (lambda c: c.load_state_dict({}), ValueError, "state: got no"),
    (lambda c: c.load_state_dict(DenseCache(KV(2, 4), 2, 9).state_dict()), ValueError, "state: got k of shape"),
]


@pytest.mark.parametrize(("act", "error", "message"), BAD)
def test_a_refused_step_changes_nothing(act: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    cache = _full()
    before = {name: x.clone() for name, x in cache.state_dict().items()}
    with pytest.raises(error, match=f"(?s){message}"):
        act(cache)
    for name, x in cache.state_dict().items():
        if not cache._freed:
            torch.testing.assert_close(x, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_full_pool_changes_nothing() -> None:
    cache = PagedCache(KV(1, 4), 2, 3, 4)
    cache.append(torch.ones(2, 1, 4, 4), torch.ones(2, 1, 4, 4))
    table = cache.page_table.clone()
    with pytest.raises(ValueError, match=r"need 2 more pages.*at most the 1 unused of 3 pages"):
        cache.append(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    assert cache.lengths.tolist() == [4, 4]
    assert torch.equal(cache.page_table, table)
    assert cache.free_pages == 1
    cache.append(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), counts=[1, 0])
    assert_no_leak(cache)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KV(0, 4), "kv_heads: got 0"),
        (lambda: Latent(4, -1), "rope_dim: got -1"),
        (lambda: KV(1.0, 4), "kv_heads: got float; wants an int"),  # pyright: ignore[reportArgumentType]
        (lambda: DenseCache((1, 4), 1, 4), "contents: got tuple.*KV"),  # pyright: ignore[reportArgumentType]
        (lambda: DenseCache(KV(1, 4), 1, 4, dtype=torch.int8), "dtype: got torch.int8; wants a floating"),
        (lambda: RollingCache(KV(1, 4), 1, (4, 0)), "window: got tuple"),  # pyright: ignore[reportArgumentType]
        (lambda: PagedCache(KV(1, 4), 1, 4, 16, 0), "capacity: got 0"),
        (lambda: DenseCache(KV(1, 4), 0, 4), "batch: got 0"),
        (lambda: DenseCache(KV(1, 4), 1, 0), "capacity: got 0"),
        (lambda: PagedCache(KV(1, 4), 1, 4, 0), "page_size: got 0"),
        (lambda: RollingCache(KV(1, 4), 1, 4, 0), "slack: got 0"),
        (lambda: DenseCache(Latent(4, 2), 1, 8).append(torch.ones(1, 1, 1, 6), torch.ones(1, 1, 1, 4)), "v: got shape"),
    ],
)
def test_bad_makes(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("page", [-2, 5])
def test_a_state_with_pages_outside_the_pool_is_refused(page: int) -> None:
    cache = PagedCache(KV(1, 4), 2, 5, 4)
    cache.append(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    state = {name: x.clone() for name, x in cache.state_dict().items()}
    state["page_table"][1, 1] = page
    state["lengths"][1] = 8
    with pytest.raises(ValueError, match=r"state: got a page_table with pages outside the pool; wants .* 0 to 4"):
        cache.load_state_dict(state)
    assert cache.lengths.tolist() == [3, 3]
    assert_no_leak(cache)


def test_appending_inside_a_compiled_function() -> None:
    """The host's bound is given up there; an eager append reads the lengths again."""
    cache = DenseCache(KV(1, 4), 2, 6)
    torch._dynamo.reset()
    counters["stats"].clear()

    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def step(q: Tensor, k: Tensor) -> Tensor:
        cache.append(k, k)
        return tilewise.attention_decode(q, cache)

    keys = torch.randn(2, 1, 5, 4)
    q = torch.randn(2, 2, 1, 4)
    for t in range(5):
        found = step(q, keys[:, :, t : t + 1])
        torch.testing.assert_close(found, tilewise.attention(q, keys[:, :, : t + 1], keys[:, :, : t + 1]))
    # Once more after the first call, which tells the cache that the host does not see all of its appends.
    assert counters["stats"]["unique_graphs"] <= 2
    assert cache.max_length == 6
    with pytest.raises(ValueError, match="which has 5"):
        cache.append(keys[:, :, :2], keys[:, :, :2])
    cache.append(keys[:, :, :1], keys[:, :, :1])
    assert cache.lengths.tolist() == [6, 6]
