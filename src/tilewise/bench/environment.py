"""What a measurement ran on: versions and hardware by name, never a host, a user or a path."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import tilewise

_CPU_CAPABILITIES = {"AVX512": "AVX-512", "AVX2": "AVX2", "DEFAULT": "baseline SIMD"}


def environment(device: torch.device) -> dict[str, str | int]:
    """Machine and software, ready for JSON, in the order in which a reader wants them."""
    facts: dict[str, str | int] = {
        "machine": machine(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or torch.version.hip or "none"}
    facts |= {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": installed("triton") or "not installed",
        "numpy": installed("numpy") or "not installed",
        "tilewise": tilewise.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return facts


def installed(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> str:
    """One phrase: "2-core CPU (AVX-512)" or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{usable_cores()}-core CPU ({_CPU_CAPABILITIES.get(capability, capability)})"


def usable_cores() -> int:
    """Cores this process may run on, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
