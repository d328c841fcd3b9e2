"""The cost model counts what the tile loops of the reference count, for any sizes and tile shapes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewise.cost import (
    TiledCounts,
    flash_backward_counts,
    flash_v1_counts,
    flash_v2_counts,
    self_attention,
    six_step_traffic,
)
from tilewise.reference import Counters, flash_backward, flash_v1, flash_v2, six_step_attention
from tilewise.spec import AttentionSpec

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def same(model: TiledCounts, counted: Counters) -> bool:
    traffic = model.traffic
    return (
        traffic.elements_read,
        traffic.elements_written,
        traffic.bytes_read,
        traffic.bytes_written,
        model.on_chip_bytes,
        model.matmul_flops,
        model.rescalings,
        model.divisions,
        model.tiles_visited,
        model.tiles_skipped,
    ) == (
        counted.elements_read,
        counted.elements_written,
        counted.bytes_read,
        counted.bytes_written,
        counted.on_chip_bytes,
        counted.matmul_flops,
        counted.rescalings,
        counted.divisions,
        counted.tiles_visited,
        counted.tiles_skipped,
    )


def check(spec: AttentionSpec, block_m: int, block_n: int, with_dlse: bool) -> None:
    dtype = DTYPES[spec.dtype]
    q = torch.zeros(spec.batch, spec.heads, spec.q_len, spec.head_dim, dtype=dtype)
    k = torch.zeros(spec.batch, spec.kv_heads, spec.k_len, spec.head_dim, dtype=dtype)
    v = torch.zeros(spec.batch, spec.kv_heads, spec.k_len, spec.v_head_dim, dtype=dtype)
    blocks = {"block_m": block_m, "block_n": block_n}
    (out, lse), v2 = flash_v2(q, k, v, causal=spec.causal, **blocks)
    _, v1 = flash_v1(q, k, v, causal=spec.causal, **blocks)
    dlse = lse if with_dlse else None
    _, backward = flash_backward(q, k, v, out, lse, out, dlse, causal=spec.causal, **blocks)
    assert same(flash_v1_counts(spec, block_m, block_n), v1)
    assert same(flash_v2_counts(spec, block_m, block_n), v2)
    assert same(flash_backward_counts(spec, block_m, block_n, with_dlse=with_dlse), backward)
    _, steps = six_step_attention(q, k, v, causal=spec.causal)
    traffic = six_step_traffic(spec)
    assert (traffic.elements_read, traffic.elements_written) == (steps.elements_read, steps.elements_written)
    assert (traffic.bytes_read, traffic.bytes_written) == (steps.bytes_read, steps.bytes_written)


@pytest.mark.parametrize(("n", "m"), list(product([1, 2, 63, 113], [1, 64, 97])))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_equals_the_counters_of_the_reference(n: int, m: int, causal: bool, dtype: str) -> None:
    for (block_m, block_n), kv_heads in product([(16, 16), (64, 48), (48, 64)], [1, 2]):
        spec = AttentionSpec(2, 2, kv_heads, n, m, 8, 5, dtype=dtype, causal=causal)
        check(spec, block_m, block_n, with_dlse=n % 2 == 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 45), st.integers(1, 45), st.booleans(), st.integers(1, 3))
def test_equals_them_for_any_sizes(n: int, m: int, block_m: int, block_n: int, causal: bool, group: int) -> None:
    check(AttentionSpec(1, group, 1, n, m, 3, 2, causal=causal), block_m, block_n, with_dlse=False)


def test_a_long_problem_is_counted_at_once() -> None:
    spec = self_attention(2**20, 128, causal=True)
    counts = flash_v2_counts(spec, 128, 128)
    tiles = 2**20 // 128
    assert counts.tiles_visited == tiles * (tiles + 1) // 2
    assert counts.tiles_skipped == tiles * (tiles - 1) // 2


def test_what_a_tile_map_has_to_count_is_refused() -> None:
    windowed = AttentionSpec(1, 1, 1, 8, 8, 4, 4, window=(2, 0))
    masked = AttentionSpec(1, 1, 1, 8, 8, 4, 4, mask="random")
    for spec in (windowed, masked):
        with pytest.raises(ValueError, match="count with its tile map"):
            flash_v2_counts(spec)
    with pytest.raises(ValueError, match="sum the costs of its sequences"):
        flash_v2_counts(AttentionSpec(2, 1, 1, 8, 8, 4, 4, packed=True))
    with pytest.raises(ValueError, match="block_m, block_n"):
        flash_v1_counts(self_attention(8), 0, 4)


def test_an_integer_offset_moves_the_diagonal() -> None:
    """A decoding step of 4 rows at position 60 of a cache with room for 100 keys sees 64 of them at most."""
    spec = AttentionSpec(1, 1, 1, 4, 100, 8, 8, causal=True, q_offset=60)
    counts = flash_v2_counts(spec, 16, 16)
    assert (counts.tiles_visited, counts.tiles_skipped) == (4, 3)
