from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import CASES, sample, timed_cell, wrong

from tilewise.bench.results import Results, read, write

FIRST = timed_cell(CASES[0], "forward")
CELL_KEYS = {
    "case",
    "pass",
    "backend",
    "ms",
    "spread",
    "tflops",
    "ratio",
    "best_peer",
    "ceiling_share",
    "error",
    "budget",
    "peak_bytes",
    "peers",
}


def test_there_and_back(tmp_path: Path) -> None:
    results = sample()
    write(results, tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_schema(tmp_path: Path) -> None:
    write(sample(), tmp_path / "results.json")
    said = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"environment", "ceilings", "cells"} <= set(said)
    cell = said["cells"][0]
    assert set(cell) >= CELL_KEYS
    assert cell["peers"]["flex"] == {"absent": "not today"}
    assert "absent" not in cell["peers"]["cudnn"]
    assert cell["peers"]["cudnn"]["ms"] > 0


def test_an_infinite_error_stays_wrong(tmp_path: Path) -> None:
    write(sample(replace(wrong(FIRST), error=math.inf)), tmp_path / "results.json")
    found = read(tmp_path / "results.json")
    assert found.cells[0].wrong
    assert not found.passed


def test_a_cell_measured_again_takes_the_place_of_the_old_one() -> None:
    other = timed_cell(CASES[0], "forward", backend="triton")
    results = sample(FIRST, other).with_cells([replace(FIRST, ms=1.0)])
    assert [cell.ms for cell in results.cells] == [1.0, other.ms]


def test_shares_follow_the_ceilings() -> None:
    compute_bound = replace(FIRST, tflops=400.0, intensity=1000.0)
    memory_bound = replace(FIRST, backend="triton", tflops=20.0, intensity=10.0)
    results = sample(compute_bound, memory_bound)
    assert [cell.ceiling_share for cell in results.cells] == pytest.approx([400 / 800, 20 / 40])


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"cells": [{"x": 1}]}', '{"cells": 3}'])
def test_what_is_no_result_is_said(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="results of `tilewise bench --json`"):
        read(path)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write(sample(FIRST), path)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write(Results({}, {}, {}), path)
    assert read(path) == sample(FIRST)
    assert list(tmp_path.iterdir()) == [path]
