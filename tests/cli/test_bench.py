"""`tilewise bench`, run for real at small sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tilewise.bench import benchmark
from tilewise.bench.calibrate import MachineRates
from tilewise.bench.results import read, write
from tilewise.bench.timer import in_rounds
from tilewise.bench.workload import Workload
from tilewise.cli import BAD_USAGE, FAILED, INTERRUPTED, OK, run

SMALL = ["bench", "--device", "cpu", "--length", "65,129", "--head-dim", "24", "--full"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a few calls on a machine whose rates are known: this is about what the command does with them."""
    monkeypatch.setattr(benchmark, "machine_rates", lambda device, dtype: MachineRates(1e11, 1e10))

    def short(calls: dict, device: torch.device, **options: object) -> dict:
        return in_rounds(calls, device, **{**options, "fill": 0.1})

    monkeypatch.setattr(benchmark, "in_rounds", short)


def test_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--json", "-"]) == OK
    captured = capsys.readouterr()
    assert captured.err == ""
    said = json.loads(captured.out)
    assert said["complete"] is True
    assert [(cell["problem"]["length"], cell["pass"]) for cell in said["cells"]] == [
        (65, "forward"),
        (65, "backward"),
        (129, "forward"),
        (129, "backward"),
    ]
    assert said["environment"]["torch"] == torch.__version__
    assert set(said["cells"][0]["peers"]) == {"sdpa", "math"}


def test_json_without_a_name_is_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--forward", "--peers", "none", "--json"]) == OK
    assert {cell["pass"] for cell in json.loads(capsys.readouterr().out)["cells"]} == {"forward"}


def test_table_file_and_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, page = tmp_path / "r.json", tmp_path / "r.html"
    assert (
        run(
            [
                *SMALL,
                "--peers",
                "sdpa",
                "--backend",
                "auto",
                "--backend",
                "standard",
                "--json",
                str(file),
                "--html",
                str(page),
            ]
        )
        == OK
    )
    shown = capsys.readouterr().out
    assert "auto (tiled)" in shown
    assert "all 8 results are within their error budget" in shown
    assert shown.endswith(f"written: {file}\nwritten: {page}\n")
    assert len(read(file).cells) == 8
    assert "tilewise bench --device cpu --length 65,129" in page.read_text(encoding="utf-8")


def test_the_default_on_a_cpu_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--device", "cpu", "--list", "--json"]) == OK
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == 3 * 3 * 2
    assert all("float32" in cell["case"] for cell in listed)
    assert max(cell["gflop"] for cell in listed) < 20


def test_list_measures_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "of", None)
    assert run(["bench", "--list", "--suite", "dense", "--suite", "sparse", "--dtype", "bfloat16", "--backward"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 30 + 3  # the sparse suite's dense case is one of the dense suite
    assert all("backward" in line and "GFLOP" in line for line in lines)


def test_a_wrong_result_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = Workload.ours
    monkeypatch.setattr(Workload, "ours", lambda work, name: lambda: right(work, name)() * 1.001)
    assert run([*SMALL, "--forward"]) == FAILED
    shown = capsys.readouterr().out
    assert "exceed their error budget and got no time" in shown
    assert "wrong: full D=24 N=65" in shown


def test_against_an_earlier_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert run([*SMALL, "--json", str(file)]) == OK
    capsys.readouterr()
    earlier = read(file)

    def sped(factor: float) -> str:
        def changed(cell):
            return replace(cell, ms=cell.ms / factor, spread=tuple(x / factor for x in cell.spread))

        path = tmp_path / "earlier.json"
        write(replace(earlier, cells=tuple(map(changed, earlier.cells))), path)
        return str(path)

    assert run([*SMALL, "--json", str(file), "--resume", "--against", sped(1000.0)]) == FAILED
    shown = capsys.readouterr().out
    assert shown.count("regressed") == 4
    assert "4 of 4 cells lost ground to their fastest peer" in shown
    assert run([*SMALL, "--json", str(file), "--resume", "--against", sped(0.001)]) == OK
    assert "none of 4 cells lost ground" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_finished(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.json"
    whole, lengths = Workload.of, []

    def of(case, device):
        lengths.append(case.length)
        if lengths == [65, 129]:
            raise KeyboardInterrupt
        return whole(case, device)

    monkeypatch.setattr(Workload, "of", of)
    assert run([*SMALL, "--json", str(file)]) == INTERRUPTED
    assert capsys.readouterr().err == (
        f"tilewise bench: interrupted; 2 finished cells are in {file}: the same command goes on from there\n"
    )
    first = read(file)
    assert not first.complete
    assert run([*SMALL, "--json", str(file)]) == OK
    assert lengths == [65, 129, 129]
    finished = read(file)
    assert finished.complete
    assert finished.cells[:2] == first.cells
    assert run([*SMALL, "--json", str(file), "--resume"]) == OK
    assert lengths == [65, 129, 129]
    assert run([*SMALL, "--json", str(file)]) == OK  # a finished run is measured anew
    assert lengths == [65, 129, 129, 65, 129]


def test_another_machines_results_are_not_continued(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert run([*SMALL, "--forward", "--json", str(file)]) == OK
    found = read(file)
    write(replace(found, complete=False, environment={**found.environment, "torch": "1.0"}), file)
    capsys.readouterr()
    assert run([*SMALL, "--forward", "--json", str(file)]) == BAD_USAGE
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "torch '1.0'" in said
    assert "--no-resume" in said
    write(replace(found, complete=False), file)
    assert run([*SMALL, "--forward", "--rounds", "6", "--json", str(file)]) == BAD_USAGE
    assert "rounds 5" in capsys.readouterr().err
    assert run([*SMALL, "--forward", "--rounds", "6", "--no-resume", "--json", str(file)]) == OK


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "slow"], "'slow' is not one of"),
        (["--rounds", "3"], "3 is not in the range"),
        (["--backend", "fast"], "'auto' or one of"),
        (["--peers", "sdpa,nobody"], "'nobody'"),
        (["--peers", "cudnn"], "on cpu"),
        (["--length", "x"], "not a list of integers"),
        (["--suite", "sparse", "--length", "1000"], "a multiple of 128"),
        (["--suite", "sparse", "--causal"], "no case of these suites is left"),
        (["--json", "no/such/folder/r.json"], "does not exist"),
        (["--html", "no/such/folder/r.html"], "does not exist"),
        (["--against", "no-such.json"], "results of `tilewise bench --json`"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "--device", "cpu", *arguments]) == BAD_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_a_json_file_that_is_something_else_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "package.json"
    file.write_text('{"name": "something else"}', encoding="utf-8")
    assert run([*SMALL, "--json", str(file)]) == BAD_USAGE
    assert "results of `tilewise bench --json`" in capsys.readouterr().err
    assert "something else" in file.read_text(encoding="utf-8")
