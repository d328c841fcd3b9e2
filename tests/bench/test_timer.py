from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from tilewise.bench.timer import SETTLE, in_rounds, interleaved, once

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


def test_rounds_take_turns_in_changing_order_after_a_round_that_does_not_count() -> None:
    turns: list[str] = []

    def call(name: str) -> None:
        if not turns or turns[-1] != name:
            turns.append(name)
        time.sleep(0.001)

    calls = {name: (lambda name=name: call(name)) for name in "abc"}
    times = in_rounds(calls, CPU, rounds=20, fill=1.0)
    assert {timing.runs for timing in times.values()} == {20}
    followers = set(pairwise(turns))
    assert followers == {(x, y) for x in "abc" for y in "abc" if x != y}


def test_a_round_is_filled_and_counts_with_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 1 ms fill 4 ms with four; the first round is for warming up."""
    told = iter([1.0, *4 * [100.0], 3.0, 1.0, 50.0, 1.0, 2.0, 2.0, 2.0, 7.0])
    monkeypatch.setattr("tilewise.bench.timer.once", lambda call, device: next(told))
    timing = in_rounds({"one": lambda: None}, CPU, rounds=2, fill=4.0)["one"]
    assert timing == (2.0, 2.0, 2.0, 2)
    assert next(told, None) is None


@pytest.mark.gpu
def test_on_a_gpu_a_turn_begins_with_runs_that_let_the_clock_settle() -> None:
    device, count = torch.device("cuda"), 0
    a = torch.randn(4096, 4096, device=device)

    def product() -> None:
        nonlocal count
        count += 1
        a @ a

    timing = in_rounds({"one": product}, device, rounds=5, fill=20.0)["one"]
    assert 0.1 < timing.median < 20
    assert (count - 2) / 6 * timing.most >= 0.5 * (SETTLE + 20.0)
    assert (count - 2) % 6 == 0


def test_progress_of_rounds_ends_with_all_that_was_planned() -> None:
    said: list[tuple[int, int]] = []
    calls = {"a": lambda: None, "b": lambda: None}
    in_rounds(calls, CPU, rounds=5, fill=0.0, after_each=lambda *now: said.append(now))
    assert said == [(done, 12) for done in range(1, 13)]


def test_nobody_to_time() -> None:
    assert in_rounds({}, CPU) == {}
