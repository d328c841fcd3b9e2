"""Linear and sparse costs against loops that count one by one."""

from __future__ import annotations

import pytest

from tilewise.cost.counts import forward_flops, self_attention
from tilewise.cost.linear import crossover_length, decode_flops, feature_dim, linear_counts
from tilewise.cost.memory import attention_memory
from tilewise.cost.sparse import sparse_counts
from tilewise.masks import BigBird, Causal, Random, Window, tile_map


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "chunk"), [(1, 64), (63, 64), (64, 64), (113, 16), (1000, 64)])
def test_linear_counts_one_by_one(n: int, chunk: int, causal: bool) -> None:
    spec = self_attention(n, 24, batch=2, heads=3, causal=causal)
    pairs = sum(
        1 for i in range(n) for j in range(i // chunk * chunk, min(n, (i // chunk + 1) * chunk)) if j <= i or not causal
    )
    counts = linear_counts(spec, chunk=chunk)
    assert counts.intra_flops == 6 * pairs * 2 * (24 + 24)
    assert counts.state_flops == 6 * n * 4 * 24 * 24
    chunks = -(-n // chunk)
    assert counts.traffic.elements_read == 6 * (n * 72 + chunks * 24 * 25)
    assert counts.state_bytes == 6 * 24 * 25 * 4
    states = attention_memory(spec, "linear", chunk=chunk).working
    assert counts.traffic.wide_written * 4 == states


def test_the_crossover_is_where_the_flops_meet() -> None:
    for head_dim in (32, 64, 128):
        for causal in (True, False):
            n = crossover_length(head_dim, causal=causal)
            spec = self_attention(n * 64, head_dim, causal=causal)
            # At multiples of the chunk: exact work a token at length n against linear work a token.
            exact = forward_flops(self_attention(n, head_dim)).matmul / n / (2 if causal else 1)
            assert linear_counts(spec).flops / spec.q_len == pytest.approx(exact, rel=0.02)
    assert crossover_length(64) == 192
    assert crossover_length(16, features=feature_dim(16, "taylor")) > crossover_length(16)
    assert feature_dim(16, "taylor") == 273
    assert decode_flops(self_attention(1, 64, batch=2, heads=3)) == 6 * 4 * 64 * 64


def test_a_chunk_must_hold_a_token() -> None:
    with pytest.raises(ValueError, match="chunk: got 0; wants at least 1"):
        linear_counts(self_attention(8), chunk=0)


@pytest.mark.parametrize("n", [65, 113, 128, 700])
@pytest.mark.parametrize(
    "mask", [Causal(), Causal() & Window(150, 0), BigBird(64, 1, 1, 1), Random(2, block=128, seed=3)], ids=str
)
def test_sparse_counts_against_the_dense_mask(mask: object, n: int) -> None:
    heads = 3
    spec = self_attention(n, 32, batch=2, heads=heads)
    tiles = tile_map(mask, n, n, heads=heads)
    dense = mask.to_dense(n, n, heads=heads)  # type: ignore[attr-defined]
    dense = dense.reshape((1,) * (3 - dense.ndim) + dense.shape)
    computed = keys = 0
    for head in dense:
        for i in range(0, n, 128):
            for j in range(0, n, 128):
                tile = head[i : i + 128, j : j + 128]
                if tile.any():
                    computed += tile.size
                    keys += tile.shape[1]
    repeats = 2 * heads // dense.shape[0]
    counts = sparse_counts(spec, tiles)
    assert counts.scores == repeats * computed
    assert counts.visible == repeats * int(dense.sum())
    assert counts.flops.matmul == 4 * 32 * repeats * computed
    assert counts.traffic.read == 6 * n * 32 + repeats * keys * 64
    assert counts.share == pytest.approx(repeats * computed / (6 * n * n))
    assert counts.speedup >= 1 - 1e-9


def test_a_window_costs_linear_work() -> None:
    mask = Causal() & Window(512, 0)
    flops = [sparse_counts(self_attention(n, 64), tile_map(mask, n, n)).flops.total for n in (2**14, 2**15)]
    assert flops[1] / flops[0] == pytest.approx(2, rel=0.02)
