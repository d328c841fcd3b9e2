"""Peak memory against sizes that are known beforehand."""

from __future__ import annotations

import sys

import pytest
import torch

from tilewise.bench import memory
from tilewise.bench.memory import MemoryCase, cpu_peaks, cuda_peak, free_bytes, measurable, shortage

HEADS, HEAD_DIM = 4, 32

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks of forked children are measured on Linux")


def case(method: str, length: int, dtype: str = "float32") -> MemoryCase:
    return MemoryCase(method, length, HEADS, HEAD_DIM, dtype, causal=False)


def test_peaks_are_those_of_the_score_matrices_or_far_below() -> None:
    """Of six separate steps S, e^(S − m) and P are alive at once, never a fourth; of one tile at a time nothing is."""
    matrix = HEADS * 1024 * 1024 * 4  # bytes: the scores are float32 for bfloat16 inputs too
    with cpu_peaks() as peak_of:
        for dtype in ("float32", "bfloat16"):
            assert 3 * matrix <= peak_of(case("six-steps", 1024, dtype)) < 4 * matrix
        assert peak_of(case("flash-v2", 1024)) < matrix / 2


def test_a_failing_call_is_an_error_and_not_a_number() -> None:
    with cpu_peaks() as peak_of:
        with pytest.raises(RuntimeError, match="six-steps at N=0 failed"):
            peak_of(MemoryCase("six-steps", 0, HEADS, -1, "float32", causal=False))
        assert peak_of(case("six-steps", 64)) >= 0, "the helper goes on after a failure"


def test_where_a_peak_can_be_had() -> None:
    assert measurable(torch.device("cpu"))
    assert measurable(torch.device("cuda"))
    assert not measurable(torch.device("mps"))


@pytest.mark.gpu
def test_cuda_peak_counts_what_is_freed_before_the_end() -> None:
    device = torch.device("cuda")
    assert 2**28 <= cuda_peak(lambda: torch.empty(2**28, dtype=torch.uint8, device=device), device) < 2**28 + 2**22


def test_what_does_not_fit_is_said_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    free = free_bytes(cpu)
    assert free is None or 2**20 < free < 2**50
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 2**30)
    assert shortage(2 * 2**30, cpu) is None
    assert shortage(7 * 2**30, cpu) == "needs about 7 GiB, 3 GiB are free"
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert shortage(2**60, cpu) is None
