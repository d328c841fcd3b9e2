"""Ahead-of-time compilation of the Hopper forward, without a GPU. `compile_hopper.py` does the whole matrix."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")

from hopper_targets import ForwardTarget, chosen, compile_forward, every_target, faults

from tilewise.backends.hopper.configs import SELECTABLE, ForwardConfig
from tilewise.backends.triton import interpreting

TARGETS = every_target()


def _sample(config: ForwardConfig) -> ForwardTarget:
    """One target of a configuration, always the same."""
    return random.Random(str(config)).choice([target for target in TARGETS if chosen(target) == config])


def test_every_configuration_can_be_chosen() -> None:
    assert {chosen(target) for target in TARGETS} == set(SELECTABLE)


@pytest.mark.parametrize("config", SELECTABLE, ids=lambda config: f"compile-{config}")
def test_it_compiles_without_spilling(config: ForwardConfig) -> None:
    if interpreting():
        pytest.skip("the interpreter replaces the compiler")
    target = _sample(config)
    report = compile_forward(target)
    assert not faults(target, report), str(target)
    assert report.shared >= config.shared_bytes
