from __future__ import annotations

import torch

from tilewise.bench.calibrate import MachineRates, machine_rates


def test_attainable_is_the_lower_roof() -> None:
    rates = MachineRates(matmul=100.0, copy=10.0)
    assert rates.attainable(flops=1000, moved=1) == 100
    assert rates.attainable(flops=10, moved=20) == 5
    assert rates.attainable(flops=10, moved=1) == 100


def test_rates_are_those_of_a_computer() -> None:
    rates = machine_rates(torch.device("cpu"), torch.float32)
    assert 1e9 < rates.matmul < 1e14
    assert 1e8 < rates.copy < 1e13


def test_the_better_of_two_measurements_counts() -> None:
    assert MachineRates(3.0, 1.0).or_better(MachineRates(2.0, 5.0)) == MachineRates(3.0, 5.0)
