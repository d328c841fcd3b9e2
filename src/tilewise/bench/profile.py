"""One call under PyTorch's profiler: which kernels ran, how long, and how near each came to the roof.

FLOPs and bytes of a kernel are counted from shapes, not by hardware counters: matrix products and ATen's fused
attention exactly, elementwise and reduction operators as one read and one write of what they touch. On CUDA the
project's own kernels are known by name; others have a time and no more. What a cache saved is not visible here; the
command line for a hardware profiler, which sees it, comes with the result.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from tilewise.cost.counts import backward_flops, forward_flops, ideal_traffic, itemsize
from tilewise.cost.hardware import Device
from tilewise.cost.roofline import Step, place
from tilewise.spec import AttentionSpec

_WARM_UPS = 2
_MOVE_NOTHING = re.compile(
    "aten::(alias|as_strided|clone|contiguous|detach|einsum|empty|empty_like|empty_strided|expand|linear|matmul|narrow"
    "|ones_like|permute|reshape|resolve_conj|resolve_neg|scaled_dot_product_attention|select|slice|softmax|squeeze|t|to"
    "|transpose|unsqueeze|view|zeros|zeros_like|_unsafe_view)"
)
"""Views, allocations, and operators whose work is done by others that they call."""
_WRAPPERS = ("tilewise::", "autograd::", "ProfilerStep", "_Attention", "torch::autograd", "cuda", "Memcpy HtoD")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel or operator, all its calls together."""

    name: str
    calls: int
    milliseconds: float
    share: float
    """Of the time of all kernels."""
    flops: float | None = None
    bytes: float | None = None
    reached: float | None = None
    """Of what the roof allows; None where FLOPs or bytes are not known."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What `profile_call` found."""

    kernels: tuple[Kernel, ...]
    milliseconds: float
    """Of all operators on the CPU, the profiler's own work included."""
    hardware_command: str


def profile_call(
    call: Callable[[], object],
    spec: AttentionSpec,
    device: torch.device,
    roof: Device | None = None,
    *,
    trace: Path | None = None,
    program: str = "tilewise profile",
) -> Profile:
    """Runs `call` under the profiler after two runs without it.

    Args:
        spec: the problem that `call` computes; fused kernels get its FLOPs and ideal bytes.
        roof: the device to place kernels under; without it nothing is placed.
        trace: where a Chrome trace goes (chrome://tracing, Perfetto).
        program: the command line that makes this call, for the hardware profiler.

    Raises OSError where the trace cannot be written.
    """
    for _ in range(_WARM_UPS):
        call()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize(device)
    with torch_profile(activities=activities, record_shapes=True) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        trace.touch()  # the profiler itself would only warn
        found.export_chrome_trace(str(trace))
    kernels = _kernels(found.key_averages(group_by_input_shape=True), spec, on_gpu, roof)
    total = sum(event.self_cpu_time_total for event in found.key_averages()) / 1e3
    return Profile(tuple(kernels), total, hardware_command(device, [kernel.name for kernel in kernels], program))


def _kernels(events: Any, spec: AttentionSpec, on_gpu: bool, roof: Device | None) -> list[Kernel]:
    merged: dict[str, list[float]] = {}
    for event in events:
        device_type = str(event.device_type).rpartition(".")[2]
        if (device_type == "CUDA") != on_gpu or event.key.startswith(_WRAPPERS):
            continue
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros <= 0:
            continue
        flops, moved = op_cost(event.key, event.input_shapes or (), spec)
        row = merged.setdefault(event.key, [0.0, 0.0, 0.0, 0.0, 0.0])
        row[0] += event.count
        row[1] += micros / 1e3
        row[2] += event.count * flops
        row[3] += event.count * moved
        row[4] += micros / 1e3 if moved else 0.0
    whole = sum(row[1] for row in merged.values()) or 1.0
    kernels: list[Kernel] = []
    for name, (calls, ms, flops, moved, known_ms) in merged.items():
        known = moved > 0 and math.isclose(known_ms, ms)
        reached = _reached(name, flops, moved, ms, spec, roof) if known and roof is not None else None
        kernels.append(
            Kernel(name, int(calls), ms, ms / whole, flops if known else None, moved if known else None, reached)
        )
    return sorted(kernels, key=lambda kernel: -kernel.milliseconds)


def _reached(name: str, flops: float, moved: float, ms: float, spec: AttentionSpec, roof: Device) -> float | None:
    if spec.dtype not in roof.matmul:
        return None
    if not flops:
        return moved / roof.bandwidth / (ms / 1e3)
    return place(Step(name, flops, moved), roof, spec.dtype).reached(ms / 1e3)


def op_cost(name: str, shapes: Sequence[Sequence[int]], spec: AttentionSpec) -> tuple[float, float]:
    """(FLOPs, bytes) of one call of an operator or kernel; zeros where they are not known.

    Products take their FLOPs from the shapes; the fused kernels from the spec; every other ATen operator with shaped
    inputs reads them once and writes as much as its largest input.
    """
    lowered = name.lower()
    size = itemsize(spec.dtype)
    fused = _fused_cost(lowered, spec)
    if fused is not None:
        return fused
    tensors = [tuple(shape) for shape in shapes if shape]
    if lowered in ("aten::bmm", "aten::mm", "aten::baddbmm", "aten::addmm") and len(tensors) >= 2:
        a, b = tensors[-2:]
        batch = a[0] if len(a) == 3 else 1
        out = batch * a[-2] * b[-1]
        return 2.0 * out * a[-1], float(size * (math.prod(a) + math.prod(b) + out))
    if lowered.startswith("aten::") and tensors and not _MOVE_NOTHING.fullmatch(lowered):
        elements = [math.prod(shape) for shape in tensors]
        return 0.0, float(size * (sum(elements) + max(elements)))
    return 0.0, 0.0


def _fused_cost(name: str, spec: AttentionSpec) -> tuple[float, float] | None:
    """(FLOPs, bytes) of a kernel that computes attention or a part of it; None for any other name."""
    ideal, rows = float(ideal_traffic(spec).bytes), spec.batch * spec.heads * spec.q_len
    inputs = ideal - rows * spec.v_head_dim * itemsize(spec.dtype)
    if "flash_attention" in name or name.startswith("attention_") or "flash_fwd" in name or "flash_bwd" in name:
        if "backward" in name or "bwd" in name:
            return backward_flops(spec).matmul, 2.0 * ideal
        return forward_flops(spec).matmul, ideal
    if name == "keys_gradient":  # QKᵀ, dO·Vᵀ, PᵀdO and dSᵀQ, of the five
        return 4.0 * _scores(spec) * (spec.head_dim + spec.v_head_dim), 2.0 * inputs
    if name == "queries_gradient":  # QKᵀ and dO·Vᵀ again, and dS·K
        return 2.0 * _scores(spec) * (2 * spec.head_dim + spec.v_head_dim), ideal + inputs
    if name == "row_statistics":  # O and dO in, two numbers a row out
        return 0.0, float(rows * (2 * spec.v_head_dim * itemsize(spec.dtype) + 8))
    if name == "convert_dq":
        return 0.0, float(rows * spec.head_dim * (4 + itemsize(spec.dtype)))
    return None


def _scores(spec: AttentionSpec) -> float:
    return forward_flops(spec).matmul / (2.0 * (spec.head_dim + spec.v_head_dim))


def hardware_command(device: torch.device, kernels: Sequence[str], program: str) -> str:
    """The command line of the profiler that reads the hardware's counters, for the slowest of `kernels`."""
    if device.type == "cuda":
        first = f" --kernel-name {shlex.quote(kernels[0])}" if kernels else ""
        return f"ncu --set full --launch-count 1{first} {program}"
    return f"perf stat -e cycles,instructions,cache-references,cache-misses {program}"
