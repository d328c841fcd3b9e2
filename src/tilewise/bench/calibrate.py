"""What this machine attains, measured: its two ceilings in a fraction of a second, and every backend in about a minute.

`machine_rates` gives the roof. `calibrate` also times each backend on random shapes, fits what a unit of work costs
(`predictor`), and measures the three dots of the roofline: standard attention, a fused kernel, and decoding. Every
backend passes its self-test first; a backend that fails is left out with the reason.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import tilewise
from tilewise.backends.base import BACKEND_NAMES
from tilewise.bench.environment import machine, usable_cores
from tilewise.bench.precompile import in_processes
from tilewise.bench.predictor import Sample, fit
from tilewise.bench.self_test import self_test, small_case
from tilewise.bench.timer import once
from tilewise.cost.calibration import Calibration, Dot, versions
from tilewise.cost.counts import self_attention
from tilewise.cost.hardware import Device, find, measured
from tilewise.cost.peak import PASSES, Pass
from tilewise.cost.prediction import Fit
from tilewise.cost.roofline import dot_specs, dot_step
from tilewise.errors import UnsupportedError
from tilewise.spec import AttentionSpec

TRAINING, HELD_OUT = 36, 30
"""Shapes that a fit is made from, and shapes that it is judged by."""
CPU_DIMS, GPU_DIMS = (32, 64, 80, 128), (64, 128)
"""Head dims of those shapes; on a GPU each takes compilations of its own, which a calibration has no time for."""
CPU_SECONDS, GPU_SECONDS = 40.0, 33.0
"""That timing may take, on a GPU after 20 seconds of compiling."""
_SHARES = {"forward": 1 / 3, "backward": 2 / 3}
"""Of that time. A backward's host work goes through more threads, and its repeats differ more."""
_RUNS = 3
_LEAST_ROUNDS, _MOST_ROUNDS = {"cpu": 3, "cuda": 2}, 9
_BURST, _BURST_RUNS = 5.0, 12
"""Milliseconds that runs in a row may take, and most of them: a call of half a millisecond on a GPU is mostly its
host's, and one run of it differs from the next by up to 80 %."""

Progress = Callable[[str, float], object]


@dataclass(frozen=True)
class MachineRates:
    """`matmul` in FLOP/s for one dtype, `copy` in bytes/s, read and write counted."""

    matmul: float
    copy: float

    def or_better(self, other: MachineRates) -> MachineRates:
        """The higher of each: a busy moment lowers what is measured, nothing raises it."""
        return MachineRates(max(self.matmul, other.matmul), max(self.copy, other.copy))


def as_device(rates: MachineRates, device: torch.device, dtype: str) -> Device:
    """This machine for the cost model, with the rates that were measured for `dtype`; sizes are the system's word."""
    how = f"matrix products and copies under PyTorch {torch.__version__}"
    name, matmul = machine(device), {dtype: rates.matmul}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known = find(card.name)
        return measured(
            name,
            arch=f"sm_{card.major}{card.minor}",
            matmul=matmul,
            bandwidth=rates.copy,
            memory=card.total_memory,
            how=how,
            sms=card.multi_processor_count,
            shared_per_sm=0 if known is None else known.shared_per_sm,
            shared_per_block=0 if known is None else known.shared_per_block,
            registers_per_sm=0 if known is None else known.registers_per_sm,
            l2=card.L2_cache_size,
        )
    return measured(
        name,
        arch=device.type,
        matmul=matmul,
        bandwidth=rates.copy,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        how=how,
        sms=usable_cores(),
        l2=last_level_cache(),
    )


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache as Linux tells it; 0 where it does not."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="ascii").strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:])
        sizes.append(int(text[:-1]) * unit if unit else int(text))
    return max(sizes)


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


def random_shapes(count: int, *, dtype: str, device: str, largest: int, seed: int) -> list[AttentionSpec]:
    """Self-attention problems of every size up to `largest` scores, lengths odd, a third of them causal."""
    draw = random.Random(seed)
    shapes: list[AttentionSpec] = []
    while len(shapes) < count:
        length = round(2 ** draw.uniform(6, 14 if device != "cpu" else 11)) | 1
        spec = self_attention(
            length,
            draw.choice(CPU_DIMS if device == "cpu" else GPU_DIMS),
            batch=draw.choice((1, 2, 4)),
            heads=draw.choice((1, 2, 4, 8, 12, 16)),
            dtype=dtype,
            causal=draw.random() < 0.33,
        )
        if largest / 2**9 <= spec.batch * spec.heads * length * length <= largest:
            shapes.append(replace(spec, device=device))
    return shapes


def calibrate(
    device: torch.device,
    dtype: torch.dtype,
    *,
    seconds: float | None = None,
    training: int = TRAINING,
    held_out: int = HELD_OUT,
    largest: int | None = None,
    progress: Progress = lambda label, share: None,
) -> Calibration:
    """Measures the ceilings, every backend that runs here and the dots.

    Args:
        seconds: what the timing may take, `CPU_SECONDS` or `GPU_SECONDS` unless given; `_LEAST_ROUNDS`
            over all shapes are run whatever it says.
        largest: most scores of a shape; 2²³ on a CPU and 2²⁸ on a GPU unless given.

    Raises ValueError for too few training shapes.
    """
    start = time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    name = str(dtype).removeprefix("torch.")
    progress("measuring the two ceilings", 0.0)
    rates = machine_rates(device, dtype)
    here = as_device(rates, device, name)
    most = largest or (2**23 if device.type == "cpu" else 2**28)
    if seconds is None:
        seconds = CPU_SECONDS if device.type == "cpu" else GPU_SECONDS
    shapes = random_shapes(training + held_out, dtype=name, device=here.arch, largest=most, seed=1)
    if device.type == "cuda":
        in_processes(
            _once_ahead,
            _distinct(shapes, device, dtype),
            lambda done, planned: progress(f"compiling, {done} of {planned}", 0.0),
        )
    progress("testing every backend", 0.0)
    runnable = [backend for backend in BACKEND_NAMES if _runs(backend, device)]
    fits: list[Fit] = []
    for index, direction in enumerate(PASSES):
        before = sum(list(_SHARES.values())[:index])

        def told(done: float, direction: Pass = direction, before: float = before) -> None:
            progress(f"timing every backend, {direction}", before + _SHARES[direction] * done)

        samples = _time_all(shapes, runnable, direction, device, dtype, seconds * _SHARES[direction], told)
        for backend, of_backend in samples.items():
            fits.append(fit(backend, direction, name, of_backend[:training], of_backend[training:], here))
    rates = rates.or_better(machine_rates(device, dtype))
    return Calibration(
        as_device(rates, device, name),
        versions(),
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        time.perf_counter() - start,
        tuple(dots(device, dtype)),
        tuple(fits),
        load,
    )


def _distinct(
    shapes: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype
) -> list[tuple[AttentionSpec | None, str, torch.device, torch.dtype]]:
    """One task for `_once_ahead` of each launch configuration that the shapes have on a backend that compiles, with and
    without the copy engine."""
    tasks: dict[object, tuple[AttentionSpec | None, str, torch.device, torch.dtype]] = {}
    for backend in ("hopper", "triton"):
        tasks[backend] = (None, backend, device, dtype)
        for spec in shapes:
            with contextlib.suppress(UnsupportedError):
                choice = tilewise.explain(*stand_ins(spec, device, dtype), causal=spec.causal, backend=backend)
                key = backend, spec.head_dim, spec.causal, getattr(choice.config, "tma", True), str(choice.config)
                tasks.setdefault(key, (spec, backend, device, dtype))
    return list(tasks.values())


def _once_ahead(spec: AttentionSpec | None, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward, or the self-test, which leave what they compiled in the compiler's cache on disk.

    A backend that does not run here raises, which nobody looks at.
    """
    if spec is None:
        self_test(small_case(device), backend)
    else:
        call_of(spec, backend, "backward", device, dtype)()


def _runs(backend: str, device: torch.device) -> bool:
    """Whether a backend can serve here and passes its self-test."""
    try:
        return self_test(small_case(device), backend).passed
    except UnsupportedError:
        return False


def _sizes(spec: AttentionSpec) -> list[tuple[int, int, int, int]]:
    """Of q, k and v."""
    return [
        (spec.batch, spec.heads, spec.q_len, spec.head_dim),
        (spec.batch, spec.kv_heads, spec.k_len, spec.head_dim),
        (spec.batch, spec.kv_heads, spec.k_len, spec.v_head_dim),
    ]


def tensors(spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random q, k, v of a spec's shapes."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in _sizes(spec)]


def stand_ins(spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of a spec's shapes that take no memory, to ask `explain` with: one row, expanded."""
    return [torch.empty(1, 1, 1, size[-1], dtype=dtype, device=device).expand(size) for size in _sizes(spec)]


def call_of(
    spec: AttentionSpec, backend: str, direction: Pass, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """One call of `spec` on `backend`: the forward alone, or forward and backward."""
    q, k, v = tensors(spec, device, dtype)
    if direction == "forward":
        return lambda: tilewise.attention(q, k, v, causal=spec.causal, backend=backend)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.ones(spec.batch, spec.heads, spec.q_len, spec.v_head_dim, dtype=dtype, device=device)

    def both() -> object:
        out = tilewise.attention(*leaves, causal=spec.causal, backend=backend)
        return torch.autograd.grad(out, leaves, dout)

    return both


def _time_all(
    shapes: Sequence[AttentionSpec],
    backends: Sequence[str],
    direction: Pass,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    told: Callable[[float], object],
) -> dict[str, list[Sample]]:
    """Rounds over all shapes and backends, so that a busy moment hits all alike; the least of all rounds counts.

    The order is drawn anew for each round: in one order, where those that a fit is made from come first, a host that is
    slow for seconds makes the others look slower in every round.
    """
    runs: dict[tuple[str, int], list[float]] = {}
    draw = random.Random(0)
    begun = time.perf_counter()
    done = 0
    least = _LEAST_ROUNDS[device.type] + 1
    while done < least or (done <= _MOST_ROUNDS and _time_left(begun, done, seconds)):
        for turn, index in enumerate(draw.sample(range(len(shapes)), len(shapes))):
            for backend in backends:
                call = call_of(shapes[index], backend, direction, device, dtype)
                taken = _burst(call, device) / 1e3
                if done:  # the first round loads kernels and fills caches
                    runs.setdefault((backend, index), []).append(taken)
            told(min(1.0, (done + turn / len(shapes)) / least))
        done += 1
    return {
        backend: [
            Sample(spec, min(runs[backend, index]), statistics.median(runs[backend, index]))
            for index, spec in enumerate(shapes)
        ]
        for backend in backends
    }


def _burst(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the fastest of a few runs in a row; the first finds caches cold, but for a GPU's long call."""
    runs = [once(call, device) for _ in range(2 if device.type == "cpu" else 1)]
    while len(runs) < _BURST_RUNS and sum(runs) < _BURST:
        runs.append(once(call, device))
    return min(runs)


def _time_left(begun: float, rounds: int, seconds: float) -> bool:
    spent = time.perf_counter() - begun
    return spent + spent / rounds < seconds


def dots(device: torch.device, dtype: torch.dtype) -> list[Dot]:
    """The three dots, measured: the least of several runs each."""
    name = str(dtype).removeprefix("torch.")
    arch = as_device(MachineRates(1.0, 1.0), device, name).arch
    found: list[Dot] = []
    for dot, spec in dot_specs(arch, name).items():
        step = dot_step(dot, spec)
        call = call_of(spec, "standard" if dot == "standard" else "auto", "forward", device, dtype)
        with torch.inference_mode():
            seconds = _least(call, device)
        found.append(Dot(dot, step.flops, step.bytes, seconds, name))
    return found
