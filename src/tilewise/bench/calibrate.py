"""What this machine attains at best, measured in a fraction of a second: the two ceilings of its roofline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewise.bench.timer import once

_RUNS = 3


@dataclass(frozen=True)
class MachineRates:
    """`matmul` in FLOP/s for one dtype, `copy` in bytes/s, read and write counted."""

    matmul: float
    copy: float

    def attainable(self, flops: float, moved: float) -> float:
        """FLOP/s under both ceilings for work that moves `moved` bytes (Williams et al., "Roofline", 2009)."""
        return min(self.matmul, self.copy * flops / moved)

    def or_better(self, other: MachineRates) -> MachineRates:
        """The higher of each: a busy moment lowers what is measured, nothing raises it."""
        return MachineRates(max(self.matmul, other.matmul), max(self.copy, other.copy))


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
