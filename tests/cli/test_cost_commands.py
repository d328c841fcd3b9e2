"""`cost`, `roofline`, `predict`, `advise`, `profile`, `lab`: exit codes, JSON, reports, and no torch where promised."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tilewise.bench.lab import Run
from tilewise.cli import BAD_USAGE, FAILED, OK, run
from tilewise.cost import calibration as calibrations
from tilewise.cost.calibration import Calibration, Dot, save
from tilewise.cost.claims import computed_claims
from tilewise.cost.hardware import DEVICES, measured
from tilewise.cost.prediction import Fit, HeldOut

COMMAND = "import sys; from tilewise.cli import run; sys.exit(run())"


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = OK) -> Any:
    assert run([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def fits(*, error: float = 0.1) -> tuple[Fit, ...]:
    held = tuple(HeldOut(f"shape {i}", 1.0 + error, 1.0, 0.02) for i in range(3))
    return tuple(
        Fit(backend, direction, "float32", (1e-5, cost, 0, 0, 0, 0), held)
        for backend, cost in (("tiled", 5e-12), ("standard", 2e-11))
        for direction in ("forward", "backward")
    )


@pytest.fixture
def machine(tmp_path: Path) -> str:
    here = measured(
        "a box", arch="cpu", matmul={"float32": 1e11}, bandwidth=2e10, memory=2**34, how="by hand", sms=2, l2=2**24
    )
    dots = (
        Dot("standard", 2**31, 142606336, 0.03, "float32"),
        Dot("flash", 2**31, 8388608, 0.025, "float32"),
        Dot("decode", 2**26, 134250496, 0.008, "float32"),
    )
    file = tmp_path / "machine.json"
    save(Calibration(here, calibrations.versions(), "2026-01-31", 30.0, dots, fits(), 0.1), file)
    return str(file)


# No torch, and quickly


def children_seconds() -> float:
    """Processor time of finished child processes: what a busy machine does not lengthen."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("arguments", [["cost"], ["cost", "--tables"], ["roofline"], ["advise"]], ids=" ".join)
def test_it_starts_at_once_and_without_torch(arguments: list[str], machine: str) -> None:
    before = "import atexit, sys; atexit.register(lambda: print({'torch', 'numpy'} & set(sys.modules)));"
    calibrated = [] if arguments[0] == "cost" else ["--calibration", machine]
    seconds = []
    for _ in range(3):
        begun = children_seconds()
        done = subprocess.run(
            [sys.executable, "-c", before + COMMAND, *arguments, *calibrated],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds.append(children_seconds() - begun)
        assert done.returncode == OK, done.stderr
        assert done.stdout.endswith("set()\n")
    assert min(seconds) < 0.5


@pytest.mark.parametrize("verb", ["predict", "profile", "lab", "advise", "roofline", "cost"])
def test_help_needs_no_torch_either(verb: str) -> None:
    before = "import atexit, sys; atexit.register(lambda: print({'torch', 'numpy'} & set(sys.modules)));"
    command = [sys.executable, "-c", before + COMMAND, verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == OK, done.stderr
    assert done.stdout.endswith("set()\n")


# cost


def test_tables_hold_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    value = said(capsys, "cost", "--tables")
    assert len(value["computed"]) == len(computed_claims())
    for claim in value["computed"]:
        for row in claim["rows"]:
            assert row["equal"] or row["note"]
    assert all(claim["command"] for claim in value["measured"])


def test_a_claim_that_is_neither_equal_nor_explained_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilewise.cli import cost as command
    from tilewise.cost.quoted import Claim, Row

    for note, code in (("", FAILED), ("because", OK)):
        monkeypatch.setattr(command, "computed_claims", lambda note=note: [Claim("x", (Row("a", "1", "2", note),))])
        said(capsys, "cost", "--tables", code=code)


def test_cost_of_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    value = said(capsys, "cost", "--heads", "4", "--seq", "100", "--head-dim", "64", "--dtype", "float16")
    assert value["forward"]["matmul"] == 4 * 4 * 100 * 100 * 64
    assert value["memory"]["standard"]["working"] == 2 * 4 * 100 * 100 * 2


def test_cost_of_a_model_and_of_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    value = said(capsys, "cost", "--model", "gpt2-medium", "--batch", "1", "--lengths", "8192", "--checkpoint",
                 "--chunked-loss", "2048")  # fmt: skip
    assert float(value["rows"][0]["peak, flash"].split()[0]) < 16e9 / 2**30
    shapes = said(capsys, "cost", "--device", "h200", "--head-dim", "64")
    assert any("Bank conflicts" in title for title in shapes)
    assert any("Sources of H200" in title for title in shapes)


@pytest.mark.parametrize("arguments", [[], ["--tables"], ["--model", "gpt2"], ["--device", "T4"]], ids=" ".join)
def test_cost_writes_a_page(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "cost.html"
    assert run(["cost", *arguments, "--report", str(page)]) == OK
    html = page.read_text(encoding="utf-8")
    assert "<table" in html
    assert "http" not in html
    assert "tilewise cost" in html
    assert "report: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cost", "--heads", "3", "--kv-heads", "2"], "3 heads are no multiple of 2"),
        (["cost", "--device", "H900"], "H900"),
        (["cost", "--report", "/no/such/folder/x.html"], "does not exist"),
        (["cost", "--chunked-loss", "5"], "--chunked-loss says nothing without --model"),
        (["cost", "--model", "gpt2", "--seq", "64"], "--seq says nothing with --model"),
        (["cost", "--tables", "--model", "gpt2"], "--model says nothing with --tables"),
        (["cost", "--device", "T4", "--causal"], "--causal says nothing"),
        (["cost", "--device", "V100", "--dtype", "bfloat16"], "no matrix units for bfloat16"),
        (["cost", "--seq", "99999999999"], "is not in the range"),
        (["predict", "--kv-heads", "3"], "8 heads are no multiple of 3"),
        (["predict", "--calibrate", "--calibration", "/no/such/folder/x.json"], "does not exist"),
        (["profile", "--seq", "2000000", "--backend", "standard"], "GiB are free"),
        (["roofline", "--device", "T4", "--dtype", "bfloat16"], "wants one of float16"),
        (["roofline", "--device", "T4", "--measure"], "measures this machine, not T4"),
        (["advise", "--heads", "3", "--kv-heads", "2"], "no multiple"),
        (["predict", "--seq", "0"], "0 is not in the range"),
        (["profile", "--backend", "fast"], "'auto' or one of"),
        (["profile", "--backend", "hopper", "--seq", "8"], "cannot run"),
        (["lab", "run", "42"], "no lesson 42"),
        (["lab", "book", "--output", "/no/such/folder/x.html"], "does not exist"),
    ],
)
def test_bad_usage(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], machine: str) -> None:
    takes_one = arguments[0] in ("roofline", "predict", "advise", "profile") and "--calibration" not in arguments
    calibrated = ["--calibration", machine] if takes_one else []
    assert run([*arguments, *calibrated]) == BAD_USAGE
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1


# roofline


def test_roofline_of_a_calibrated_machine(capsys: pytest.CaptureFixture[str], machine: str) -> None:
    value = said(capsys, "roofline", "--calibration", machine)
    steps = value["steps"]
    assert value["balance"] == 5
    assert steps["decode"]["bound"] == "memory"
    assert steps["decode"]["attainable"] == pytest.approx(2e10 * 2**26 / 134250496)
    assert steps["flash"]["reached"] == pytest.approx(2**31 / 0.025 / 1e11)
    assert steps["standard: softmax"]["measured"] is None


def test_roofline_page_has_hollow_and_filled_dots(tmp_path: Path, machine: str) -> None:
    page = tmp_path / "r.html"
    assert run(["roofline", "--calibration", machine, "--report", str(page)]) == OK
    html = page.read_text(encoding="utf-8")
    assert len(re.findall(r'class="marker hollow"/>', html)) == 5
    assert len(re.findall(r'<circle[^>]*class="marker"/>', html)) == 3
    assert "a box" in html


def test_roofline_without_a_measurement(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nowhere = str(tmp_path / "none.json")
    assert said(capsys, "roofline", "--calibration", nowhere)["device"]["name"] == "H200"
    assert run(["roofline", "--device", "here", "--calibration", nowhere]) == BAD_USAGE
    assert "add --measure" in capsys.readouterr().err
    a100 = said(capsys, "roofline", "--device", "A100 80GB", "--dtype", "float16", "--calibration", nowhere)
    assert round(a100["balance"]) == 153


@pytest.mark.parametrize("verb", ["roofline", "advise", "cost"])
def test_a_device_brings_its_own_dtype(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A T4 has no bfloat16, which the others default to."""
    assert run([verb, "--device", "T4"]) == OK
    assert verb == "advise" or "float16" in capsys.readouterr().out


def test_a_file_without_a_calibration_is_told_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    file.write_text("{", encoding="utf-8")
    assert run(["roofline", "--calibration", str(file)]) == OK
    captured = capsys.readouterr()
    assert "holds no calibration" in captured.err
    assert "H200" in captured.out


def test_a_calibration_that_cannot_be_kept_is_used_all_the_same(
    capsys: pytest.CaptureFixture[str], machine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tilewise.bench import calibrate as module
    from tilewise.cli import calibrated

    found = calibrations.load(Path(machine))
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: found)
    monkeypatch.setattr(calibrated, "default_path", lambda: tmp_path / "file" / "machine.json")
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    assert run(["predict", "--seq", "64"]) == OK
    captured = capsys.readouterr()
    assert "not kept for the next time" in captured.err
    assert "tiled" in captured.out


def test_other_versions_are_warned_of(capsys: pytest.CaptureFixture[str], machine: str) -> None:
    value = json.loads(Path(machine).read_text(encoding="utf-8"))
    value["versions"]["torch"] = "1.0"
    Path(machine).write_text(json.dumps(value), encoding="utf-8")
    assert run(["roofline", "--calibration", machine]) == OK
    assert "torch was 1.0" in capsys.readouterr().err.replace("\n", " ")


# predict


def test_predict_from_a_saved_calibration(capsys: pytest.CaptureFixture[str], machine: str) -> None:
    value = said(capsys, "predict", "--calibration", machine, "--heads", "2", "--seq", "512")
    assert [p["backend"] for p in value["predictions"]] == ["tiled", "standard"]
    assert value["predictions"][0]["ms"] == pytest.approx(1e3 * (1e-5 + 5e-12 * 2 * 512 * 512 * 128))
    assert value["within"]
    assert value["fits"][0]["median_error"] == pytest.approx(0.1)


def test_check_fails_beyond_the_promised_error(capsys: pytest.CaptureFixture[str], machine: str) -> None:
    assert run(["predict", "--check", "--calibration", machine]) == OK
    shown = capsys.readouterr().out
    assert "shape 2" in shown
    found = calibrations.load(Path(machine))
    assert found is not None
    save(Calibration(found.device, found.versions, found.date, 1.0, found.dots, fits(error=0.3)), Path(machine))
    assert run(["predict", "--check", "--calibration", machine]) == FAILED
    assert run(["predict", "--calibration", machine]) == OK


def test_predict_calibrates_when_there_is_nothing_yet(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    from tilewise.bench import calibrate as module

    small = partial(module.calibrate, training=8, held_out=2, largest=2**15)
    monkeypatch.setattr(module, "_LEAST_ROUNDS", {"cpu": 1})
    monkeypatch.setattr(module, "machine_rates", lambda *_: module.MachineRates(1e11, 1e10))
    monkeypatch.setattr(module, "calibrate", lambda *a, seconds, progress: small(*a, seconds=0, progress=progress))
    file = tmp_path / "machine.json"
    value = said(capsys, "predict", "--calibration", str(file), "--seq", "64")
    assert file.exists()
    assert value["predictions"]
    measured_roof = said(capsys, "roofline", "--measure", "--calibration", str(file))
    assert measured_roof["steps"]["flash"]["measured"] > 0


# advise and profile


def test_advise(capsys: pytest.CaptureFixture[str], machine: str, tmp_path: Path) -> None:
    value = said(capsys, "advise", "--calibration", machine, "--seq", "4096", "--causal")
    assert value["device"] == "a box"
    assert value["backend"] == "tiled"
    assert value["bother"]
    decode = said(capsys, "advise", "--task", "decode", "--seq", "8192", "--device", "H200", "--calibration", machine)
    assert any("memory-bound" in reason for reason in decode["reasons"])
    page = tmp_path / "a.html"
    assert run(["advise", "--calibration", machine, "--report", str(page)]) == OK
    assert "because" in page.read_text(encoding="utf-8")
    assert set(DEVICES) >= {"H200"}


@pytest.mark.parametrize("backend", ["auto", "standard"])
def test_profile(backend: str, capsys: pytest.CaptureFixture[str], machine: str, tmp_path: Path) -> None:
    trace, page = tmp_path / "trace.json", tmp_path / "p.html"
    command = ["profile", "--seq", "256", "--heads", "2", "--backend", backend, "--calibration", machine]
    value = said(capsys, *command, "--trace", str(trace), "--report", str(page))
    kernels = {kernel["name"]: kernel for kernel in value["kernels"]}
    assert sum(kernel["share"] for kernel in kernels.values()) == pytest.approx(1)
    products = kernels["aten::bmm" if backend == "standard" else "aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert products["flops"] == 4 * 2 * 256 * 256 * 64
    assert products["reached"] > 0
    assert "perf stat" in value["hardware_command"] or "ncu" in value["hardware_command"]
    assert "tilewise profile" in value["hardware_command"]
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    shown = page.read_text(encoding="utf-8")
    assert "of the roof" in shown
    assert "nothing was run" not in shown


def test_profile_of_the_backward(capsys: pytest.CaptureFixture[str], machine: str) -> None:
    value = said(capsys, "profile", "--seq", "128", "--heads", "2", "--backward", "--calibration", machine)
    names = {kernel["name"] for kernel in value["kernels"]}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in names


def test_profile_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str], machine: str) -> None:
    assert run(["profile", "--window", "3", "--calibration", machine]) == BAD_USAGE
    assert "--window" in capsys.readouterr().err
    assert run(["profile", "--seq", "64", "--trace", "/no/such/folder/t.json", "--calibration", machine]) == BAD_USAGE
    assert "does not exist" in capsys.readouterr().err


# lab


def test_lab_lists_its_lessons(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lab"]) == OK
    assert "Softmax and the online trick" in capsys.readouterr().out
    listed = said(capsys, "lab", "list")
    assert said(capsys, "lab") == listed
    assert listed[0] == {"number": "00", "title": "Softmax and the online trick", "file": "00_softmax.py"}


def test_lab_runs_a_lesson(capsys: pytest.CaptureFixture[str]) -> None:
    value = said(capsys, "lab", "run", "00")
    assert value[0]["error"] == ""
    assert value[0]["measured"]["diagonal_gradient_error"]
    assert run(["lab", "run", "00"]) == OK
    assert "Measured here:" in capsys.readouterr().out


def test_a_claim_that_does_not_hold_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilewise.bench import lab

    monkeypatch.setattr(lab, "run_lesson", lambda lesson, told=None: Run(lesson, (), 0.1, {}, "AssertionError"))
    assert said(capsys, "lab", "run", "00", code=FAILED)[0]["error"] == "AssertionError"


def test_lab_writes_the_book(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "book.html"
    value = said(capsys, "lab", "book", "00", "--output", str(page))
    assert value == {"book": str(page), "lessons": ["00"], "failed": []}
    assert "Glossary" in page.read_text(encoding="utf-8")


def test_lab_writes_notebooks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("jupytext")
    value = said(capsys, "lab", "notebooks", "00", "07", "--output", str(tmp_path / "books"))
    assert [Path(name).name for name in value["notebooks"]] == ["00_softmax.ipynb", "07_sparse_attention.ipynb"]
    notebook = json.loads(Path(value["notebooks"][0]).read_text(encoding="utf-8"))
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 5
