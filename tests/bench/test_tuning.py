from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tilewise.backends.triton import interpreting
from tilewise.backends.triton.configs import HOPPER, SINGLE, Tile
from tilewise.bench import tuning
from tilewise.bench.judge import Finding
from tilewise.bench.suites import Case
from tilewise.bench.tuning import KERNELS, candidates, tune
from tilewise.errors import UnsupportedError


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_shapes_that_stand_are_among_those_tried(kernel: str, head_dim: int) -> None:
    for table, element_size in ((HOPPER, 2), (SINGLE, 4)):
        stands = getattr(table[head_dim], kernel)
        found = candidates(kernel, head_dim, stands, element_size)
        assert found[0] == stands
        assert len(set(found)) == len(found) > 3
        assert {tile.tma for tile in found} == {stands.tma}


def test_shapes_that_cannot_hold_their_accumulators_are_left_out() -> None:
    stands = HOPPER[256].dkdv
    wide = [tile for tile in candidates("dkdv", 256, stands, 2) if tile != stands]
    assert wide
    assert all(2 * tile.block_n * (256 + tile.block_m) <= 224 * 32 * tile.num_warps for tile in wide)
    assert not any(tile.block_n == 128 for tile in wide)


def test_without_a_gpu_the_engine_says_so() -> None:
    if torch.cuda.is_available() or interpreting():
        pytest.skip("the engine runs here")
    with pytest.raises(UnsupportedError, match="runs on GPUs"):
        next(tune(Case(1, 1, 1, 65, 16, "float32"), torch.device("cpu")))


def raised(call: Callable[..., object], task: tuple[Any, ...]) -> BaseException | None:
    """What a process of its own would answer, without the seconds that it takes to start."""
    try:
        call(*task)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is the answer)
        return error
    return None


@pytest.mark.skipif(not interpreting(), reason="needs the interpreter, or a GPU that has better things to do")
def test_wrong_shapes_are_named_and_right_ones_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted. One of three shapes is made to answer wrongly, and one cannot be launched."""
    right, wrong, impossible = Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(24, 32, 4, 1)
    honest = tuning.Bench.finding

    def finding(self: tuning.Bench, judge: object, kernel: str, tile: Tile) -> Finding:
        found = honest(self, judge, kernel, tile)  # type: ignore[arg-type]
        assert found.passed
        return found._replace(error=found.budget * 2) if tile == wrong else found

    monkeypatch.setattr(tuning.Bench, "finding", finding)
    monkeypatch.setattr(tuning, "in_processes", lambda call, tasks: [raised(call, task) for task in tasks])
    outcomes = list(
        tune(
            Case(1, 2, 1, 33, 16, "float32", causal=True),
            torch.device("cpu"),
            kernels=("forward", "dkdv"),
            rounds=1,
            choose=lambda kernel, head_dim, stands, element_size: [stands, right, wrong, impossible],
        )
    )
    assert [outcome.kernel for outcome in outcomes] == ["forward", "dkdv"]
    for outcome in outcomes:
        assert outcome.wrong == (wrong,)
        assert [tile for tile, _ in outcome.refused] == [impossible]
        assert {row.stands for row in outcome.rows} <= {True, False}
        assert sum(row.stands for row in outcome.rows) == 1
        assert right in {row.tile for row in outcome.rows}
