"""Benchmark results made of round numbers, for tests that draw, store or compare some without measuring anything."""

from __future__ import annotations

from dataclasses import replace

from tilewise.bench.results import Cell, PeerResult, Results
from tilewise.bench.suites import PASSES, SUITES, Case

CASES = [case for case in SUITES["dense"].cases("bfloat16", head_dims=(64, 128)) if case.length >= 4096]
SPEEDS = {"flash": 0.5, "cudnn": 1.0, "math": 0.05}
"""Of the peers, over a rate of 600 TFLOP/s."""


def timed_cell(case: Case, which: str, *, backend: str = "auto", speed: float = 1.2, scatter: float = 0.01) -> Cell:
    """`backend` at `speed` · 600 TFLOP/s; every time scatters by ± `scatter`."""

    def took(rate: float) -> tuple[float, tuple[float, float]]:
        ms = case.flops(which) / (600e12 * rate) * 1e3
        return ms, (ms * (1 - scatter), ms * (1 + scatter))

    peers = {name: PeerResult(None, *took(rate), 600 * rate, 1e-3, 2e-3, 2**26) for name, rate in SPEEDS.items()} | {
        "flex": PeerResult(absent="not today")
    }
    ms, spread = took(speed)
    return Cell(
        case.name,
        which,
        backend,
        case.as_dict(),
        ran_on="triton",
        ms=ms,
        spread=spread,
        tflops=600 * speed,
        ratio=speed,
        best_peer="cudnn",
        intensity=case.flops(which) / case.least_bytes(which),
        error=1e-3,
        budget=2e-3,
        where="out, rows 0 to 127",
        peak_bytes=2**26,
        peers=peers,
    )


def wrong(cell: Cell) -> Cell:
    """The same cell with an error of twice its budget, and so no time."""
    return replace(cell, ms=None, spread=None, tflops=None, ratio=None, peak_bytes=None, error=4e-3)


def sample(*cells: Cell) -> Results:
    """A finished run of `cells`, or of every case and pass."""
    every = cells or tuple(timed_cell(case, which) for case in CASES for which in PASSES)
    environment = {"machine": "A GPU", "torch": "2.11.0", "date": "2026-11-21"}
    settings = {"device": "cuda", "peers": [*SPEEDS, "flex"], "rounds": 5, "fill": 20.0}
    ceilings = {"matmul_tflops": 800.0, "copy_gb_per_s": 4000.0}
    return Results(environment, settings, ceilings, every, complete=True).with_shares()
