"""tilewise beside its peers, case by case: correctness first, then interleaved rounds, then peak memory.

Forward means what a training step calls: gradients are wanted, so what the backward needs is kept. Backward is
`torch.autograd.grad` alone, on the graph of a forward that is not timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.bench.calibrate import MachineRates, machine_rates
from tilewise.bench.environment import environment
from tilewise.bench.judge import Finding, Judge
from tilewise.bench.memory import cuda_peak
from tilewise.bench.peers import by_name, compiler_settings, refusal
from tilewise.bench.precompile import compile_ahead
from tilewise.bench.results import Cell, PeerResult, Results
from tilewise.bench.suites import Case
from tilewise.bench.timer import SETTLE, Timing, in_rounds
from tilewise.bench.workload import Call, Workload
from tilewise.errors import bad_value
from tilewise.ops.dispatch import check_name

Progress = Callable[[str, float], object]
"""Told what begins now, and what share of the whole run lies behind."""


@dataclass(frozen=True)
class Settings:
    """What to measure. `backends` are tilewise's, `peers` names of `peers.by_name`."""

    cases: tuple[Case, ...]
    device: torch.device
    passes: tuple[str, ...] = ("forward", "backward")
    backends: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = ()
    rounds: int = 5
    fill: float = 20.0
    """Milliseconds that one contender runs in one round."""
    ahead: bool = False
    """Compile in parallel processes first; for a GPU, and for scripts that guard `__main__`."""

    def as_dict(self) -> dict[str, object]:
        """What has to be equal for two runs to be continued as one."""
        turn = {"rounds": self.rounds, "fill": self.fill, "settle": SETTLE}
        return {"device": str(self.device), "peers": list(self.peers)} | turn


def peers_for(device: torch.device) -> tuple[str, ...]:
    """The names of all peers that such a device has."""
    return tuple(name for name, peer in by_name().items() if device.type in peer.devices)


def begin(settings: Settings) -> Results:
    """Results without cells.

    Raises:
        ValueError: a backend or a peer that does not exist, or a peer that such a device does not have.
    """
    for backend in settings.backends:
        check_name(backend)
    there = peers_for(settings.device)
    for peer in settings.peers:
        if peer not in there:
            raise bad_value("peers", repr(peer), f"some of {', '.join(there)} on {settings.device.type}")
    return Results(dict(environment(settings.device)), settings.as_dict(), {})


def run(
    settings: Settings,
    so_far: Results,
    progress: Progress = lambda label, share: None,
    save: Callable[[Results], object] = lambda results: None,
) -> Results:
    """Measures the cells of `settings` that `so_far` lacks; `save` gets the results after every case.

    Interrupting it loses the case in work and nothing else.
    """
    have = so_far.by_key()
    wanted = {(c.name, which, b): c for c in settings.cases for which in settings.passes for b in settings.backends}
    missing = list(dict.fromkeys(case for key, case in wanted.items() if key not in have))
    if missing and settings.ahead:
        compile_ahead(
            missing,
            settings.backends,
            settings.peers,
            device=settings.device,
            backward="backward" in settings.passes,
            after_each=lambda done, planned: progress(f"compiling {done}/{planned}", 0.2 * done / planned),
        )
    before = 0.2 if settings.ahead else 0.0
    results = _with_ceilings(so_far, settings) if missing else so_far
    for index, case in enumerate(missing):

        def told(step: str, part: float, at: int = index, name: str = case.name) -> None:
            progress(f"{name}: {step}", before + (1 - before) * (at + part) / len(missing))

        with compiler_settings():
            results = results.with_cells(_Measurement(case, settings, told).cells()).with_shares()
        save(results)
    if missing:
        results = _with_ceilings(results, settings)
    results = replace(results, complete=all(key in results.by_key() for key in wanted))
    save(results)
    return results


def _with_ceilings(results: Results, settings: Settings) -> Results:
    """The better of what was attained before and what is now, in the dtype of the first case."""
    dtype = getattr(torch, settings.cases[0].dtype)
    now = machine_rates(settings.device, dtype)
    if results.ceilings:
        earlier = results.ceilings
        now = now.or_better(MachineRates(earlier["matmul_tflops"] * 1e12, earlier["copy_gb_per_s"] * 1e9))
    ceilings = {"matmul_tflops": now.matmul / 1e12, "copy_gb_per_s": now.copy / 1e9}
    return replace(results, ceilings=ceilings).with_shares()


class _Contender:
    """One backend or peer on the case at hand: prepared, run once and judged when it is made.

    Whatever it raises meanwhile is the reason why it does not take part, in `absent` by pass.
    """

    def __init__(self, prepare: Callable[[], Call], work: Workload, judge: Judge, passes: Sequence[str]) -> None:
        self._work = work
        self.absent: dict[str, str] = {}
        self.findings: dict[str, Finding] = {}
        failing = tuple(passes)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                self._forward = prepare()
                self._out = self._forward()
                self.findings["forward"] = judge.out(self._out.detach())
                failing = ("backward",)
                if "backward" in passes:
                    self.findings["backward"] = judge.gradients(*self._backward())
            except Exception as problem:  # noqa: BLE001 - whoever refuses may do so in any way; the reason is reported
                self.absent = dict.fromkeys(failing, refusal(problem, told))

    def able(self, which: str) -> bool:
        return which not in self.absent and self.findings[which].passed

    def call(self, which: str) -> Callable[[], object]:
        """What is timed."""
        return self._forward if which == "forward" else self._backward

    def peak(self, which: str) -> int | None:
        """Bytes beyond the inputs, on a GPU: of the forward, or of forward and backward together."""
        if self._work.device.type != "cuda":
            return None
        return cuda_peak(self._forward if which == "forward" else self._both, self._work.device)

    def _backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._out, self._work.leaves, self._work.dout, retain_graph=True)

    def _both(self) -> None:
        torch.autograd.grad(self._forward(), self._work.leaves, self._work.dout)


class _Measured(NamedTuple):
    """One contender in one pass: why it is absent, or its check, and its time if that was passed."""

    absent: str | None
    finding: Finding | None
    timing: Timing | None
    tflops: float | None
    peak: int | None

    @property
    def spread(self) -> tuple[float, float] | None:
        return (self.timing.least, self.timing.most) if self.timing else None


class _Measurement:
    """One case: its workload, its judge, and everyone who takes part."""

    def __init__(self, case: Case, settings: Settings, told: Callable[[str, float], object]) -> None:
        self._case, self._settings, self._told = case, settings, told
        self._work = Workload.of(case, settings.device)

    def cells(self) -> list[Cell]:
        settings, work = self._settings, self._work
        self._told("float64 reference", 0.0)
        judge = Judge(work, backward="backward" in settings.passes)
        prepares = {("ours", name): partial(work.ours, name) for name in settings.backends}
        prepares |= {("peer", name): partial(by_name()[name].prepare, work) for name in settings.peers}
        entered: dict[tuple[str, str], _Contender] = {}
        for index, (key, prepare) in enumerate(prepares.items()):
            self._told(f"checking {key[1]}", 0.1 + 0.3 * index / len(prepares))
            entered[key] = _Contender(prepare, work, judge, settings.passes)
        del judge
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        return [cell for which in settings.passes for cell in self._cells_of(which, entered)]

    def _cells_of(self, which: str, entered: dict[tuple[str, str], _Contender]) -> list[Cell]:
        measured = self._measured(which, entered)
        peers = {name: _peer_result(one) for (kind, name), one in measured.items() if kind == "peer"}
        times = {name: peer.ms for name, peer in peers.items() if peer.ms is not None}
        best = min(times, key=times.__getitem__) if times else None
        intensity = self._case.flops(which) / self._case.least_bytes(which)
        cells: list[Cell] = []
        for backend in self._settings.backends:
            one = measured["ours", backend]
            cells.append(
                Cell(
                    self._case.name,
                    which,
                    backend,
                    self._case.as_dict(),
                    ran_on=None if one.absent else self._work.plan(backend).backend,
                    absent=one.absent,
                    ms=one.timing.median if one.timing else None,
                    spread=one.spread,
                    tflops=one.tflops,
                    ratio=times[best] / one.timing.median if one.timing and best else None,
                    best_peer=best,
                    intensity=intensity,
                    error=one.finding.error if one.finding else None,
                    budget=one.finding.budget if one.finding else None,
                    where=one.finding.where if one.finding else None,
                    peak_bytes=one.peak,
                    peers=peers,
                )
            )
        return cells

    def _measured(self, which: str, entered: dict[tuple[str, str], _Contender]) -> dict[tuple[str, str], _Measured]:
        """Times first, all in turns, then memory."""
        part = 0.6 / len(self._settings.passes)
        start = 0.4 + part * self._settings.passes.index(which)
        timings = in_rounds(
            {key: one.call(which) for key, one in entered.items() if one.able(which)},
            self._settings.device,
            rounds=self._settings.rounds,
            fill=self._settings.fill,
            after_each=lambda done, planned: self._told(f"timing {which}", start + part * done / planned),
        )
        flops = self._case.flops(which)
        measured: dict[tuple[str, str], _Measured] = {}
        for key, one in entered.items():
            timing = timings.get(key)
            rate, peak = (flops / timing.median / 1e9, one.peak(which)) if timing else (None, None)
            measured[key] = _Measured(one.absent.get(which), one.findings.get(which), timing, rate, peak)
        return measured


def _peer_result(one: _Measured) -> PeerResult:
    finding, timing = one.finding, one.timing
    if one.absent or finding is None:
        return PeerResult(absent=one.absent)
    if timing is None:
        return PeerResult(absent=f"wrong: {finding.where}, error {finding.error:.1e} of {finding.budget:.1e} allowed")
    return PeerResult(None, timing.median, one.spread, one.tflops, finding.error, finding.budget, one.peak)
