"""`tilewise step`: the same weights by four attentions; what does not fit or computes something else is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tilewise.cli import BAD_USAGE, FAILED, OK, run
from tilewise.cli import step as module

TINY = ["step", "--length", "33,64", "--batch", "2", "--steps", "2", "--rounds", "2", "--device", "cpu"]


def test_all_take_the_same_step(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert run([*TINY, "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["transformers"]
    rows = found["rows"]
    assert [(row["length"], row["who"]) for row in rows] == [(n, who) for n in (33, 64) for who in module.CONTENDERS]
    for row in rows:
        assert 0 < row["least"] <= row["milliseconds"] <= row["most"]
        assert row["peak_bytes"] is None
    for n in (33, 64):
        losses = [row["loss"] for row in rows if row["length"] == n]
        assert max(losses) - min(losses) < 2e-2
        assert losses[0] == pytest.approx(torch.tensor(503.0).log().item(), rel=0.2)


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios are to sdpa; what runs out of memory has none, and is not tried again."""
    pytest.importorskip("transformers")
    tried: list[str] = []
    turns = {"ours": ([1.0, 2.0, 9.0], 3 << 30, 5.0), "sdpa": ([4.0, 4.0, 4.0], 4 << 30, 5.01)}

    def turn(make: Any, ids: Any, steps: int) -> Any:
        name = module.CONTENDERS[len(tried) % 4] if len(tried) < 4 else ("ours", "sdpa")[len(tried) % 2]
        tried.append(name)
        if name not in turns:
            raise torch.OutOfMemoryError("full")
        return turns[name]

    monkeypatch.setattr(module, "_turn", turn)
    assert run([*TINY[:2], "33", *TINY[3:]]) == OK
    ours, hf, sdpa, eager = (line for line in capsys.readouterr().out.splitlines() if "33 " in line)
    assert "2.00\N{NO-BREAK SPACE}ms" in ours
    assert "0.50" in ours
    assert "0.75" in ours
    assert "1.00" in sdpa
    assert all("does not fit" in line for line in (hf, eager))
    assert len(tried) == 6
    tried.clear()
    turns["ours"] = ([1.0], 1, 6.0)
    assert run([*TINY[:2], "33", *TINY[3:]]) == FAILED
    assert "the first loss is 6.0" in capsys.readouterr().err


def test_ours_alone_and_recomputing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Transformers too."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run([*TINY, "--with", "sdpa"]) == BAD_USAGE
    assert "Fix: pip install 'tilewise[hf]', or --with ours" in capsys.readouterr().err
    assert run(["step", "--length", "1,64", "--with", "ours"]) == BAD_USAGE
    assert "one token has none to predict" in capsys.readouterr().err
    losses = []
    for saving in ("none", "block"):
        makers = module._makers(33, module.SIZES["tiny"], ("ours",), saving)
        losses.append(module._turn(makers["ours"], torch.arange(66).reshape(2, 33), 1)[2])
    assert losses[0] == losses[1]
