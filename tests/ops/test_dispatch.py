"""`explain` says what `attention` does, and one true sentence on everything it does not do."""

from __future__ import annotations

import json

import pytest
import torch

import tilewise
from tilewise.backends.base import BACKEND_NAMES
from tilewise.errors import UnsupportedError
from tilewise.ops.dispatch import choose
from tilewise.spec import AttentionSpec

Q = torch.randn(1, 4, 96, 16)


def test_every_backend_is_accounted_for() -> None:
    plan = tilewise.explain(Q, Q, Q, causal=True)
    assert plan.backend == "tiled"
    assert {plan.backend, *plan.rejected} == set(BACKEND_NAMES)
    for sentence in plan.rejected.values():
        assert sentence
        assert "\n" not in sentence
    assert "tiled" in str(plan)
    assert "causal" in str(plan)
    assert json.loads(json.dumps(plan.as_dict()))["backend"] == "tiled"


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_sentences_are_true(name: str) -> None:
    """What explain calls unable raises when asked for by name; what it calls able runs and agrees."""
    for options in ({}, {"causal": True}, {"softcap": 2.0}, {"window": (9, 9)}, {"dropout": 0.5}):
        sentence = tilewise.explain(Q, Q, Q, **options).rejected.get(name)
        torch.manual_seed(0)
        expected = tilewise.attention(Q, Q, Q, **options)
        torch.manual_seed(0)
        if sentence is None or sentence.startswith("can serve this"):
            torch.testing.assert_close(tilewise.attention(Q, Q, Q, **options, backend=name), expected)
        else:
            with pytest.raises(UnsupportedError):
                tilewise.attention(Q, Q, Q, **options, backend=name)


def test_a_plan_that_a_caller_writes_to_is_the_callers_own() -> None:
    tilewise.explain(Q, Q, Q).rejected.clear()
    assert tilewise.explain(Q, Q, Q).rejected


def test_restrictions_that_forbid_nothing_are_no_obstacle() -> None:
    one = Q[:, :, :1]
    assert tilewise.explain(one, Q, Q, causal=True).config.engine == "whole"
    assert tilewise.explain(Q, Q, Q, window=(95, 95)).config.engine == "whole"
    assert tilewise.explain(Q, Q, Q, window=(94, 95)).config.engine == "dense"
    torch.testing.assert_close(tilewise.attention(one, Q, Q, causal=True), tilewise.attention(one, Q, Q))


def test_plan_is_cached_by_value() -> None:
    a, b = (AttentionSpec(1, 4, 2, 10, 20, 8, 8, causal=True) for _ in range(2))
    assert choose(a) is choose(b)


def test_spec_survives_a_round_trip() -> None:
    plan = tilewise.explain(Q, Q, Q, window=(3, None), bias=torch.zeros(96, 96))
    loaded = json.loads(json.dumps(plan.spec.as_dict()))
    loaded["window"], loaded["bias"] = tuple(loaded["window"]), tuple(loaded["bias"])
    assert AttentionSpec(**loaded) == plan.spec
