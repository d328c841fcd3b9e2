from __future__ import annotations

import torch

from tilewise.bench.calibrate import MachineRates, as_device, machine_rates


def test_this_machine_has_the_measured_roof() -> None:
    device = as_device(MachineRates(matmul=1e11, copy=1e10), torch.device("cpu"), "float32")
    assert device.peak("float32") == 1e11
    assert device.bandwidth == 1e10
    assert device.memory > 2**30


def test_rates_are_those_of_a_computer() -> None:
    rates = machine_rates(torch.device("cpu"), torch.float32)
    assert 1e9 < rates.matmul < 1e14
    assert 1e8 < rates.copy < 1e13


def test_the_better_of_two_measurements_counts() -> None:
    assert MachineRates(3.0, 1.0).or_better(MachineRates(2.0, 5.0)) == MachineRates(3.0, 5.0)
