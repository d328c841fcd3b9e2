"""A calibration from end to end, as small as it can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tilewise.bench import calibrate as module
from tilewise.bench.calibrate import calibrate, dots, last_level_cache, tensors
from tilewise.cost.calibration import load, save
from tilewise.cost.prediction import predict
from tilewise.cost.roofline import dot_specs


def test_calibrating_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_ROUNDS", {"cpu": 1})
    told: list[float] = []
    found = calibrate(
        torch.device("cpu"),
        torch.float32,
        seconds=0,
        training=8,
        held_out=3,
        largest=2**16,
        progress=lambda label, share: told.append(share),
    )
    assert {(fit.backend, fit.direction) for fit in found.fits} == {
        (backend, direction) for backend in ("standard", "tiled", "sdpa") for direction in ("forward", "backward")
    }
    assert all(len(fit.held_out) == 3 and fit.spread >= 0 for fit in found.fits)
    assert [dot.name for dot in found.dots] == ["standard", "flash", "decode"]
    assert told == sorted(told)
    assert 0 <= told[0] <= told[-1] <= 1
    save(found, tmp_path / "machine.json")
    assert load(tmp_path / "machine.json") == found
    spec = dot_specs("cpu", "float32")["flash"]
    times = [p.milliseconds for p in predict(spec, found.fits, found.device, ("standard", "tiled"))]
    assert all(time is not None and 0 < time < 1e4 for time in times)


def test_a_backend_that_computes_wrongly_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "self_test", lambda case, name: type("Test", (), {"passed": name != "tiled"})())
    runnable = [name for name in module.BACKEND_NAMES if module._runs(name, torch.device("cpu"))]
    assert "tiled" not in runnable
    assert "standard" in runnable


def test_dots_hold_what_the_model_counts() -> None:
    for dot in dots(torch.device("cpu"), torch.float32):
        spec = dot_specs("cpu", "float32")[dot.name]
        assert dot.flops == 4 * spec.batch * spec.heads * spec.q_len * spec.k_len * spec.head_dim
        assert dot.seconds > 0


def test_tensors_have_the_shapes_of_the_spec() -> None:
    q, k, v = tensors(dot_specs("cpu", "float32")["decode"], torch.device("cpu"), torch.float32)
    assert q.shape == (8, 8, 1, 64)
    assert k.shape == v.shape == (8, 8, 4096, 64)


def test_cache_size_is_plausible() -> None:
    assert last_level_cache() == 0 or 2**18 <= last_level_cache() <= 2**31
