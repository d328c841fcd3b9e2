"""Quality against cost: rows are what was measured, and a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilewise.train import quality
from tilewise.train.loop import METRICS, Step, read_metrics
from tilewise.train.quality import Plan, Row, Stage, main, measure, read_rows, table

TINY = Plan(
    (Stage(17, 2, 2, 3), Stage(33, 4, 1, 2)), text_steps=3, dim=16, layers=1, vocab=24, tokens=99, length=33,
    characters=20_000, tested=3,
)  # fmt: skip


def test_rows_come_once_and_a_rerun_trains_only_what_is_missing(tmp_path: Path) -> None:
    trained: list[tuple[str, str]] = []

    def told(name: str, task: str, step: Step) -> None:
        trained.append((name, task))

    first = list(measure(TINY, tmp_path, mechanisms=("mha",), told=told))
    assert [(row.mechanism, row.task) for row in first] == [("mha", "recall"), ("mha", "text")]
    assert [(row.steps, row.tokens) for row in first] == [(5, 5 * 99), (3, 3 * 99)]
    assert set(trained) == {("mha", "recall"), ("mha", "text")}
    assert 0 <= first[0].score <= 1
    assert 4 < first[1].score < 12, "bits a byte of a model that knows nothing yet: about log2(257)"
    assert first[1].cache_bytes == 2 * 33 * 16 * 4, "keys and values, float32"
    assert not list(tmp_path.rglob("*.safetensors")), "what is measured needs no weights"

    trained.clear()
    both = list(measure(TINY, tmp_path, mechanisms=("mha", "gla"), told=told))
    assert set(trained) == {("gla", "recall"), ("gla", "text")}
    assert [row for row in both if row.mechanism == "mha"] == first
    assert sorted(read_rows(tmp_path)) == sorted(both)


def test_half_a_line_is_measured_again(tmp_path: Path) -> None:
    (row,) = measure(TINY, tmp_path, mechanisms=("linear",), tasks=("recall",))
    with (tmp_path / quality.ROWS).open("a", encoding="utf-8") as file:
        file.write('{"mechanism": "mha", "task": "rec')
    assert read_rows(tmp_path) == [row]
    assert len(list(measure(TINY, tmp_path, mechanisms=("mha",), tasks=("recall",)))) == 1
    lines = (tmp_path / quality.ROWS).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["mechanism"] for line in lines] == ["linear", "mha"]


def test_interrupted_in_the_middle_it_ends_with_the_same_answer(tmp_path: Path) -> None:
    plan = Plan((Stage(17, 2, 2, 60),), text_steps=1, dim=16, layers=1, vocab=24, tokens=51, length=33, tested=8)
    (whole,) = measure(plan, tmp_path / "whole", mechanisms=("mha",), tasks=("recall",))
    steps: list[int] = []

    def stop(name: str, task: str, step: Step) -> None:
        steps.append(step.step)
        if step.step == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(measure(plan, tmp_path / "cut", mechanisms=("mha",), tasks=("recall",), told=stop))
    assert read_rows(tmp_path / "cut") == []
    (rest,) = measure(plan, tmp_path / "cut", mechanisms=("mha",), tasks=("recall",), told=stop)
    assert steps == [10, 20, 30, 40, 50, 60]
    assert rest.score == whole.score
    last, wanted = (read_metrics(tmp_path / each / "recall-mha" / METRICS)[-1] for each in ("cut", "whole"))
    assert (last.step, last.loss, last.grad_norm) == (wanted.step, wanted.loss, wanted.grad_norm)


def test_another_plan_does_not_mix_with_what_is_there(tmp_path: Path) -> None:
    list(measure(TINY, tmp_path, mechanisms=("mha",), tasks=("recall",)))
    other = Plan(TINY.stages, text_steps=9, dim=16, layers=1, vocab=24, tokens=99, length=33, lr=1e-3)
    with pytest.raises(ValueError, match="measured with another text_steps, lr, characters, tested"):
        list(measure(other, tmp_path, mechanisms=("mha",)))


def test_the_table_has_a_line_a_mechanism_best_recall_first() -> None:
    rows = [
        Row("gla", "recall", 0.25, 10, 1, 9, 1.0, 2e9, 2048),
        Row("bigbird", "text", 3.5, 10, 1, 9, 7.4, 2e9, None),
        Row("mha", "recall", 0.99, 10, 1, 9, 1.0, 2e9, 2048),
        Row("mha", "text", 3.25, 12_345, 1, 9, 8.0, 4e9, 4096),
    ]
    lines = table(rows).splitlines()[2:]
    assert lines[0] == "| mha | 12,345 | 99.0% | 3.250 | 8 | 4.0 | 4.0 |"
    assert lines[1].startswith("| gla | 10 | 25.0% | – |")
    assert lines[2] == "| bigbird | 10 | – | 3.500 | 7 | 2.0 | – |"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quality.PLANS, "small", TINY)
    words = ["--plan", "small", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--mechanisms", "mha", "--tasks", "recall"]) == 0
    said = capsys.readouterr()
    assert "| mha |" in said.out
    assert "mha recall step 5 loss" in said.err
    assert main([*words, "--mechanisms", "nonsense"]) == 2
    assert "mechanisms: got 'nonsense'" in capsys.readouterr().err


def test_bad_plans() -> None:
    with pytest.raises(ValueError, match="tokens: got 32; wants at least one sequence of 33"):
        Plan(TINY.stages, 1, tokens=32, length=8)
    with pytest.raises(ValueError, match="stages"):
        Plan((), 1)
