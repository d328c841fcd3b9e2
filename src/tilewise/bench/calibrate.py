"""What this machine attains at best, measured in a fraction of a second: the two ceilings of its roofline."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewise.bench.environment import machine
from tilewise.bench.timer import once
from tilewise.cost.hardware import Device, measured

_RUNS = 3


@dataclass(frozen=True)
class MachineRates:
    """`matmul` in FLOP/s for one dtype, `copy` in bytes/s, read and write counted."""

    matmul: float
    copy: float

    def or_better(self, other: MachineRates) -> MachineRates:
        """The higher of each: a busy moment lowers what is measured, nothing raises it."""
        return MachineRates(max(self.matmul, other.matmul), max(self.copy, other.copy))


def as_device(rates: MachineRates, device: torch.device, dtype: str) -> Device:
    """This machine for the cost model's roofline, with the rates that were measured for `dtype`."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        arch, memory = f"sm_{card.major}{card.minor}", card.total_memory
    else:
        arch, memory = device.type, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    how = f"matrix products and copies under PyTorch {torch.__version__}"
    return measured(
        machine(device), arch=arch, matmul={dtype: rates.matmul}, bandwidth=rates.copy, memory=memory, how=how
    )


def machine_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """The best of a few square matrix products in `dtype` and of a few large copies."""
    large = device.type == "cuda"
    n = 8192 if large else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty(n, n, device=device, dtype=dtype)
    matmul = _least(lambda: torch.mm(a, b, out=product), device)
    source = torch.zeros((2**30 if large else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    copy = _least(lambda: target.copy_(source), device)
    return MachineRates(2 * n**3 / matmul, 2 * source.nbytes / copy)


def _least(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, after one that is not counted."""
    call()
    return min(once(call, device) for _ in range(_RUNS)) / 1e3
