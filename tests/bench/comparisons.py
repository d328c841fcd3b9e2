"""A comparison made of round numbers, for tests that draw or print one without measuring anything."""

from __future__ import annotations

import torch

from tilewise.bench.calibrate import MachineRates
from tilewise.bench.comparison import Comparison, Row, Settings
from tilewise.bench.inputs import Text
from tilewise.bench.timer import Timing
from tilewise.ops.dispatch import Plan
from tilewise.spec import AttentionSpec

LENGTHS = (512, 1024, 2048, 4096)
SPEEDS = {"six-steps": 0.4, "flash-v1": 0.1, "standard": 1.0, "sdpa": 4.0, "tiled": 4.1, "auto": 4.1}


def sample(*, error: float = 3e-7, text_name: str = "sample", peaks: bool = True) -> Comparison:
    """`auto` on `tiled` is 4.1 times as fast as `standard`; every error is `error` of a budget of 1e-6."""
    rows: list[Row] = []
    timings: dict[tuple[str, int], Timing] = {}
    plans: dict[int, Plan] = {}
    for n in LENGTHS:
        base_ms = (n / 4096) ** 2 * 1000.0
        spec = AttentionSpec(1, 8, 8, n, n, 64, 64)
        rejected = {"sdpa": "tiled calls the same kernel", "triton": "no GPU here"}
        plans[n] = Plan("attention", "tiled", None, "the fastest on cpu", rejected, spec)
        for method, speed in SPEEDS.items():
            if method == "flash-v1" and n > 1024:
                continue
            ms = base_ms / speed
            quadratic = method in ("six-steps", "standard")
            peak = 8 * n * n * 8 if quadratic else 8 * n * 64 * 4
            backend = {"six-steps": "reference", "flash-v1": "reference", "auto": "tiled"}.get(method, method)
            rate = 4 * 8 * n * n * 64 / ms / 1e9
            measured = error <= 1e-6
            rows.append(
                Row(
                    method,
                    backend,
                    n,
                    error,
                    1e-6,
                    ms=ms if measured else None,
                    peak_bytes=peak if peaks else None,
                    tflops=rate if measured else None,
                    roofline=rate / 0.2 if measured else None,
                    speedup=speed if measured else None,
                )
            )
            timings[method, n] = Timing(ms, ms * 0.95, ms * 1.2, 5)
    text = Text(text_name, b"x" * 2048)
    settings = Settings(text, LENGTHS, 8, 64, torch.float32, torch.device("cpu"))
    facts: dict[str, object] = {
        "machine": "2-core CPU (AVX-512)",
        "processor": "A processor",
        "batch": 1,
        "heads": 8,
        "head_dim": 64,
        "dtype": "float32",
        "causal": False,
        "text": text_name,
        "text_bytes": 2048,
        "matmul_tflops": 0.2,
        "copy_gb_per_s": 20.0,
    }
    left_out = {"flash-v1": "FlashAttention-1: run up to N=1024", "triton": "no GPU here"}
    return Comparison(settings, facts, MachineRates(0.2e12, 20e9), tuple(rows), timings, plans, left_out)
