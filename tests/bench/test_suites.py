from __future__ import annotations

import numpy as np
import pytest

from tilewise.bench.suites import BLOCK, PASSES, SUITES, Case, mixed_lengths, select


def small(**features: object) -> Case:
    return Case(2, 6, 3, 640, 40, "float32", **features)  # type: ignore[arg-type]


def test_the_dense_suite_is_that_of_the_papers() -> None:
    cases = SUITES["dense"].cases("bfloat16")
    assert len(cases) == 3 * 2 * 5
    for case in cases:
        assert case.batch * case.length == 16384
        assert case.heads * case.head_dim == 2048


def test_names_tell_every_case_from_every_other() -> None:
    cases = [case for dtype in ("float32", "bfloat16") for case in select(list(SUITES), dtype)]
    assert len({case.name for case in cases}) == len(set(cases)) == len(cases)


def test_convention() -> None:
    case = Case(4, 16, 16, 4096, 128, "bfloat16")
    assert case.flops("forward") == 4 * 4 * 16 * 4096**2 * 128
    assert case.flops("backward") == 2.5 * case.flops("forward")
    causal = Case(4, 16, 16, 4096, 128, "bfloat16", causal=True)
    assert causal.flops("forward") == case.flops("forward") / 2
    assert case.least_bytes("forward") == 4 * 4 * 16 * 4096 * 128 * 2


def test_a_window_counts_what_is_seen() -> None:
    case = small(causal=True, window=113)
    rows, columns = np.mgrid[:640, :640]
    seen = int(((columns <= rows) & (columns >= rows - 113)).sum())
    assert case.flops("forward") == 4 * 2 * 6 * seen * 40


@pytest.mark.parametrize(("sparsity", "blocks"), [(0.0, 5), (0.5, 2), (0.9, 1), (1.0, 1)])
def test_blocks_count_what_is_seen(sparsity: float, blocks: int) -> None:
    case = small(sparsity=sparsity)
    assert case.seen_blocks() == blocks
    assert case.flops("forward") == 4 * 2 * 6 * 5 * blocks * BLOCK**2 * 40


def test_packed_sequences_count_each_for_itself() -> None:
    packed = Case(1, 6, 6, 178, 40, "float32", packed=(1, 64, 113))
    assert packed.flops("forward") == 4 * 6 * 40 * (1 + 64**2 + 113**2)
    assert packed.least_bytes("forward") == 4 * 178 * 6 * 40 * 4


def test_mixed_lengths() -> None:
    lengths = mixed_lengths(64, 32768, seed=2)
    assert len(lengths) == 64
    assert sum(lengths) == 32768
    assert min(lengths) >= 1
    assert max(lengths) > 4 * 512
    assert lengths == mixed_lengths(64, 32768, seed=2)


def test_the_varlen_suite_has_a_dense_case_of_as_much_work() -> None:
    packed, dense = (
        next(case for case in SUITES["varlen"].cases("bfloat16") if bool(case.packed) is wanted and not case.causal)
        for wanted in (True, False)
    )
    assert packed.flops("forward") == pytest.approx(dense.flops("forward"), rel=0.03)


def test_gqa_heads_divide() -> None:
    for case in SUITES["gqa"].cases("bfloat16", head_dims=(64, 111, 256)):
        assert case.heads == 4 * case.kv_heads


def test_other_sizes_replace_the_suites_own() -> None:
    cases = select(["dense"], "float16", head_dims=(96,), lengths=(3000, 40000), causal=True)
    assert [(case.head_dim, case.length, case.batch) for case in cases] == [(96, 3000, 5), (96, 40000, 1)]
    assert all(case.causal and case.dtype == "float16" for case in cases)


def test_a_case_of_two_suites_is_measured_once() -> None:
    assert len(select(["dense", "dense"], "float32")) == 30


def test_blocks_need_whole_blocks() -> None:
    with pytest.raises(ValueError, match="a multiple of 128"):
        select(["sparse"], "float32", lengths=(1000,))


@pytest.mark.parametrize("which", PASSES)
def test_every_case_counts_something(which: str) -> None:
    for case in select(list(SUITES), "bfloat16"):
        assert case.flops(which) > 0
        assert case.least_bytes(which) > 0
        assert case.as_dict()["pattern"] == case.pattern
