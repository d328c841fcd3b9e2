"""The chain is one cycle through its set; the ladder times what is right and says why the rest is missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tilewise.bench import ladder
from tilewise.bench.inputs import attention_inputs, default_text
from tilewise.bench.ladder import Rung, climb, rungs
from tilewise.bench.latency import chain, chase


@pytest.mark.parametrize("size", [128, 256, 4096, 1000])
def test_a_chain_is_one_cycle(size: int) -> None:
    links = chain(size)
    places = size // 64
    seen, place = set(), 0
    for _ in range(places):
        seen.add(place)
        place = int(links[place])
    assert place == 0
    assert len(seen) == places
    assert all(index % 8 == 0 for index in seen), "a cache line a step"


def test_chains_are_in_random_order() -> None:
    links = chain(2**16)[::8]
    neighbours = sum(abs(int(links[i]) - 8 * i) <= 8 for i in range(len(links)))
    assert neighbours < 20


def test_chasing_here() -> None:
    found = chase([2**20, 2**12], steps=2000)
    assert [x.size for x in found] == [2**12, 2**20]
    assert found[0].nanoseconds == 0
    assert found[1].nanoseconds >= 0


def test_what_cannot_be_chased() -> None:
    with pytest.raises(ValueError, match="sizes: got none; wants at least one working set"):
        chase([])
    with pytest.raises(ValueError, match="size: got 64; wants at least 128 bytes"):
        chain(64)


def test_climbing_here() -> None:
    inputs = attention_inputs(default_text(), length=113, heads=2, head_dim=16)
    steps = {step.name: step for step in climb(inputs, seconds=0.01)}
    for name in ("six steps", "v1 loops", "v2 loops", "standard", "tiled", "sdpa"):
        step = steps[name]
        assert step.milliseconds is not None
        assert step.error is not None
        assert step.budget is not None
        assert step.error <= step.budget
    for name in ("triton", "hopper"):
        assert steps[name].milliseconds is None
        assert "cannot run" in steps[name].why
    assert [rung.name for rung in rungs(torch.device("cpu"))] == list(steps)


def test_a_wrong_rung_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v * 1.01

    monkeypatch.setattr(ladder, "rungs", lambda device: [Rung("wrong", "nothing", wrong)])
    (step,) = climb(attention_inputs(default_text(), length=17, heads=1, head_dim=8))
    assert step.milliseconds is None
    assert step.why == "exceeds its error budget"


def test_python_loops_stop_at_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "LONGEST_LOOP", 16)
    steps = climb(attention_inputs(default_text(), length=17, heads=1, head_dim=8), seconds=0.01)
    assert [step.why for step in steps if step.name.endswith("loops")] == ["a loop in Python: run up to N = 16"] * 2
