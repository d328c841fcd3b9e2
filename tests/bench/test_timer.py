from __future__ import annotations

import time

import pytest
import torch

from tilewise.bench.timer import interleaved, once

CPU = torch.device("cpu")


def test_once_measures_milliseconds() -> None:
    taken = once(lambda: time.sleep(0.02), CPU)
    assert 19 < taken < 500


def test_calls_take_turns() -> None:
    order: list[str] = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, seconds=9, least=2, most=3)
    assert order == ["a", "b"] * 3


def test_slow_calls_run_least_times_and_quick_ones_most() -> None:
    times = interleaved({"slow": lambda: time.sleep(0.03), "quick": lambda: None}, CPU, seconds=0.01, least=2, most=6)
    assert times["slow"].runs == 2
    assert times["quick"].runs == 6


def test_progress_ends_with_all_that_was_planned() -> None:
    said: list[tuple[int, int]] = []
    interleaved(
        {"a": lambda: None, "b": lambda: None}, CPU, seconds=9, most=4, after_each=lambda *now: said.append(now)
    )
    assert [done for done, _ in said] == list(range(1, 9))
    assert said[-1] == (8, 8)


def test_median_lies_between_least_and_most() -> None:
    pauses = iter([0.001, 0.03, 0.002])
    timing = interleaved({"one": lambda: time.sleep(next(pauses))}, CPU, seconds=9, least=3, most=3)["one"]
    assert timing.least <= timing.median <= timing.most
    assert timing.median < 15 < timing.most


@pytest.mark.gpu
def test_once_waits_for_the_device() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    a @ a
    assert once(lambda: a @ a, device) > 1.0
