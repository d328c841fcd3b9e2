"""The predictor's units of work, its prediction, and what a calibration file keeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.cost import calibration as calibrations
from tilewise.cost.calibration import Calibration, Dot, default_path, load, save
from tilewise.cost.counts import self_attention
from tilewise.cost.hardware import DEVICES, measured
from tilewise.cost.peak import peak_bytes
from tilewise.cost.prediction import _HIDING, KINDS, Fit, HeldOut, predict, work

HERE = measured(
    "a box", arch="cpu", matmul={"float32": 1e11}, bandwidth=2e10, memory=2**34, how="by hand", sms=2, l2=2**24
)


def test_units_of_work_by_hand() -> None:
    spec = self_attention(1000, 64, batch=2, heads=3, dtype="float32")
    calls, products, scores, moved, spilled, longest = work(spec, "standard", "forward", HERE)
    assert (calls, products, scores) == (1, 6 * 10**6 * 128, 6 * 10**6)
    assert moved == 6 * 1000 * 4 * 64 * 4 + 6 * 10**6 * 4
    assert spilled == 6 * 10**6 * 4 - 2**24
    assert longest == products / 2
    tiled = work(spec, "tiled", "forward", HERE)
    assert tiled[4] == 0
    assert tiled[5] == products * 24 / 48
    backward = work(spec, "tiled", "backward", HERE)
    assert backward[1] == 3.5 * tiled[1]


def test_causality_halves_the_work_of_tiles_and_not_that_of_standard() -> None:
    full, causal = (self_attention(4096, 64, dtype="float32", causal=c) for c in (False, True))
    assert work(causal, "standard", "forward", HERE) == work(full, "standard", "forward", HERE)
    share = work(causal, "triton", "forward", HERE)[1] / work(full, "triton", "forward", HERE)[1]
    assert share == pytest.approx(0.5, abs=0.02)
    windowed = replace(causal, window=(128, 0))
    assert work(windowed, "triton", "forward", HERE)[1] < 0.1 * work(full, "triton", "forward", HERE)[1]


def test_a_grid_that_does_not_fill_the_chip_is_told_apart() -> None:
    h200 = DEVICES["H200"]
    few, many = (self_attention(2048, 128, batch=b, heads=1, dtype="bfloat16") for b in (1, 8))
    assert work(few, "triton", "forward", h200)[5] == work(many, "triton", "forward", h200)[5]
    assert 8 * work(few, "triton", "forward", h200)[1] == work(many, "triton", "forward", h200)[1]


def fit(backend: str, *costs: float) -> Fit:
    held = (HeldOut("a", 1.1, 1.0, 0.1), HeldOut("b", 3.0, 4.0, 0.2), HeldOut("c", 5.0, 5.0, 0.0))
    return Fit(backend, "forward", "float32", costs, held)


def test_prediction() -> None:
    spec = self_attention(512, 64, heads=2, dtype="float32")
    fits = [fit("standard", 1e-3, 0, 0, 0, 0, 0), fit("tiled", 0, 1e-12, 0, 0, 0, 0)]
    found = predict(spec, fits, HERE, ("standard", "tiled", "sdpa"))
    assert [p.backend for p in found] == ["tiled", "standard", "sdpa"]
    assert found[1].milliseconds == pytest.approx(1.0)
    assert found[0].milliseconds == pytest.approx(1e-9 * 2 * 512 * 512 * 128)
    assert found[2].milliseconds is None
    assert found[2].error is None
    for prediction in found:
        assert prediction.peak_bytes == peak_bytes(spec, prediction.backend)
    assert predict(replace(spec, dtype="float16"), fits, HERE, ("tiled",))[0].milliseconds is None


def test_stated_errors() -> None:
    errors = fit("tiled", *[0.0] * len(KINDS))
    assert errors.median_error == pytest.approx(0.1)
    assert errors.worst_error == pytest.approx(0.25)
    assert errors.spread == pytest.approx(0.1)
    assert math.isnan(Fit("tiled", "forward", "float32", ()).median_error)


@pytest.fixture
def calibration() -> Calibration:
    dots = (Dot("flash", 1e9, 1e6, 1e-2, "float32"),)
    return Calibration(HERE, calibrations.versions(), "2026-01-31", 12.5, dots, (fit("tiled", *range(6)),), 0.4)


def test_a_saved_calibration_comes_back(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "new" / "machine.json"
    save(calibration, file)
    assert load(file) == calibration
    assert calibration.stale() is None
    assert [path.name for path in file.parent.iterdir()] == ["machine.json"]


def test_other_versions_are_told(calibration: Calibration) -> None:
    old = replace(calibration, versions={**calibration.versions, "torch": "2.0.0", "cudnn": "9"})
    told = old.stale()
    assert told is not None
    assert "torch was 2.0.0 and is" in told
    assert "cudnn was 9 and is absent" in told


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"format": 99}', '{"format": 1, "device": {}}'])
def test_an_unreadable_file_counts_as_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text(text, encoding="utf-8")
    assert load(file) is None
    assert load(tmp_path / "missing.json") is None
    assert load(tmp_path) is None


def test_a_truncated_file_counts_as_none(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    save(calibration, file)
    value = json.loads(file.read_text(encoding="utf-8"))
    del value["fits"][0]["costs"]
    file.write_text(json.dumps(value), encoding="utf-8")
    assert load(file) is None


def test_the_default_place_is_the_users_own() -> None:
    assert default_path().is_relative_to(Path.home())


@pytest.mark.parametrize("window", [(None, None), (128, 0), (1000, None)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_launches_of_tiles_are_those_that_the_backend_makes(
    window: tuple[int | None, int | None], causal: bool
) -> None:
    torch = pytest.importorskip("torch")
    from tilewise.backends import tiled
    from tilewise.backends.base import Operands

    spec = replace(self_attention(4096, 64, heads=4, dtype="float32", causal=causal), window=window)
    q = torch.zeros(1, 4, 4096, 64)
    tiles = list(tiled._tiles(Operands(q, q, q), spec, tiled.plain_config(spec)))
    runs = [run for tile in tiles for run in tile.chunks]
    cut = sum(run.signature is not None for run in runs)
    made = 1 + len(tiles) + len(runs) + _HIDING * cut
    assert work(replace(spec, device="sm_90"), "tiled", "forward", HERE)[0] == pytest.approx(made, abs=1)
    assert work(spec, "tiled", "forward", HERE)[0] == 1


def test_no_keys_and_no_rows_take_no_launches_and_no_division() -> None:
    for lengths in ((5, 0), (0, 5), (0, 0)):
        spec = replace(self_attention(1, 64), device="sm_90", q_len=lengths[0], k_len=lengths[1])
        assert work(spec, "tiled", "forward", HERE)[1] == 0
        assert peak_bytes(spec, "tiled") >= 0
        assert peak_bytes(spec, "tiled", "backward") >= 0
