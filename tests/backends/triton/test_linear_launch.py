"""What linear attention's launches remember, with a kernel that only notes how it was called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tilewise.backends.triton import linear
from tilewise.backends.triton.linear import TRITON_LINEAR, LinearPlan
from tilewise.spec import LinearSpec


class Kernel:
    """Stands in for a compiled kernel and for what Triton answers when asked for it."""

    arg_names = ("a_ptr", "b_ptr", "stride", "scale", "SIZE", "FLAG")

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not options:
                self.launched.append((grid, *arguments))
                return None
            self.asked.append((grid, *arguments, options["num_warps"], options["num_stages"]))
            return self

        return call


@pytest.fixture
def plan() -> LinearPlan:
    return TRITON_LINEAR.configure(LinearSpec(1, 1, 64, 64, 64, 64, "float32", "sm_90"))


def launch(
    plan: LinearPlan, kernel: Kernel, a: Any, b: Any, stride: int = 64, warps: int = 4, flag: bool = True
) -> None:
    # The constants come in any order, and with more than this kernel takes.
    constants = {"OTHER": 0, "FLAG": flag, "SIZE": 16}
    linear._launch(plan, kernel, 7, (a, b, stride, 0.5), constants, warps)


def test_the_second_call_asks_nobody(plan: LinearPlan) -> None:
    kernel, a = Kernel(), torch.zeros(64)
    launch(plan, kernel, a, None)
    launch(plan, kernel, a.clone(), None)
    assert kernel.asked == [((7,), a, None, 64, 0.5, 16, True, 4, 3)]
    assert len(kernel.launched) == 1
    assert kernel.launched[0][0] == (7, 1, 1)
    assert kernel.launched[0][2:] == (None, 64, 0.5, 16, True)


def test_whatever_triton_looks_at_is_another_kernel(plan: LinearPlan) -> None:
    a = torch.zeros(64)
    kernel = Kernel()
    launch(plan, kernel, a, None)
    for change in ({"b": a}, {"b": a.half()}, {"a": a.half()}, {"stride": 65}, {"warps": 8}, {"flag": False}):
        launch(plan, kernel, **{"a": a, "b": None, **change})  # type: ignore[arg-type]
    assert len(kernel.asked) == 7
    assert not kernel.launched


def test_what_lies_askew_is_not_remembered(plan: LinearPlan) -> None:
    kernel, a = Kernel(), torch.zeros(65)[1:]
    launch(plan, kernel, a, None)
    launch(plan, kernel, a, None)
    assert len(kernel.asked) == 2
    assert not plan.compiled


def test_memory_of_many_lengths_is_bounded(plan: LinearPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_REMEMBERED", 10)
    kernel, a = Kernel(), torch.zeros(64)
    for stride in range(100):
        launch(plan, kernel, a, None, stride)
    assert len(plan.compiled) <= 10
