"""`tilewise compare`, run for real at small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tilewise.backends.base import BACKEND_NAMES
from tilewise.bench import cases
from tilewise.cli import BAD_USAGE, FAILED, OK, run

SMALL = ["--device", "cpu", "--lengths", "1,65,113", "--heads", "3", "--head-dim", "24"]
KEYS = {"method", "backend", "n", "error", "budget", "ms", "peak_bytes", "tflops", "roofline", "speedup"}


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own rates are measured in test_calibrate; here a second each time would be lost."""
    from tilewise.bench.calibrate import MachineRates

    monkeypatch.setattr("tilewise.bench.comparison.machine_rates", lambda device, dtype: MachineRates(1e11, 1e10))


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def compare_json(capsys: pytest.CaptureFixture[str], report: Path, *more: str) -> tuple[int, dict]:
    code = run(["compare", *SMALL, "--report", str(report), "--json", *more])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, json.loads(captured.out)


def test_a_row_per_method_and_length(capsys: pytest.CaptureFixture[str], report: Path) -> None:
    code, said = compare_json(capsys, report)
    assert code == OK
    assert set(said) == {"environment", "rows"}
    rows = said["rows"]
    assert all(set(row) == KEYS for row in rows)
    methods = {"six-steps", "flash-v1", "flash-v2", "standard", "tiled", "sdpa", "auto"}
    for n in (1, 65, 113):
        assert methods <= {row["method"] for row in rows if row["n"] == n}
    assert len({(row["method"], row["n"]) for row in rows}) == len(rows)
    for row in rows:
        assert 0 <= row["error"] <= row["budget"]
        assert row["ms"] > 0
        assert row["tflops"] == pytest.approx(4 * 3 * row["n"] ** 2 * 24 / row["ms"] / 1e9)
        intensity = row["n"] / 4
        assert row["roofline"] == pytest.approx(row["tflops"] * 1e12 / min(1e11, 1e10 * intensity))
        assert row["backend"] in {*BACKEND_NAMES, "reference"}
        standard = next(r for r in rows if r["method"] == "standard" and r["n"] == row["n"])
        assert row["speedup"] == pytest.approx(standard["ms"] / row["ms"])
    assert said["environment"]["dtype"] == "float32"
    assert said["environment"]["torch"] == torch.__version__


def test_auto_names_the_backend_that_explain_names(capsys: pytest.CaptureFixture[str], report: Path) -> None:
    import tilewise

    _, said = compare_json(capsys, report, "--causal")
    q = torch.zeros(1, 3, 65, 24)
    chosen = {row["backend"] for row in said["rows"] if row["method"] == "auto" and row["n"] == 65}
    assert chosen == {tilewise.explain(q, q, q, causal=True).backend}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(dtype: str, capsys: pytest.CaptureFixture[str], report: Path) -> None:
    code, said = compare_json(capsys, report, "--dtype", dtype, "--lengths", "65")
    assert code == OK
    assert said["environment"]["dtype"] == dtype


def test_the_table_and_the_report(capsys: pytest.CaptureFixture[str], report: Path, tmp_path: Path) -> None:
    text = tmp_path / "a text.txt"
    text.write_text("some words that repeat, some words that repeat")
    assert run(["compare", *SMALL, "--report", str(report), "--text", str(text)]) == OK
    shown = capsys.readouterr().out
    assert "speed-up" in shown
    assert "within their error budget" in shown
    assert shown.endswith(f"report: {report}\n")
    html = report.read_text(encoding="utf-8")
    assert f"tilewise compare --device cpu --lengths 1,65,113 --heads 3 --head-dim 24 --report {report}" in html
    assert "--text &#39;" in html
    assert "N\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}113" in html


def test_a_wrong_method_gets_no_time_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
        return cases._six_steps(q, k, v, causal=causal) * (1 + 1e-4)

    methods = [cases.Method("six-steps", "reference", slightly_wrong), *cases.all_methods()[1:]]
    monkeypatch.setattr("tilewise.bench.comparison.all_methods", lambda: methods)
    code, said = compare_json(capsys, report, "--lengths", "65")
    assert code == FAILED
    wrong = [row for row in said["rows"] if row["error"] > row["budget"]]
    assert [row["method"] for row in wrong] == ["six-steps"]
    assert wrong[0]["ms"] is wrong[0]["speedup"] is wrong[0]["tflops"] is None
    assert "Not exact here: six-steps" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, b"", b"\x00\x01\xff binary"])
def test_unusable_text_is_one_line_and_exit_code_2(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "input"
    if content is not None:
        path.write_bytes(content)
    assert run(["compare", "--text", str(path), "--report", str(tmp_path / "r.html")]) == BAD_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("tilewise compare: text: got ")
    assert not (tmp_path / "r.html").exists()


def test_a_report_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "--report", str(tmp_path / "no" / "r.html")]) == BAD_USAGE
    assert "does not exist" in capsys.readouterr().err
    assert run(["compare", "--report", str(tmp_path)]) == BAD_USAGE
    assert "is a directory" in capsys.readouterr().err


def test_references_that_loop_in_python_stop_at_a_length(capsys: pytest.CaptureFixture[str], report: Path) -> None:
    from tilewise.bench.comparison import Settings, compare
    from tilewise.bench.inputs import default_text

    cpu = torch.device("cpu")
    compared = compare(Settings(default_text(), (1025,), 1, 8, torch.float32, cpu, seconds=0.0))
    methods = {row.method for row in compared.rows}
    assert not {"flash-v1", "flash-v2"} & methods
    assert "up to N = 1,024" in compared.left_out["flash-v1"]
    assert compared.plans[1025].backend == next(row.backend for row in compared.rows if row.method == "auto")


def test_what_does_not_fit_is_left_out_or_refused(
    capsys: pytest.CaptureFixture[str], report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilewise.bench import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 8 * 113 * 113 + 1)
    code, said = compare_json(capsys, report, "--lengths", "113", "--heads", "8")
    methods = {row["method"] for row in said["rows"]}
    assert code == OK
    assert "tiled" in methods
    assert not {"standard", "six-steps"} & methods
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 8 * 113 * 113 - 1)
    assert run(["compare", *SMALL, "--report", str(report)]) == BAD_USAGE
    assert "GiB are free" in capsys.readouterr().err
