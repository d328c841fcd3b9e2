"""The benchmark itself, on small cases on the CPU: who is timed, who is not, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tilewise.bench import benchmark
from tilewise.bench.benchmark import Settings, begin, peers_for, run
from tilewise.bench.calibrate import MachineRates
from tilewise.bench.peers import Peer, by_name
from tilewise.bench.results import Results
from tilewise.bench.suites import Case
from tilewise.bench.workload import Workload
from tilewise.errors import UnsupportedError

CPU = torch.device("cpu")
CASES = (Case(1, 2, 1, 65, 16, "float32"), Case(1, 2, 2, 113, 16, "float32", causal=True))


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "machine_rates", lambda device, dtype: MachineRates(1e11, 1e10))


def settings(**changes: object) -> Settings:
    return replace(Settings(CASES, CPU, peers=("sdpa", "math"), fill=0.1), **changes)


def measured(**changes: object) -> Results:
    chosen = settings(**changes)
    return run(chosen, begin(chosen))


def test_a_cell_per_case_pass_and_backend() -> None:
    results = measured(backends=("auto", "standard"))
    assert results.complete
    assert results.passed
    assert [cell.key for cell in results.cells] == [
        (case.name, which, backend)
        for case in CASES
        for which in ("forward", "backward")
        for backend in ("auto", "standard")
    ]
    for cell in results.cells:
        case = next(case for case in CASES if case.name == cell.case)
        assert cell.ran_on == ("tiled" if cell.backend == "auto" else "standard")
        assert cell.error is not None
        assert cell.budget is not None
        assert 0 < cell.error <= cell.budget
        assert cell.ms is not None
        assert cell.spread is not None
        assert cell.spread[0] <= cell.ms <= cell.spread[1]
        assert cell.tflops == pytest.approx(case.flops(cell.which) / cell.ms / 1e9)
        assert cell.best_peer is not None
        times = {name: peer.ms for name, peer in cell.peers.items()}
        assert set(times) == {"sdpa", "math"}
        assert cell.ratio == pytest.approx(times[cell.best_peer] / cell.ms)
        assert times[cell.best_peer] == min(times.values())  # type: ignore[type-var]
        intensity = case.flops(cell.which) / case.least_bytes(cell.which)
        assert cell.ceiling_share == pytest.approx(cell.tflops * 1e12 / min(1e11, 1e10 * intensity))


def test_one_pass_and_no_peers() -> None:
    results = measured(passes=("backward",), peers=())
    assert [cell.which for cell in results.cells] == ["backward"] * 2
    assert all(cell.ratio is None and cell.best_peer is None and cell.ms for cell in results.cells)


class _OffBackward(torch.autograd.Function):
    """Passes on, and makes the gradient 1 % too large."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * 1.01


def test_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Workload.ours
    monkeypatch.setattr(Workload, "ours", lambda work, name: lambda: _OffBackward.apply(right(work, name)()))
    results = measured()
    assert not results.passed
    for cell in results.cells:
        assert cell.wrong is (cell.which == "backward")
        assert (cell.ms is None) is cell.wrong
        assert cell.ratio is None or not cell.wrong


def test_a_wrong_output_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Workload.ours
    monkeypatch.setattr(Workload, "ours", lambda work, name: lambda: right(work, name)() * 1.001)
    results = measured(passes=("forward",))
    assert not results.passed
    assert all(cell.wrong and cell.ms is None and cell.peers["sdpa"].ms for cell in results.cells)


def _peers(prepare: Callable[[Workload], Callable[[], Tensor]]) -> dict[str, Peer]:
    return {**by_name(), "sdpa": Peer("sdpa", "", frozenset({"cpu"}), prepare)}


def test_a_wrong_peer_is_nobodys_best(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = _peers(lambda work: lambda: work.q * 0)
    monkeypatch.setattr(benchmark, "by_name", lambda: nothing)
    results = measured()
    assert results.passed
    reasons = {cell.which: cell.peers["sdpa"].absent for cell in results.cells}
    assert all(cell.best_peer == "math" for cell in results.cells)
    assert str(reasons["forward"]).startswith("wrong: out, rows 0 to ")
    assert "not have been used" in str(reasons["backward"])


def _refuse(work: Workload) -> Callable[[], Tensor]:
    raise UnsupportedError("closed on Saturdays")


def test_a_peer_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "by_name", lambda: _peers(_refuse))
    results = measured()
    assert results.passed
    assert {cell.peers["sdpa"].absent for cell in results.cells} == {"closed on Saturdays"}


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        raise RuntimeError("no backward at this size")


def test_a_peer_may_refuse_the_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = by_name()["sdpa"].prepare
    prepare = lambda work: partial(lambda call: _NoBackward.apply(call()), plain(work))  # noqa: E731
    monkeypatch.setattr(benchmark, "by_name", lambda: _peers(prepare))
    for cell in measured().cells:
        peer = cell.peers["sdpa"]
        assert peer.absent == (None if cell.which == "forward" else "no backward at this size")
        assert (peer.ms is None) is (cell.which == "backward")


def test_a_backend_that_cannot_is_no_failure() -> None:
    results = measured(backends=("hopper",))
    assert results.complete
    assert results.passed
    for cell in results.cells:
        assert cell.absent is not None
        assert "hopper" in cell.absent
        assert cell.ms is cell.error is None
        assert cell.peers["sdpa"].ms


def test_names_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="'fast'"):
        begin(settings(backends=("fast",)))
    with pytest.raises(ValueError, match="'slow'"):
        begin(settings(peers=("slow",)))
    with pytest.raises(ValueError, match=r"'cudnn'.*on cpu"):
        begin(settings(peers=("cudnn",)))
    assert peers_for(CPU) == ("sdpa", "math")


def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    whole = Workload.of

    def of(case: Case, device: torch.device) -> Workload:
        made.append(case.name)
        if case is CASES[1] and len(made) == 2:
            raise KeyboardInterrupt
        return whole(case, device)

    monkeypatch.setattr(Workload, "of", of)
    saved: list[Results] = []
    with pytest.raises(KeyboardInterrupt):
        run(settings(), begin(settings()), save=saved.append)
    assert [cell.case for cell in saved[-1].cells] == [CASES[0].name] * 2
    assert not saved[-1].complete
    finished = run(settings(), saved[-1], save=saved.append)
    assert made == [CASES[0].name, CASES[1].name, CASES[1].name]
    assert finished.complete
    assert saved[-1] == finished
    assert finished.cells[:2] == saved[0].cells
    assert run(settings(), finished) == finished
    assert len(made) == 3


def test_progress_rises_to_the_end() -> None:
    shares: list[float] = []
    chosen = settings()
    run(chosen, begin(chosen), lambda label, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


@pytest.mark.gpu
def test_a_gpu_has_peaks_and_compiled_peers() -> None:
    device = torch.device("cuda")
    case = Case(2, 4, 4, 1024, 64, "bfloat16", causal=True)
    chosen = Settings((case,), device, peers=peers_for(device), fill=1.0)
    results = run(chosen, begin(chosen))
    assert results.passed
    for cell in results.cells:
        out_bytes = 2 * 4 * 1024 * 64 * 2
        assert cell.peak_bytes is not None
        assert out_bytes <= cell.peak_bytes < 20 * out_bytes
        assert cell.peers["flex"].ms
