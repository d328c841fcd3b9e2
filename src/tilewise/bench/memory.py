"""Peak extra memory of one call, measured and not computed.

On a GPU the caching allocator knows its own peak. On a CPU the operating system is asked, from outside: one helper
process imports everything once and then forks a child for each measurement. The child makes the inputs, warms up on a
small problem so that libraries have mapped their code and started their threads, makes the call and exits; `wait4`
tells the largest resident set it ever had. The same child without the call is subtracted. What remains is what
the call needs beyond its inputs: its result, its intermediates and the workspaces of the libraries under it.
Freed tensors go back to the system at once there (`MALLOC_MMAP_THRESHOLD_`), instead of staying resident for reuse.

The helper itself never computes, as a process whose OpenMP threads are running cannot be forked safely.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

WARM_LENGTH = 64


@dataclass(frozen=True)
class MemoryCase:
    """One call to measure: a method of `cases.py` on random q, k, v [1, heads, length, head_dim]."""

    method: str
    length: int
    heads: int
    head_dim: int
    dtype: str
    causal: bool


def measurable(device: torch.device) -> bool:
    """Whether a peak can be had here: on CUDA, and on Linux for the CPU."""
    return device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")


def cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that `call` holds at its peak beyond what was held before it."""
    gc.collect()  # garbage that went meanwhile would count as less
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int | None:
    """Memory that is left on a device, or None where the system does not tell (a CPU outside Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", told.read_text(encoding="ascii")) if told.exists() else None
    return int(found[1]) * 1024 if found else None


def shortage(need: float, device: torch.device) -> str | None:
    """Why `need` bytes cannot be had on a device now, or None."""
    free = free_bytes(device)
    if free is None or need <= free:
        return None
    return f"needs about {need / 2**30:,.0f} GiB, {free / 2**30:.0f} GiB are free"


@contextmanager
def cpu_peaks() -> Iterator[Callable[[MemoryCase], int]]:
    """A function that measures one case in bytes; its helper process lives as long as the context.

    Raises:
        RuntimeError: from the function, if the measured process failed.
    """
    environment = os.environ | {
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's BLAS would start threads at import, before the fork
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # the C library would else raise it to what was freed, up to 32 MiB
    }
    command = [sys.executable, "-m", "tilewise.bench.memory"]
    helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    sent, received = helper.stdin, helper.stdout
    if sent is None or received is None:
        raise RuntimeError("the memory helper has no pipes")

    def measure(case: MemoryCase) -> int:
        sent.write(json.dumps(asdict(case)) + "\n")
        sent.flush()
        answer = received.readline()
        if not answer.strip().isdigit():
            raise RuntimeError(f"measuring the memory of {case.method} at N={case.length} failed; its error is above")
        return int(answer)

    try:
        yield measure
    finally:
        sent.close()
        received.close()
        helper.wait()


def _serve() -> None:
    """The helper: a case a line on stdin, its peak in bytes a line on stdout, "failed" if the child did not exit 0."""
    from tilewise.bench.cases import all_methods

    methods = {method.name: method.run for method in all_methods()}
    for line in sys.stdin:
        case = MemoryCase(**json.loads(line))
        run = methods[case.method]
        without = _resident_peak(run, case, measured=False)
        with_call = _resident_peak(run, case, measured=True)
        answer = "failed" if without is None or with_call is None else max(with_call - without, 0)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _resident_peak(run: Callable[..., object], case: MemoryCase, *, measured: bool) -> int | None:
    """The largest resident set, in bytes, of a forked child that works on `case`; None if it failed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _work(run, case, measured)
            status = 0
        except Exception:  # noqa: BLE001 - nothing may unwind into the helper's own loop; the traceback is shown
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    return usage.ru_maxrss * 1024 if status == 0 else None


def _work(run: Callable[..., object], case: MemoryCase, measured: bool) -> None:
    dtype = getattr(torch, case.dtype)

    def random(length: int) -> list[torch.Tensor]:
        return [torch.randn(1, case.heads, length, case.head_dim).to(dtype) for _ in range(3)]

    inputs = random(case.length)
    run(*random(min(WARM_LENGTH, case.length)), causal=case.causal)
    if measured:
        run(*inputs, causal=case.causal)


if __name__ == "__main__":
    _serve()
