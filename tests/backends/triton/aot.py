"""Compile, without a GPU, exactly what the launchers would launch on one.

A stand-in driver names the target; `JITFunction` launches turn into compilations; operands live on the meta device,
whose null pointers specialise like aligned ones. What comes out is each kernel's resource report.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Report(NamedTuple):
    """Resources of one compiled kernel: registers a thread, spilled bytes, shared memory bytes a block."""

    kernel: str
    registers: int
    spills: int
    shared: int
    compiled: Any


class _Driver:
    """As much of a driver as compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """Launchers remember kernels by device number: one for each target."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Inside, every kernel launch compiles for sm_`arch` instead; yields the list of compiled kernels."""
    compiled: list[Any] = []
    before = JITFunction.__getitem__
    previous = driver.active if driver._active else None

    def launch(self: JITFunction, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: compiled.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    JITFunction.__getitem__ = launch
    driver.set_active(_Driver(GPUTarget("cuda", arch, 32)))
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = before
        if previous is not None:
            driver.set_active(previous)
        else:
            driver._active = None


def resources(kernel: Any) -> Report:
    """Read registers and spills out of the kernel's machine code."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Report(kernel.metadata.name, int(found[1]), int(found[2]), kernel.metadata.shared, kernel)
