from __future__ import annotations

import json
import math

import click
import pytest
import torch

from tilewise.cli.output import PositiveIntegers, pick_device, print_json, progress


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
