"""Token by token equals one full forward: every module over every cache, causal and windowed, in every order of appends
that generation knows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilewise.caches import KV, DenseCache, Int8, Latent, PagedCache, RollingCache
from tilewise.caches.base import SlotCache
from tilewise.masks import Tree
from tilewise.nn import (
    NTK,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    MultiQueryAttention,
    RotaryEmbedding,
    YaRN,
)
from waiting import never_wait

B, N, DIM, CAPACITY = 3, 21, 24, 40
WINDOW, SLACK = 6, 8

Module = Callable[..., Any]
MODULES: dict[str, Module] = {
    "MHA": lambda **o: MultiHeadAttention(DIM, 4, rotary=RotaryEmbedding(6, scaling=NTK(2.0)), bias=True, **o),
    "GQA": lambda **o: GroupedQueryAttention(DIM, 6, 2, alibi=True, softcap=2.0, sinks=True, v_head_dim=6, **o),
    "MQA": lambda **o: MultiQueryAttention(DIM, 4, rotary=RotaryEmbedding(4, interleaved=True), qk_norm=1e-6, **o),
    "MLA": lambda **o: MultiHeadLatentAttention(DIM, 4, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=6, **o),
    "MLA-lite": lambda **o: MultiHeadLatentAttention(
        DIM,
        2,
        kv_rank=10,
        nope_dim=5,
        rope_dim=6,
        v_dim=7,
        rotary=RotaryEmbedding(6, interleaved=True, scaling=YaRN(4.0, 8, mscale=1.0, mscale_all_dim=0.8)),
        **o,
    ),
}
CACHES = ("dense", "rolling", "paged-16", "paged-64", "paged-256", "paged-17", "int8")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_module(name: str, windowed: bool, device: str) -> nn.Module:
    torch.manual_seed(len(name))
    module = MODULES[name](causal=True, window=(WINDOW, 0) if windowed else None).eval()
    for parameter_name, parameter in module.named_parameters():
        if parameter_name == "sinks" or "norm" in parameter_name:
            nn.init.normal_(parameter)
    return module.to(device)


def make_cache(kind: str, module: Any, device: str, batch: int = B) -> SlotCache:
    if isinstance(module, MultiHeadLatentAttention):
        contents: KV = Latent(module.kv_rank, module.rope_dim)
    else:
        contents = (Int8 if kind == "int8" else KV)(module.kv_heads, module.head_dim, module.v_head_dim)
    if kind == "rolling":
        return RollingCache(contents, batch, WINDOW, SLACK, device=device)
    if kind.startswith("paged"):
        size = int(kind.removeprefix("paged-"))
        return PagedCache(contents, batch, batch * -(-CAPACITY // size), size, CAPACITY, device=device)
    return DenseCache(contents, batch, CAPACITY, device=device)


def every_case() -> Iterator[Any]:
    for name in MODULES:
        for kind in CACHES:
            for windowed in (False, True):
                if (kind == "rolling" and not windowed) or (kind == "int8" and name.startswith("MLA")):
                    continue
                yield pytest.param(name, kind, windowed, id=f"{name}-{kind}-{'window' if windowed else 'causal'}")


CASES = list(every_case())


def tolerance(module: Any, kind: str, x: Tensor) -> float:
    """Float32 sums of a few dozen terms, which a GPU's kernels add in other ways: twice what a full forward is off by
    there. int8 also moves every key and value by up to 1/254 of its row's largest."""
    if kind != "int8":
        if not x.is_cuda:
            return 4e-6
        exact = copy.deepcopy(module).double()(x.double())
        return 4e-6 + 2 * (module(x) - exact).abs().max().item()
    q, k, v = (p(x).unflatten(-1, (-1, d)) for p, d in (
        (module.q_proj, module.head_dim), (module.k_proj, module.head_dim), (module.v_proj, module.v_head_dim)
    ))  # fmt: skip
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    # A pair's rotation keeps its length, so that no column grows by more than √2.
    moved = 2.0**0.5 * k.abs().max() / 254 * q.abs().sum(-1).max() * 2.0**0.5 * module.head_dim**-0.5
    largest = v.abs().max()
    out = largest / 254 + largest * (torch.exp(2 * moved) - 1)
    return (out * module.o_proj.weight.abs().sum(-1).max()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "kind", "windowed"), CASES)
def test_token_by_token_and_in_chunks(name: str, kind: str, windowed: bool, device: str) -> None:
    module = make_module(name, windowed, device)
    x = torch.randn(B, N, DIM, device=device)
    full = module(x)
    allowed = tolerance(module, kind, x)
    for chunks in ([1] * N, [N], [5, 1, 8, 7], [13] + [1] * 8):
        cache = make_cache(kind, module, device)
        outs = [module(part, cache=cache) for part in x.split(chunks, 1)]
        assert cache.lengths.tolist() == [N] * B
        torch.testing.assert_close(torch.cat(outs, 1), full, atol=allowed, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "kind", "windowed"), CASES)
def test_ragged_forked_and_trimmed(name: str, kind: str, windowed: bool, device: str) -> None:
    """Prompts of different lengths at once; a draft is taken back; a beam continues another's text."""
    module = make_module(name, windowed, device)
    x = torch.randn(B, N, DIM, device=device)
    full = module(x)
    cache = make_cache(kind, module, device)
    allowed = tolerance(module, kind, torch.cat([x, full], 1))
    held = [0] * B

    def step(counts: list[int], given: list[int] | str) -> None:
        """Append the next counts[b] tokens of each sequence, padded on the right, and compare those rows."""
        width = max(counts)
        part = torch.randn(B, width, DIM, device=device)
        for b, count in enumerate(counts):
            part[b, :count] = x[b, held[b] : held[b] + count]
        real = torch.tensor(counts, dtype=torch.int32, device=device if given == "device" else "cpu")
        out = module(part, cache=cache, counts=real)
        for b, count in enumerate(counts):
            rows = slice(held[b], held[b] + count)
            torch.testing.assert_close(out[b, :count], full[b, rows], atol=allowed, rtol=0)
            held[b] += count

    step([3, 7, 5], "host")
    step([2, 0, 4], "device")
    step([1, 1, 1], "host")
    assert cache.lengths.tolist() == held
    module(torch.randn(B, 4, DIM, device=device), cache=cache)
    cache.trim(held)
    step([4, 6, 1], "device")
    assert cache.lengths.tolist() == held
    cache.fork(1, [0, 2])
    x[0], x[2] = x[1], x[1]
    held[0] = held[2] = held[1]
    x[:, held[1] :] = torch.randn(B, N - held[1], DIM, device=device)
    full.copy_(module(x))
    step([3, 3, 3], "host")
    cache.reorder([2, 0, 1])
    x.copy_(x[[2, 0, 1]])
    full.copy_(full[[2, 0, 1]])
    step([1, 1, 1], "device")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["dense", "paged-17"])
def test_left_padding(name: str, kind: str, device: str) -> None:
    module = make_module(name, False, device)
    x = torch.randn(B, N, DIM, device=device)
    start = [0, 4, 9]
    allowed = tolerance(module, kind, x)
    cache = make_cache(kind, module, device)
    cache.pad(start)
    outs = torch.cat([module(part, cache=cache) for part in x.split([12, 1, 8], 1)], 1)
    for b, first in enumerate(start):
        alone = module(x[b : b + 1, first:])
        torch.testing.assert_close(outs[b : b + 1, first:], alone, atol=2 * allowed, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
def test_without_the_causal_rule_padding_stays_unseen(name: str, device: str) -> None:
    """A bidirectional prompt: its tokens see each other, on an empty cache and behind an earlier part, not padding."""
    module = MODULES[name](causal=False).eval().to(device)
    x = torch.randn(B, N, DIM, device=device)
    counts = [4, 9, 6]
    allowed = tolerance(module, "dense", x)
    cache = make_cache("dense", module, device)
    first = module(x[:, :9], cache=cache, counts=torch.tensor(counts, dtype=torch.int32))
    rest = torch.stack([x[b, count : count + 5] for b, count in enumerate(counts)])
    second = module(rest, cache=cache)
    for b, count in enumerate(counts):
        alone = module(x[b : b + 1, :count])
        torch.testing.assert_close(first[b : b + 1, :count], alone, atol=allowed, rtol=0)
        whole = module(x[b : b + 1, : count + 5])
        torch.testing.assert_close(second[b : b + 1], whole[:, count:], atol=allowed, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
def test_draft_trees(name: str, device: str) -> None:
    """The branches of a tree, checked at once, give what each gives alone."""
    module = make_module(name, False, device)
    if getattr(module, "rotary", None) is None:
        pytest.skip("ALiBi tells distances by place in the cache, where a tree has none of its own")
    parents = [-1, 0, 0, 1, 2]
    depth = torch.tensor([0, 1, 1, 2, 2], device=device)
    prompt, draft = torch.randn(1, 7, DIM, device=device), torch.randn(1, 5, DIM, device=device)
    allowed = tolerance(module, "dense", torch.cat([prompt, draft], 1))
    for first in (7, 0):
        cache = make_cache("dense", module, device, batch=1)
        if first:
            module(prompt, cache=cache)
        out = module(draft, cache=cache, mask=Tree(parents), positions=first + depth)
        dense = torch.from_numpy(Tree(parents).to_dense(5, 5)).to(device)
        for path in ([0, 1, 3], [0, 2, 4]):
            alone = module(torch.cat([prompt[:, :first], draft[:, path]], 1))
            torch.testing.assert_close(out[:, path], alone[:, first:], atol=allowed, rtol=0)
        for mask in (dense, dense[None]):
            cache.trim(first)
            again = module(draft, cache=cache, mask=mask, positions=first + depth)
            torch.testing.assert_close(again, out, atol=allowed, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODULES)
def test_a_mask_of_its_own_for_each_sequence(name: str, device: str) -> None:
    """[B, T, T] over the new tokens, on an empty cache and behind others."""
    module = make_module(name, False, device)
    x = torch.randn(B, N, DIM, device=device)
    allowed = tolerance(module, "dense", x)
    new = (torch.rand(B, 9, 9, device=device) < 0.6) | torch.eye(9, dtype=torch.bool, device=device)
    cache = make_cache("dense", module, device)
    torch.testing.assert_close(
        module(x[:, :9], cache=cache, mask=new), module(x[:, :9], mask=new[:, None]), atol=allowed, rtol=0
    )
    seen = torch.ones(B, 1, 18, 18, dtype=torch.bool, device=device)
    seen[:, 0, :9, :9] = seen[:, 0, 9:, 9:] = new
    whole = module(x[:, :18], mask=seen)
    torch.testing.assert_close(module(x[:, 9:18], cache=cache, mask=new), whole[:, 9:], atol=allowed, rtol=0)


def test_a_full_cache_refuses_and_stays() -> None:
    module = make_module("MHA", False, "cpu")
    cache = make_cache("dense", module, "cpu")
    x = torch.randn(B, CAPACITY, DIM)
    full = module(x)
    module(x[:, : CAPACITY - 1], cache=cache)
    with pytest.raises(ValueError, match="the cache is full"):
        module(x[:, :2], cache=cache)
    last = module(x[:, CAPACITY - 1 :], cache=cache)
    torch.testing.assert_close(last, full[:, CAPACITY - 1 :], atol=4e-6, rtol=0)


@pytest.mark.parametrize("windowed", [False, True])
def test_a_ring_without_room_for_the_window_refuses_and_stays(windowed: bool) -> None:
    module = make_module("MHA", windowed, "cpu")
    cache = make_cache("rolling", module, "cpu")
    module(torch.randn(B, 12, DIM), cache=cache)
    tokens = SLACK + 1 if windowed else 3
    with pytest.raises(ValueError, match="window: got"):
        module(torch.randn(B, tokens, DIM), cache=cache)
    assert cache.lengths.tolist() == [12] * B


class Layers(nn.Module):
    """As much of a transformer as decoding needs."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, caches: list[SlotCache]) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + layer(x, cache=cache)
        return x


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "paged-64", "paged-17"])
@pytest.mark.parametrize("latent", [False, True], ids=["GQA", "MLA"])
def test_a_captured_step_replays_while_the_cache_grows(latent: bool, kind: str) -> None:
    """Four layers, one graph: what it replays equals eager steps over caches of their own, and the host never waits
    (PyTorch raises where it would)."""
    dim, batch, prompt, steps = 512, 4, 100, 40
    torch.manual_seed(0)

    def layer() -> nn.Module:
        if latent:
            return MultiHeadLatentAttention(dim, 8, q_rank=96, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64)
        return GroupedQueryAttention(dim, 8, 2, rotary=RotaryEmbedding(64), qk_norm=1e-6, causal=True)

    model = Layers([layer() for _ in range(4)]).to("cuda", torch.bfloat16).eval()

    def caches() -> list[SlotCache]:
        contents = Latent(128, 32) if latent else KV(2, 64)
        place: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
        if kind == "dense":
            return [DenseCache(contents, batch, 256, **place) for _ in range(4)]
        size = int(kind.removeprefix("paged-"))
        return [PagedCache(contents, batch, batch * -(-256 // size), size, 256, **place) for _ in range(4)]

    x = torch.randn(batch, prompt + steps, dim, device="cuda", dtype=torch.bfloat16)
    eager, captured = caches(), caches()
    model(x[:, :prompt], eager)
    model(x[:, :prompt], captured)
    for cache in captured:
        cache.expect_graphs()  # or the capture would take another plan than the warm-up, and compile it
    token = x[:, prompt : prompt + 1].clone()
    model(token, captured)
    for cache in captured:
        cache.trim(prompt)
        if isinstance(cache, PagedCache):
            cache.reserve(steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(token, captured)
    worst = 0.0
    for t in range(prompt, prompt + steps):
        token.copy_(x[:, t : t + 1])
        with never_wait():
            graph.replay()
        worst = max(worst, (out - model(x[:, t : t + 1], eager)).abs().max().item())
    assert captured[0].lengths.tolist() == [prompt + steps] * batch
    # Only the number of splits may differ: the captured call cannot know how long the sequences are.
    assert worst <= 4 * 2**-8 * out.abs().max().item()
