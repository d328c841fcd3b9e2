"""The kernel ladder: attention from six separate kernels to the best one here, each rung with what it adds.

A rung runs where it can; the others keep the sentence on why they cannot. Every rung is checked against float64 before
it is timed, all in turns, in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import tilewise
from tilewise.bench.exactness import exact_and_budget, largest_error
from tilewise.bench.inputs import Inputs
from tilewise.bench.timer import interleaved
from tilewise.errors import UnsupportedError
from tilewise.reference.flash import flash_v1, flash_v2
from tilewise.reference.standard import six_step_attention

LONGEST_LOOP = 1024
"""Rungs that loop over tiles in Python are not run beyond this length."""


@dataclass(frozen=True)
class Rung:
    """One step up; `run(q, k, v)` takes and returns [B, H, N, D]."""

    name: str
    adds: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """A rung as it was found here. Without a time, `why` says why."""

    name: str
    adds: str
    error: float | None = None
    budget: float | None = None
    milliseconds: float | None = None
    why: str = ""


def rungs(device: torch.device) -> list[Rung]:
    """All rungs that exist for a kind of device, lowest first."""
    found = [
        Rung("six steps", "six kernels, each through memory", lambda q, k, v: six_step_attention(q, k, v)[0].out),
        Rung("v1 loops", "tiles, K/V outside; a Python loop", lambda q, k, v: flash_v1(q, k, v)[0].out),
        Rung("v2 loops", "tiles, Q outside; a Python loop", lambda q, k, v: flash_v2(q, k, v)[0].out),
    ]
    if device.type == "cuda":
        found += _kernel_rungs()
    named = {
        "standard": "library matrix products, scores in memory",
        "tiled": "a fused kernel on a CPU; tiles in PyTorch on a GPU",
        "sdpa": "PyTorch's own fused kernel",
        "triton": "one kernel: tensor cores, pipelined, swizzled",
        "hopper": "asynchronous copies and products, specialised warps",
    }
    return found + [Rung(name, adds, partial(_backend, name)) for name, adds in named.items()]


def _backend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = tilewise.attention(q, k, v, backend=name)
    assert isinstance(out, Tensor)
    return out


def _kernel_rungs() -> list[Rung]:
    """The Triton kernels that exist for the ladder alone."""
    from tilewise.backends.triton.six_kernels import six_kernels
    from tilewise.backends.triton.v1_order import v1_order

    return [
        Rung("six kernels", "the six steps as kernels of our own", six_kernels),
        Rung("v1 order", "one kernel, K/V tiles outside: O, m, l rewritten at every step", v1_order),
    ]


@torch.no_grad()
def climb(inputs: Inputs, *, seconds: float = 1.0) -> list[Step]:
    """Every rung on the same q, k, v [1, H, N, D]: error first, then time where the error is within its budget."""
    device = inputs.q.device
    exact, budget = exact_and_budget(inputs, causal=False)
    steps: list[Step] = []
    calls: dict[str, Callable[[], object]] = {}
    for rung in rungs(device):
        if rung.name.endswith("loops") and inputs.q.shape[2] > LONGEST_LOOP:
            steps.append(Step(rung.name, rung.adds, why=f"a loop in Python: run up to N = {LONGEST_LOOP}"))
            continue
        try:
            error = largest_error(rung.run(*inputs), exact)
        except UnsupportedError as refusal:
            steps.append(Step(rung.name, rung.adds, why=str(refusal)))
            continue
        within = error <= budget
        steps.append(Step(rung.name, rung.adds, error, budget, why="" if within else "exceeds its error budget"))
        if within:
            calls[rung.name] = partial(rung.run, *inputs)
    timings = interleaved(calls, device, seconds=seconds)
    return [
        Step(s.name, s.adds, s.error, s.budget, timings[s.name].median, s.why) if s.name in timings else s
        for s in steps
    ]
