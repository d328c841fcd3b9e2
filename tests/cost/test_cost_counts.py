"""FLOPs and visible scores, against counting them one by one."""

from __future__ import annotations

import sys
from subprocess import run

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from tilewise.cost import (
    backward_flops,
    conventional_scores,
    estimate,
    forward_flops,
    ideal_traffic,
    self_attention,
    visible_scores,
)
from tilewise.cost.counts import accumulator_itemsize, itemsize
from tilewise.spec import AttentionSpec

reach = st.one_of(st.none(), st.integers(0, 30))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(0, 20),
    st.booleans(),
    st.tuples(reach, reach),
    st.one_of(st.none(), st.integers(-25, 25)),
)
def test_visible_scores(
    n: int, m: int, causal: bool, window: tuple[int | None, int | None], q_offset: int | None
) -> None:
    spec = AttentionSpec(1, 1, 1, n, m, 8, 8, causal=causal, window=window, q_offset=q_offset)
    assert visible_scores(spec) == oracle.allowed(n, m, 1, causal=causal, window=window, q_offset=q_offset).sum().item()


def test_visible_scores_of_a_million_tokens() -> None:
    n = 2**20
    assert visible_scores(self_attention(n, causal=True)) == n * (n + 1) // 2
    windowed = AttentionSpec(1, 1, 1, n, n, 64, 64, causal=True, window=(1023, 0))
    assert visible_scores(windowed) == 1024 * n - 1024 * 1023 // 2


def test_an_offset_on_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"spec.q_offset: got a tensor; wants an integer or None"):
        visible_scores(AttentionSpec(1, 1, 1, 8, 8, 4, 4, causal=True, q_offset="tensor"))


def test_flops_of_the_forward() -> None:
    spec = AttentionSpec(2, 8, 2, 63, 113, 40, 24)
    assert forward_flops(spec) == (2 * 2 * 8 * 63 * 113 * (40 + 24), 5 * 2 * 8 * 63 * 113)
    square = self_attention(1024, 64, batch=2, heads=16)
    assert forward_flops(square).matmul == 4 * 2 * 16 * 1024**2 * 64
    assert forward_flops(square).total == (4 * 64 + 5) * 2 * 16 * 1024**2


def test_causal_is_half_by_convention_and_a_little_more_in_truth() -> None:
    full, causal = self_attention(1000, 64), self_attention(1000, 64, causal=True)
    by_convention = forward_flops(causal, conventional_scores(causal))
    assert by_convention.total == forward_flops(full).total / 2
    # The diagonal is visible: N(N+1)/2 scores.
    assert forward_flops(causal).matmul == by_convention.matmul * 1001 / 1000
    assert conventional_scores(full) == 1000**2


def test_the_backward_is_two_and_a_half_forwards() -> None:
    spec = self_attention(777, 96, heads=3, causal=True)
    assert backward_flops(spec).matmul == 2.5 * forward_flops(spec).matmul
    uneven = AttentionSpec(1, 1, 1, 10, 20, 6, 4)
    assert backward_flops(uneven).matmul == 200 * 2 * (3 * 6 + 2 * 4)
    assert backward_flops(spec, 100).softmax == 3 * 500


def test_ideal_traffic_reads_shared_heads_once() -> None:
    spec = AttentionSpec(2, 8, 2, 63, 113, 40, 24, dtype="bfloat16")
    traffic = ideal_traffic(spec)
    assert traffic.elements_read == 16 * 63 * 40 + 4 * 113 * 64
    assert traffic.elements_written == 16 * 63 * 24
    assert traffic.bytes == 2 * traffic.elements


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_itemsize_is_that_of_torch(dtype: str) -> None:
    assert itemsize(dtype) == getattr(torch, dtype).itemsize
    assert accumulator_itemsize(dtype) == (8 if dtype == "float64" else 4)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype: got 'float17'; wants one of float64"):
        itemsize("float17")


def test_estimate_is_all_of_it() -> None:
    whole = estimate(batch=1, heads=32, seq=8192, head_dim=128)
    assert whole.forward.matmul == 4 * 32 * 8192**2 * 128
    assert whole.backward.matmul == 2.5 * whole.forward.matmul
    assert whole.flash_v2.matmul_flops == whole.forward.matmul
    assert whole.ideal.elements < whole.flash_v2.traffic.elements < whole.standard.elements < whole.six_step.elements
    assert set(whole.memory) == {"standard", "flash_v1", "flash_v2", "linear", "sparse"}
    decode = estimate(seq=1, k_seq=8192, heads=32, kv_heads=8, head_dim=128, v_head_dim=64, causal=True)
    assert decode.forward.matmul == 2 * 32 * 8192 * 192


def test_no_torch_is_imported() -> None:
    program = "import sys, tilewise.cost; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert run([sys.executable, "-c", program], check=False).returncode == 0
