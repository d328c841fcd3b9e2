"""The troubles that people meet, each as a check with its fix: what `doctor` asks beyond "is it installed?".

Each check is a function of plain facts, so that it can be tested without the machine that has the trouble; `found_here`
collects the facts of this one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tilewise.cli.findings import ABSENT, BROKEN, GOOD, Finding
from tilewise.cli.output import unwritable
from tilewise.cost.calibration import Calibration, default_path, load

NEEDS = {
    "hopper": "9.0 exactly (H100, H200)",
    "triton": "8.0 (A100, RTX 30) or newer",
    "sdpa": "8.0 or newer for its fused kernel",
    "tiled, standard": "any that this PyTorch was built for",
}
"""The compute capability that each backend asks for."""

FP32_LIMIT, FP16_LIMIT = 1e-5, 1e-3
"""Differences from standard attention that are normal on unit-normal inputs."""
_LOW_MEMORY = 0.1


def versions(built: str | None, driver: str | None, toolkit: str | None) -> Finding:
    """Do the CUDA versions of PyTorch, of the driver (the newest it can run) and of the toolkit fit together?"""
    subject = "CUDA versions"
    if built is None:
        return Finding(subject, ABSENT, "this PyTorch uses no CUDA, so none can disagree")
    if driver is None:
        fix = "install the NVIDIA driver; PyTorch brings the rest of CUDA with it"
        return Finding(subject, ABSENT, f"PyTorch is built for CUDA {built}; no driver answers", fix)
    told = f"PyTorch {built}, driver up to {driver}, toolkit {toolkit or 'not installed (none is needed)'}"
    if _major(driver) < _major(built):
        fix = f"update the driver to one for CUDA {_major(built)} or newer, or install a PyTorch built for {driver}"
        return Finding(subject, BROKEN, f"{told}: the driver is too old for this PyTorch", fix)
    if toolkit is not None and _major(toolkit) != _major(built):
        return Finding(subject, GOOD, f"{told}; the toolkit differs, which matters only to what you compile with nvcc")
    return Finding(subject, GOOD, told)


def _major(version: str) -> int:
    return int(version.split(".", maxsplit=1)[0])


def gpu_age(capability: tuple[int, int] | None, name: str, supported: tuple[str, ...]) -> Finding:
    """Is the GPU new enough, for each path? `supported` are the architectures of this PyTorch ("sm_80", …)."""
    subject = "GPU age"
    needs = "; ".join(f"{backend}: {what}" for backend, what in NEEDS.items())
    if capability is None:
        return Finding(subject, ABSENT, f"no GPU. Compute capability that each backend needs: {needs}")
    number = f"{capability[0]}.{capability[1]}"
    oldest = min((int(re.sub(r"\D", "", arch)) for arch in supported if arch.startswith("sm_")), default=0)
    if capability[0] * 10 + capability[1] < oldest:
        fix = f"install a PyTorch built for compute capability {number}, or use the CPU backends"
        return Finding(subject, BROKEN, f"{name} has {number}; this PyTorch starts at sm_{oldest}", fix)
    told = f"{name} has compute capability {number} (not to be confused with a CUDA version). Needed: {needs}"
    if capability < (8, 0):
        return Finding(subject, ABSENT, told, "none needed: auto uses the backends that run on any GPU")
    return Finding(subject, GOOD, told)


def building(environment: Mapping[str, str], compiler: str | None, platform: str) -> Finding:
    """Nothing is built at install; Triton compiles a small launcher with the system's C compiler at first use."""
    subject = "building"
    told = "nothing is compiled at install, so no build can run out of memory"
    if "MAX_JOBS" in environment:
        told += f"; MAX_JOBS={environment['MAX_JOBS']} has no effect here"
    if platform == "linux" and compiler is None:
        fix = "install gcc or clang, or point CC at one: Triton needs it at its first GPU call"
        return Finding(subject, ABSENT, f"{told}. No C compiler was found", fix)
    return Finding(subject, GOOD, told)


def interpreter(environment: Mapping[str, str], numpy: str | None) -> Finding:
    """Is Triton's interpreter switched on by accident, or with a NumPy that it cannot work with?"""
    subject = "Triton interpreter"
    if environment.get("TRITON_INTERPRET", "0").lower() in ("0", "false", "off", "no", "n", ""):
        return Finding(subject, GOOD, "off")
    if numpy is not None and tuple(int(part) for part in numpy.split(".")[:2]) >= (2, 4):
        fix = "install numpy<2.4 where kernels are interpreted, or unset TRITON_INTERPRET"
        return Finding(subject, BROKEN, f"on, and NumPy {numpy} breaks its loops", fix)
    return Finding(subject, ABSENT, "on: kernels run on the CPU, very slowly", "unset TRITON_INTERPRET to use a GPU")


def layout(message: str | None) -> Finding:
    """Is a transposed layout recognised? `message` is the error that [B, N, H, D] tensors get as "bhsd", if any."""
    subject = "layout"
    meaning = "tensors are [B, H, N, D] unless layout='bshd' says [B, N, H, D]"
    if message is None or "layout" not in message:
        told = "q and k in the other layout were not recognised"
        return Finding(subject, BROKEN, told, "report this line")
    return Finding(subject, GOOD, f"{meaning}; in the other one where the heads tell: {message}")


def differences(errors: Mapping[str, float]) -> Finding:
    """How far results differ from the standard path, by dtype, and whether that is normal."""
    subject = "accuracy"
    limits = {"float32": FP32_LIMIT, "float16": FP16_LIMIT, "bfloat16": 8 * FP16_LIMIT}
    told = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items())
    over = [dtype for dtype, error in errors.items() if not error <= limits[dtype]]
    if over:
        return Finding(subject, BROKEN, f"differs from the standard path by {told}", "report this line")
    why = "tiles sum in another order, so the last bits differ; both are equally far from float64"
    return Finding(subject, GOOD, f"differs from the standard path by {told}: normal below 1e-5 and 1e-3; {why}")


def memory(free: int | None, total: int, reserved: int, what: str) -> Finding:
    """How much memory is left, and what answers "still out of memory"."""
    subject = f"memory of {what}"
    fix = "tilewise cost --model gpt2-medium shows what a step needs: batch, activations, logits, optimizer"
    if free is None:
        return Finding(subject, GOOD, f"{total / 2**30:.1f} GiB")
    told = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if reserved:
        told += f", {reserved / 2**30:.1f} GiB kept by this process"
    if free < _LOW_MEMORY * total:
        return Finding(subject, ABSENT, f"little is left: {told}", f"end what else uses it; {fix}")
    return Finding(subject, GOOD, told, "" if free > 0.5 * total else fix)


def calibration(found: Calibration | None, path: Path, unkept: str | None) -> Finding:
    """Was this machine measured, can the measurement be read, does it still hold, and can a new one be kept?"""
    subject, again = "calibration", "tilewise roofline --measure"
    if found is not None and found.stale():
        return Finding(subject, ABSENT, f"measured under other versions: {found.stale()}", again)
    if found is not None:
        return Finding(subject, GOOD, f"measured {found.date}: {', '.join(found.device.matmul)}")
    if path.exists():
        return Finding(subject, ABSENT, f"{path} holds no calibration of this version", f"{again} replaces it")
    if unkept is not None:
        fix = f"make that folder writable, or name a file: {again} --calibration FILE"
        return Finding(subject, ABSENT, f"not measured, and a measurement could not be kept: {unkept}", fix)
    return Finding(subject, ABSENT, "not measured yet: roofline, predict and advise speak of an H200", again)


def found_here() -> list[tuple[str, Callable[[], Finding]]]:
    """Every check with the facts of this machine; each may raise, and then that is its finding."""
    return [
        ("CUDA versions", lambda: versions(_built(), driver_cuda(), toolkit_cuda())),
        ("GPU age", _gpu_age),
        ("building", lambda: building(os.environ, _compiler(), sys.platform)),
        ("Triton interpreter", lambda: interpreter(os.environ, _numpy())),
        ("layout", lambda: layout(_layout_message())),
        ("accuracy", lambda: differences(_differences())),
        ("memory of the CPU", _cpu_memory),
        ("memory of the GPU", _gpu_memory),
        ("calibration", _calibration),
    ]


def _built() -> str | None:
    import torch

    return torch.version.cuda


def driver_cuda() -> str | None:
    """The newest CUDA that the loaded driver runs, "12.8", or None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int(0)
        if library.cuDriverGetVersion(ctypes.byref(number)) or number.value <= 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def toolkit_cuda() -> str | None:
    """The version of the nvcc on the path, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    return found[1] if found else None


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CC", ""), "gcc", "clang", "cc") if (found := shutil.which(name))), None
    )


def _numpy() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("numpy")
    except PackageNotFoundError:
        return None


def _gpu_age() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return gpu_age(None, "", ())
    name = torch.cuda.get_device_name(0)
    return gpu_age(torch.cuda.get_device_capability(0), name, tuple(torch.cuda.get_arch_list()))


def _layout_message() -> str | None:
    import torch

    import tilewise

    q, k = torch.zeros(1, 16, 4, 8), torch.zeros(1, 24, 4, 8)  # [B, N, H, D], as 16 heads against 24
    try:
        tilewise.attention(q, k, k)
    except ValueError as problem:
        return str(problem)
    return None


def _differences() -> dict[str, float]:
    import torch

    import tilewise

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, 257, 64, generator=generator).to(device, dtype) for _ in range(3))
        fast, plain = tilewise.attention(q, k, v), tilewise.attention(q, k, v, backend="standard")
        found[str(dtype).removeprefix("torch.")] = float((fast.double() - plain.double()).abs().max())
    return found


def _cpu_memory() -> Finding:
    import torch

    from tilewise.bench.memory import free_bytes

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory(free_bytes(torch.device("cpu")), total, 0, "the CPU")


def _calibration() -> Finding:
    path = default_path()
    nearest = next(folder for folder in path.parents if folder.exists())
    return calibration(load(path), path, unwritable(nearest / path.name))


def _gpu_memory() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("memory of the GPU", ABSENT, "no GPU")
    free, total = torch.cuda.mem_get_info(0)
    return memory(free, total, torch.cuda.memory_reserved(0), "the GPU")
