"""Every method against the float64 reference on the same Q, K, V: error, then time, then memory.

A method whose error exceeds its budget gets no time: a speed is reported only for what was right in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tilewise.bench import memory
from tilewise.bench.calibrate import MachineRates, as_device, machine_rates
from tilewise.bench.cases import BASELINE, Method, all_methods
from tilewise.bench.environment import environment
from tilewise.bench.exactness import exact_and_budget, largest_error, reference_bytes
from tilewise.bench.inputs import Inputs, Text, attention_inputs
from tilewise.bench.timer import Timing, interleaved
from tilewise.cost.counts import conventional_scores, forward_flops, ideal_traffic, itemsize
from tilewise.cost.hardware import Device
from tilewise.cost.peak import peak_bytes
from tilewise.cost.roofline import Step, place
from tilewise.errors import UnsupportedError, bad_value
from tilewise.ops.dense import explain
from tilewise.ops.dispatch import Plan
from tilewise.spec import AttentionSpec

Progress = Callable[[str, float], object]
"""Told what begins now, and what share of the whole run lies behind."""


@dataclass(frozen=True)
class Settings:
    """What to compare: batch 1, self-attention over the first `length` bytes of `text`, for each length."""

    text: Text
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    causal: bool = False
    seconds: float = 2.0
    """What the timed runs of one method at one length may take, unless its first three take longer."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Row:
    """One method at one length. What was not measured is None: there is no time without a passed check."""

    method: str
    backend: str
    n: int
    error: float
    """Largest absolute error of the output against float64."""
    budget: float
    ms: float | None = None
    """Median of the interleaved runs."""
    peak_bytes: int | None = None
    """Peak memory beyond the inputs."""
    tflops: float | None = None
    """By the usual convention: 4·H·N²·D operations, half that when causal, whatever the method really does."""
    roofline: float | None = None
    """Share of what this machine attains at the problem's own arithmetic intensity."""
    speedup: float | None = None
    """Over `standard` at the same length."""

    @property
    def within(self) -> bool:
        return self.error <= self.budget


@dataclass(frozen=True)
class Comparison:
    """Rows ordered by length, then method; the timings behind them; a plan a length; what is missing, and why."""

    settings: Settings
    environment: dict[str, object]
    rates: MachineRates
    rows: tuple[Row, ...]
    timings: dict[tuple[str, int], Timing]
    plans: dict[int, Plan[AttentionSpec]]
    left_out: dict[str, str]

    @property
    def passed(self) -> bool:
        return all(row.within for row in self.rows)

    def as_dict(self) -> dict[str, object]:
        """The JSON form: `environment` and `rows`."""
        return {"environment": self.environment, "rows": [asdict(row) for row in self.rows]}


def compare(settings: Settings, progress: Progress = lambda label, share: None) -> Comparison:
    """Runs the comparison, on CUDA or CPU.

    Raises:
        ValueError: the memory that is free does not hold the float64 reference at the longest length.
        RuntimeError: a method failed while its memory was measured.
    """
    longest = max(settings.lengths)
    lacking = memory.shortage(reference_bytes(longest), settings.device)
    if lacking is not None:
        fix = f"choose shorter ones: the float64 reference of this one {lacking}"
        raise bad_value("lengths", longest, "a length whose scores fit in memory", fix)
    told = _Shares(settings.lengths, progress)
    told.begin("measuring what this machine attains")
    rates = machine_rates(settings.device, settings.dtype)
    rows: list[Row] = []
    timings: dict[tuple[str, int], Timing] = {}
    plans: dict[int, Plan[AttentionSpec]] = {}
    left_out: dict[str, str] = {}
    for length in settings.lengths:
        inputs = _inputs(settings, length)
        methods, plans[length] = _usable(inputs, settings, left_out)
        checked = _check(methods, inputs, settings, told)
        timing = partial(_tell_timing, told, length)
        timing(0, 1)
        calls = {row.method: _call(methods[row.method], inputs, settings.causal) for row in checked if row.within}
        with torch.inference_mode():
            measured = interleaved(calls, settings.device, seconds=settings.seconds, after_each=timing)
        timings |= {(name, length): timing for name, timing in measured.items()}
        rows += checked
        rates = rates.or_better(machine_rates(settings.device, settings.dtype))
    roof = as_device(rates, settings.device, settings.dtype_name)
    rows = [_timed(row, timings, roof, plans[row.n].spec) for row in rows]
    with _peaks(settings) as peak_of:
        for index, row in enumerate(rows):
            told.begin_memory(row.n, row.method)
            rows[index] = replace(row, peak_bytes=peak_of(row))
    facts = environment(settings.device) | _facts(settings, rates)
    return Comparison(settings, facts, rates, tuple(rows), timings, plans, left_out)


class _Shares:
    """Turns "this length, this far" into a share of the whole run; work grows with the square of the length."""

    def __init__(self, lengths: tuple[int, ...], progress: Progress) -> None:
        whole = sum(n * n for n in lengths)
        self._before = {n: sum(m * m for m in lengths[: lengths.index(n)]) / whole for n in lengths}
        self._of = {n: n * n / whole for n in lengths}
        self._progress = progress

    def begin(self, label: str, length: int | None = None, part: float = 0.0) -> None:
        share = 0.0 if length is None else 0.85 * (self._before[length] + part * self._of[length])
        self._progress(label, share)

    def begin_memory(self, length: int, method: str) -> None:
        self._progress(f"N={length}: memory of {method}", 0.85 + 0.15 * self._before[length])


def _tell_timing(told: _Shares, length: int, done: int, planned: int) -> None:
    told.begin(f"N={length}: timing", length, 0.4 + 0.6 * done / planned)


def _inputs(settings: Settings, length: int) -> Inputs:
    return attention_inputs(
        settings.text,
        length=length,
        heads=settings.heads,
        head_dim=settings.head_dim,
        dtype=settings.dtype,
        device=settings.device,
    )


def _usable(
    inputs: Inputs, settings: Settings, left_out: dict[str, str]
) -> tuple[dict[str, Method], Plan[AttentionSpec]]:
    """The methods that can run at this length, and the plan of `auto`; the others go to `left_out` with the reason."""
    length = inputs.q.shape[2]
    auto = explain(*inputs, causal=settings.causal)
    methods: dict[str, Method] = {}
    for method in all_methods():
        if method.longest is not None and length > method.longest:
            left_out[method.name] = f"{method.note}: run up to N = {method.longest:,}"
            continue
        if method.backend == "auto":
            methods[method.name] = replace(method, backend=auto.backend)
            continue
        if method.backend != "reference":
            try:
                explain(*inputs, causal=settings.causal, backend=method.backend)
            except UnsupportedError:
                left_out[method.name] = auto.rejected[method.name]
                continue
        lacking = memory.shortage(_need(method, auto.spec), settings.device)
        if lacking is not None:
            left_out[method.name] = f"at N = {length:,} it {lacking}"
            continue
        methods[method.name] = method
    return methods, auto


def _need(method: Method, spec: AttentionSpec) -> float:
    """Bytes beyond the inputs; the six steps hold several matrices of scores at once, in float32 at least."""
    if method.backend == "reference":
        return 4 * spec.batch * spec.heads * spec.q_len * spec.k_len * max(4, itemsize(spec.dtype))
    return peak_bytes(spec, method.backend)


def _call(method: Method, inputs: Inputs, causal: bool) -> Callable[[], Tensor]:
    return lambda: method.run(*inputs, causal=causal)


@torch.inference_mode()
def _check(methods: dict[str, Method], inputs: Inputs, settings: Settings, told: _Shares) -> list[Row]:
    """Each method's error beside the budget of this length; the first run of each, so timing needs no warm-up."""
    length = inputs.q.shape[2]
    told.begin(f"N={length}: float64 reference", length)
    exact, budget = exact_and_budget(inputs, settings.causal)
    rows: list[Row] = []
    for index, (name, method) in enumerate(methods.items()):
        told.begin(f"N={length}: checking {name}", length, 0.2 + 0.2 * index / len(methods))
        error = largest_error(_call(method, inputs, settings.causal)(), exact)
        rows.append(Row(name, method.backend, length, error, budget))
    return rows


def _timed(row: Row, timings: dict[tuple[str, int], Timing], roof: Device, spec: AttentionSpec) -> Row:
    timing, baseline = timings.get((row.method, row.n)), timings.get((BASELINE, row.n))
    if timing is None:
        return row
    seconds = timing.median / 1e3
    work = Step("attention", forward_flops(spec, conventional_scores(spec)).matmul, ideal_traffic(spec).bytes)
    return replace(
        row,
        ms=timing.median,
        tflops=work.flops / seconds / 1e12,
        roofline=place(work, roof, spec.dtype).reached(seconds),
        speedup=baseline.median / timing.median if baseline else None,
    )


@contextmanager
def _peaks(settings: Settings) -> Iterator[Callable[[Row], int | None]]:
    """A function that measures the peak memory of a row's method, or gives None where that cannot be had."""
    if not memory.measurable(settings.device):
        yield lambda row: None
    elif settings.device.type == "cuda":
        methods = {method.name: method for method in all_methods()}

        def on_device(row: Row) -> int:
            with torch.inference_mode():
                call = _call(methods[row.method], _inputs(settings, row.n), settings.causal)
                return memory.cuda_peak(call, settings.device)

        yield on_device
    else:
        with memory.cpu_peaks() as peak_of:
            sizes = (settings.heads, settings.head_dim, settings.dtype_name, settings.causal)
            yield lambda row: peak_of(memory.MemoryCase(row.method, row.n, *sizes))


def _facts(settings: Settings, rates: MachineRates) -> dict[str, object]:
    """The settings and the ceilings, to stand beside the environment."""
    return {
        "device": str(settings.device),
        "dtype": settings.dtype_name,
        "batch": 1,
        "heads": settings.heads,
        "head_dim": settings.head_dim,
        "causal": settings.causal,
        "text": settings.text.name,
        "text_bytes": len(settings.text.data),
        "matmul_tflops": rates.matmul / 1e12,
        "copy_gb_per_s": rates.copy / 1e9,
    }
