from __future__ import annotations

import json

import pytest
import torch

import tilewise
from tilewise.backends.base import BACKEND_NAMES
from tilewise.cli import BAD_USAGE, FAILED, OK, run


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(["explain", "--device", "cpu", "--json", *arguments]) == OK
    return json.loads(capsys.readouterr().out)


def test_a_sentence_for_each_backend_that_is_not_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(capsys)
    assert {plan["backend"], *plan["rejected"]} == set(BACKEND_NAMES)
    assert plan["reason"]
    assert all(len(sentence.split()) > 3 for sentence in plan["rejected"].values())


def test_it_is_the_plan_of_the_public_function(capsys: pytest.CaptureFixture[str]) -> None:
    q, kv = torch.randn(2, 6, 65, 40), torch.randn(2, 3, 113, 40)
    v = torch.randn(2, 3, 113, 24)
    wanted = tilewise.explain(q, kv, v, causal=True, window=(16, None), softcap=20.0, sink=torch.zeros(6))
    shape = ["--batch", "2", "--heads", "6", "--kv-heads", "3", "--seq", "65", "--keys", "113", "--head-dim", "40"]
    features = ["--v-head-dim", "24", "--causal", "--window", "16,none", "--softcap", "20", "--sink"]
    assert plan_of(capsys, *shape, *features) == json.loads(json.dumps(wanted.as_dict()))


def test_every_option_reaches_the_spec(capsys: pytest.CaptureFixture[str]) -> None:
    spec = plan_of(capsys, "--bias", "--alibi", "--dropout", "0.1", "--grad", "--deterministic", "--dtype", "float64")[
        "spec"
    ]
    assert spec["bias"] == [1, 8, 4096, 4096]
    assert spec["alibi"] is spec["needs_bias_grad"] is spec["deterministic"] is True
    assert spec["dropout"] == 0.1
    assert spec["dtype"] == "float64"


def test_huge_problems_take_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """A bias of 2^20 by 2^20 float32 would be 32 TiB."""
    assert plan_of(capsys, "--seq", str(2**20), "--bias")["spec"]["q_len"] == 2**20


def test_a_backend_that_cannot_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--device", "cpu", "--backend", "sdpa", "--softcap", "30"]) == FAILED
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "softcap" in captured.err
    assert run(["explain", "--device", "cpu", "--backend", "sdpa", "--softcap", "30", "--json"]) == FAILED
    assert json.loads(capsys.readouterr().out)["backend"] is None


def test_heads_that_do_not_divide_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--heads", "8", "--kv-heads", "3"]) == BAD_USAGE
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1


def test_the_text_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "--device", "cpu"]) == OK
    shown = capsys.readouterr().out
    for name in BACKEND_NAMES:
        assert name in shown
    assert "config: " in shown
