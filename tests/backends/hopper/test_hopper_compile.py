"""Ahead-of-time compilation of the Hopper kernels, without a GPU. `compile_hopper.py` does the whole matrix."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from compile_all import check_results
from compile_hopper import RESULTS, hopper_hash
from hopper_targets import Target, chosen, compile_target, demanding_targets, every_target, faults

from tilewise.backends.hopper.configs import SELECTABLE

TARGETS = every_target()
FORWARD = {config: [t for t in TARGETS if t.way == "forward" and chosen(t) == config] for config in SELECTABLE}
BACKWARD = [target for target in TARGETS if target.way == "backward"]
SAMPLE = [*(random.Random(str(config)).choice(found) for config, found in FORWARD.items()),
          *random.Random(0).sample(BACKWARD, 3)]  # fmt: skip


def test_the_whole_matrix_was_compiled_from_these_sources() -> None:
    check_results(RESULTS, hopper_hash(), {str(target) for target in demanding_targets()})


def test_every_configuration_can_be_chosen() -> None:
    assert all(FORWARD.values())
    assert {chosen(target) for target in TARGETS if target.way == "forward"} == set(SELECTABLE)


@pytest.mark.parametrize("target", SAMPLE, ids=lambda target: f"compile-{target}")
def test_it_spills_no_more_than_is_known(target: Target, compiler: None) -> None:
    reports = compile_target(target)
    assert not faults(target, reports), str(target)
    if target.way == "forward":
        assert reports[-1].kernel == "attention_forward"
        assert reports[-1].shared >= chosen(target).shared_bytes
    else:
        main = {"attention_dkdv", "attention_dq"} if target.dims[0] > 128 else {"attention_backward", "convert_dq"}
        assert {r.kernel for r in reports} == {"row_statistics"} | main
