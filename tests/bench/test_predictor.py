"""The fit on synthetic timings: it finds the costs that made them, under noise and outliers too, and judges itself."""

from __future__ import annotations

import numpy as np
import pytest

from tilewise.bench.calibrate import random_shapes
from tilewise.bench.predictor import Sample, fit, label_of, nonnegative_relative_fit
from tilewise.cost.hardware import measured
from tilewise.cost.prediction import KINDS, Fit, work
from tilewise.spec import AttentionSpec

HERE = measured(
    "a box", arch="cpu", matmul={"float32": 1e11}, bandwidth=2e10, memory=2**34, how="by hand", sms=2, l2=2**22
)
TRUE = {"standard": (4e-5, 7e-12, 3e-10, 6e-11, 4e-11, 0.0), "tiled": (2e-5, 5e-12, 2e-10, 9e-11, 0.0, 3e-12)}


def shapes(count: int, seed: int) -> list[AttentionSpec]:
    return random_shapes(count, dtype="float32", device="cpu", largest=2**23, seed=seed)


def samples(backend: str, specs: list[AttentionSpec], noise: float, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    truth = Fit(backend, "forward", "float32", TRUE[backend])
    found = []
    for spec in specs:
        seconds = truth.seconds(spec, HERE) * (1 + noise * rng.standard_normal())
        found.append(Sample(spec, seconds, seconds * 1.05))
    return found


@pytest.mark.parametrize("backend", list(TRUE))
def test_exact_timings_are_predicted_exactly(backend: str) -> None:
    found = fit(
        backend, "forward", "float32", samples(backend, shapes(36, 1), 0), samples(backend, shapes(30, 2), 0), HERE
    )
    assert found.worst_error < 1e-6
    assert found.spread == pytest.approx(0.05)
    assert len(found.held_out) == 30


@pytest.mark.parametrize("backend", list(TRUE))
def test_noise_and_outliers_are_survived(backend: str) -> None:
    """5 % of noise, and every ninth run disturbed to three times its time."""
    training = samples(backend, shapes(36, 1), 0.05)
    training = [s._replace(least=3 * s.least) if i % 9 == 0 else s for i, s in enumerate(training)]
    found = fit(backend, "forward", "float32", training, samples(backend, shapes(30, 2), 0), HERE)
    assert found.median_error < 0.06


def test_no_cost_is_below_zero() -> None:
    rng = np.random.default_rng(0)
    units = rng.random((40, 4))
    seconds = units @ np.array([1.0, 2.0, 0.0, 0.0]) * (1 + 0.02 * rng.standard_normal(40))
    costs = nonnegative_relative_fit(units, seconds)
    assert (costs >= 0).all()
    assert costs[0] == pytest.approx(1, abs=0.1)
    assert costs[1] == pytest.approx(2, abs=0.1)
    # One that can only be explained from below is left out.
    assert nonnegative_relative_fit(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([2.0, 1.0]))[1] == 0


def test_small_and_large_shapes_count_alike() -> None:
    """An absolute fit would give the large one everything."""
    costs = nonnegative_relative_fit(np.array([[1.0, 1.0], [1.0, 1e6], [1.0, 2e6]]), np.array([2.0, 1e6, 2e6]))
    assert costs[0] == pytest.approx(1, rel=0.05)


def test_too_few_samples_are_refused() -> None:
    few = samples("tiled", shapes(3, 1), 0)
    with pytest.raises(ValueError, match=f"training: got 3 samples; wants at least {len(KINDS)}"):
        fit("tiled", "forward", "float32", few, few, HERE)


def test_shapes_cover_the_range_and_stay_the_same() -> None:
    found = shapes(66, 1)
    assert found == shapes(66, 1)
    scores = [spec.batch * spec.heads * spec.q_len**2 for spec in found]
    assert max(scores) <= 2**23
    assert max(scores) > 20 * min(scores)
    assert 0.15 < sum(spec.causal for spec in found) / 66 < 0.5
    assert {spec.head_dim for spec in found} == {32, 64, 80, 128}
    assert any(spec.q_len % 2 for spec in found)


def test_labels() -> None:
    spec = AttentionSpec(2, 8, 8, 113, 256, 64, 64, causal=True)
    assert label_of(spec) == "2×8×113/256×64 causal"


def test_work_is_never_negative() -> None:
    for spec in shapes(20, 3):
        for backend in TRUE:
            for direction in ("forward", "backward"):
                assert min(work(spec, backend, direction, HERE)) >= 0
