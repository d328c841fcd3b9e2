"""Ahead-of-time compilation of the tables' rows, without a GPU. `compile_all.py` does the whole matrix."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")

from compile_all import RESULTS, check_results, source_hash
from compile_cases import SHARED_MEMORY, Target, compile_target, covering, every_target, faults

PLAIN = frozenset[str]()
MAIN = [Target(90, "bfloat16", dim, features) for dim in (64, 128, 256) for features in (PLAIN, frozenset({"causal"}))]
SAMPLE = random.Random(0).sample([t for t in every_target(90) if t.dtype != "float32" or t.dim <= 64], 2)
OTHERS = [random.Random(arch).choice([t for t in every_target(arch) if t.dim <= 128]) for arch in (80, 100, 120)]
SPILLS = {
    (64, "keys_gradient"): 272,
    (64, "queries_gradient"): 72,  # with the causal rule under Triton 3.7.1; 16 under 3.6 and 3.9
    (128, "keys_gradient"): 128,
    (256, "attention_forward"): 56,
    (256, "keys_gradient"): 424,
    (256, "queries_gradient"): 64,
}
"""Bytes a thread that the measured configurations of sm_90 spill and are fastest with all the same; all others spill
none."""


def test_the_whole_matrix_was_compiled_from_these_sources() -> None:
    check_results(RESULTS, source_hash(), {str(target) for target in every_target(90)})


def test_covering_sets_cover_every_pair() -> None:
    assert len(covering()) < 30


@pytest.mark.parametrize("target", [*MAIN, *SAMPLE, *OTHERS], ids=lambda t: f"compile-{t}")
def test_target(target: Target, compiler: None) -> None:
    reports = compile_target(target)
    assert {"attention_forward", "keys_gradient", "queries_gradient"} <= {report.kernel for report in reports}
    assert not faults(target, reports)
    assert target.arch in SHARED_MEMORY
    if target in MAIN:
        for report in reports:
            assert report.spills <= SPILLS.get((target.dim, report.kernel), 0), report[:4]
            if report.kernel != "row_statistics":
                assert "wgmma" in report.compiled.asm["ptx"], report.kernel
