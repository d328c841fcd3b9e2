from __future__ import annotations

import json
import math
from pathlib import Path

import click
import pytest
import torch

from tilewise.cli.output import OutputFile, PositiveIntegers, pick_device, print_json, progress
from tilewise.cost.tables import Grid


def test_lists_are_sorted_and_each_entry_counts_once() -> None:
    assert PositiveIntegers().convert("65, 2,65,1", None, None) == (1, 2, 65)
    assert PositiveIntegers().convert((3, 4), None, None) == (3, 4)


def test_json_says_null_for_what_json_cannot_say(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.5, math.nan, (math.inf,)], "b": "é"})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, [None]], "b": "é"}


def test_progress_is_silent_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working") as told:
        told("half", 0.5)
    assert capsys.readouterr() == ("", "")


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(click.BadParameter, match="sees no GPU"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "says"),
    [("no/such/x.html", "does not exist"), ("", "is a folder"), ("/proc/x.html", "takes no files")],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(click.BadParameter, match=says):
        OutputFile().convert(name, None, None)


def test_a_file_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    old = tmp_path / "old.html"
    old.write_text("as it was", encoding="utf-8")
    assert OutputFile().convert(str(old), None, None) == old
    assert old.read_text(encoding="utf-8") == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]
    assert OutputFile(allow_dash=True).convert("-", None, None) == Path("-")


@pytest.mark.parametrize("text", ["0", "-3,5", "7,99999999999"])
def test_lists_hold_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="at least 1 and below"):
        PositiveIntegers().convert(text, None, None)


def test_a_table_keeps_its_words_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from tilewise.cli import grids

    grid = Grid("title", ("", "a long heading", "another"), (("standard", "8,192.0 MiB", "–"), ("flash", "1 MiB", "")))
    for width in (80, 22):
        monkeypatch.setattr(grids, "console", lambda width=width: Console(width=width))
        grids.print_grid(grid)
        shown = capsys.readouterr().out
        assert "standard" in shown
        assert ("  a long heading: 1" in shown) == (width == 22)
