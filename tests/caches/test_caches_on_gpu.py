"""What only a device can show of caches: graphs that replay while a cache grows, without waiting or compiling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tilewise
from tilewise.caches import KV, DenseCache, Int8, Latent, PagedCache, RollingCache
from tilewise.caches.base import SlotCache
from waiting import never_wait

pytestmark = pytest.mark.gpu

BATCH, HEADS, STEPS = 3, 8, 40


def _caches() -> dict[str, SlotCache]:
    place = {"dtype": torch.bfloat16, "device": "cuda"}
    return {
        "dense": DenseCache(KV(2, 64), BATCH, 100, **place),
        "rolling": RollingCache(KV(2, 64), BATCH, 20, slack=4, **place),
        "pages of 16": PagedCache(KV(2, 64), BATCH, 30, 16, 100, **place),
        "pages of 17": PagedCache(KV(2, 64), BATCH, 30, 17, 100, **place),
        "int8": DenseCache(Int8(2, 64), BATCH, 100, **place),
        "latent": DenseCache(Latent(512, 64), BATCH, 100, **place),
    }


def _normal(cache: SlotCache, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = cache.contents
    q = torch.randn(BATCH, HEADS, tokens, kind.head_dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(BATCH, kind.kv_heads, tokens, kind.head_dim, device="cuda", dtype=torch.bfloat16)
    if isinstance(kind, Latent):
        return q, k, None
    return q, k, torch.randn(BATCH, kind.kv_heads, tokens, kind.v_dim, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", list(_caches()) if torch.cuda.is_available() else ["dense"])
def test_a_captured_step_replays_while_the_cache_grows(name: str) -> None:
    from tilewise.backends.triton.decode import attention_decode

    cache, eager = _caches()[name], _caches()[name]
    window = (20, None) if name == "rolling" else None
    prompt = _normal(cache, 7)
    for each in (cache, eager):
        each.append(*prompt[1:])
        if isinstance(each, PagedCache):
            each.reserve(STEPS + 2)
    inputs = _normal(cache, 1)

    def step(target: SlotCache) -> Tensor:
        target.append(*inputs[1:])
        return tilewise.attention_decode(inputs[0], target, window=window)

    cache.expect_graphs()
    step(cache)  # compiles
    step(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(cache)
    compiled = sum(len(caches[0]) for caches in attention_decode.device_caches.values())
    for _ in range(STEPS):
        for x in inputs:
            if x is not None:
                x.normal_()
        graph.replay()
        expected = step(eager)
        torch.testing.assert_close(captured, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(cache.lengths, eager.lengths)
    assert cache.lengths.tolist() == [8 + STEPS] * BATCH
    # The eager cache tells its bound, which rises through powers of two; each may choose another number of splits.
    assert sum(len(caches[0]) for caches in attention_decode.device_caches.values()) <= compiled + 1
    # The next append that the host sees finds out how far the graph went.
    cache.append(*inputs[1:])
    assert cache.lengths.tolist() == [9 + STEPS] * BATCH


@pytest.mark.parametrize("name", ["dense", "pages of 16"])
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    cache = _caches()[name]
    q, k, v = _normal(cache, 1)
    cache.append(k, v)
    tilewise.attention_decode(q, cache)
    torch.cuda.synchronize()
    with never_wait():
        for _ in range(20):
            cache.append(k, v)
            tilewise.attention_decode(q, cache)


def test_a_full_cache_drops_what_a_graph_appends() -> None:
    cache = DenseCache(KV(1, 16), 1, 4, dtype=torch.bfloat16, device="cuda")
    k = torch.randn(1, 1, 1, 16, device="cuda", dtype=torch.bfloat16)
    cache.append(k, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(k, k)
    for _ in range(6):
        graph.replay()
    assert cache.lengths.tolist() == [4]
    with pytest.raises(ValueError, match="cache is full"):
        cache.append(k, k)
