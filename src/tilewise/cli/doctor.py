"""`tilewise doctor`: what works on this machine and what does not, with the reason and the fix.

Every probe runs on its own: whatever one of them raises becomes its finding, and the others still run.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import click

from tilewise.cli import FAILED, OK, troubles
from tilewise.cli.findings import ABSENT, BROKEN, GOOD, Finding
from tilewise.cli.output import console, json_option, print_json

OLDEST_TORCH = (2, 11)


@click.command(short_help="What works here and what does not, with the reason and the fix.")
@json_option
def doctor(as_json: bool) -> int:
    """Check Python, PyTorch, GPU, Triton and every backend, each with a small numeric self-test.

    Exits with 1 if something is broken; what is merely absent is fine.
    """
    findings = examine()
    broken = any(finding.status == BROKEN for finding in findings)
    if as_json:
        print_json({"ok": not broken, "findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    return FAILED if broken else OK


def examine() -> list[Finding]:
    """All findings, in the order in which one thing builds on another."""
    findings = [
        _probe("Python", _python),
        _probe("NumPy", lambda: Finding("NumPy", GOOD, import_module("numpy").__version__)),
        _probe("PyTorch", _torch),
        _probe("Triton", _triton),
        _probe("driver", _driver),
    ]
    if not _imports("torch"):
        told = "not examined: PyTorch cannot be imported, and everything else needs it"
        return [*findings, Finding("backends", BROKEN, told, "mend the lines above, first the first")]
    findings += [_probe("CUDA", _cuda), _probe("GPU", _gpu)]
    findings += [_probe(subject, check) for subject, check in troubles.found_here()]
    try:
        from tilewise.backends.base import BACKEND_NAMES
        from tilewise.ops.dense import explain as _loads
    except Exception as problem:  # noqa: BLE001 - a broken installation is this command's subject; it is reported
        fix = "reinstall PyTorch and tilewise"
        return [*findings, Finding("backends", BROKEN, f"import failed: {_one_line(problem)}", fix)]
    del _loads
    findings += [_probe(f"backend {name}", lambda name=name: _backend(name)) for name in BACKEND_NAMES]
    extras = _extras()
    return findings + [_probe(f"extra {name}", lambda name=name: _extra(name, extras[name])) for name in extras]


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # noqa: BLE001 - why it does not is the finding of its own probe
        return False
    return True


def _probe(subject: str, probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as problem:  # noqa: BLE001 - anything may be broken here, and is the finding
        missing = problem.name if isinstance(problem, ModuleNotFoundError) else None
        fix = f"pip install {missing}" if missing else "reinstall it, or report this line"
        return Finding(subject, BROKEN, _one_line(problem), fix)


def _one_line(problem: Exception) -> str:
    first = str(problem).strip().splitlines()[:1]
    return f"{type(problem).__name__}: {first[0]}" if first else type(problem).__name__


def _python() -> Finding:
    return Finding("Python", GOOD, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    import torch

    found = str(torch.__version__)
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers < OLDEST_TORCH:
        return Finding("PyTorch", BROKEN, found, f"install torch>={'.'.join(map(str, OLDEST_TORCH))}")
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("PyTorch", GOOD, f"{found}, threads: {torch.get_num_threads()}, CPU kernels for {capability}")


def _cuda() -> Finding:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not (torch.version.cuda or torch.version.hip):
        return Finding("CUDA", ABSENT, "this PyTorch is built for CPUs only", "for a GPU, install a CUDA build of it")
    if not torch.cuda.is_available():
        return Finding("CUDA", ABSENT, f"built for {built}, but no GPU is usable", "check the driver (next lines)")
    return Finding("CUDA", GOOD, f"built for {built}")


def _driver() -> Finding:
    told = Path("/proc/driver/nvidia/version")
    if not told.exists():
        return Finding("driver", ABSENT, "no NVIDIA driver is loaded", "for an NVIDIA GPU, install its driver")
    return Finding(
        "driver", GOOD, told.read_text(encoding="utf-8").splitlines()[0].removeprefix("NVRM version:").strip()
    )


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", ABSENT, "none that PyTorch can use", "none needed: the CPU backends do everything")
    cards: list[str] = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        cards.append(f"{card.name}, compute capability {card.major}.{card.minor}, {memory:.0f} GiB")
    return Finding("GPU", GOOD, "; ".join(cards))


def _triton() -> Finding:
    try:
        found = version("triton")
    except PackageNotFoundError:
        fix = "pip install triton" if platform.system() == "Linux" else "Triton exists for Linux only"
        return Finding("Triton", ABSENT, "not installed", fix)
    import triton

    return Finding("Triton", GOOD, f"{found} from {triton.__name__}" if found != triton.__version__ else found)


def _extras() -> dict[str, list[str]]:
    """What each extra installs, as the installed tilewise declares it; empty where it only lies on the path."""
    extras: dict[str, list[str]] = {}
    try:
        declared = requires("tilewise") or []
    except PackageNotFoundError:
        return {}
    for line in declared:
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line)
        if found and found[1] != "tilewise" and found[2] != "all":
            extras.setdefault(found[2], []).append(found[1])
    return extras


def _extra(name: str, distributions: list[str]) -> Finding:
    present: list[str] = []
    missing: list[str] = []
    for distribution in distributions:
        try:
            present.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            missing.append(distribution)
    if missing:
        return Finding(f"extra {name}", ABSENT, f"lacks {', '.join(missing)}", f"pip install 'tilewise[{name}]'")
    for distribution in distributions:
        import_module(distribution.lower().replace("-", "_"))
    return Finding(f"extra {name}", GOOD, ", ".join(present))


def _backend(name: str) -> Finding:
    """Usable or not on each device there is, with the numbers of the self-test."""
    import torch

    import tilewise
    from tilewise.bench.self_test import self_test, small_case
    from tilewise.errors import UnsupportedError

    subject = f"backend {name}"
    told: list[str] = []
    refusals: list[str] = []
    chosen = ""
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        case = small_case(torch.device(kind))
        auto = tilewise.explain(*case, causal=True)
        chosen = auto.backend
        try:
            result = self_test(case, name)
        except UnsupportedError:
            refusals.append(f"not on {kind}: {auto.rejected[name]}")
            continue
        if not result.passed:
            return Finding(subject, BROKEN, f"wrong on {kind}: {result}", "report this line, with your PyTorch version")
        told.append(f"self-test on {kind}: {result}")
    if not told:
        return Finding(subject, ABSENT, "; ".join(refusals), f"none needed: auto uses {chosen}")
    return Finding(subject, GOOD, "; ".join(told + refusals))


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    styles = {GOOD: "green", ABSENT: "dim", BROKEN: "bold red"}
    for finding in findings:
        table.add_row(finding.subject, Text(finding.status, style=styles[finding.status]), Text(finding.detail))
        if finding.fix:
            table.add_row("", "", Text(f"fix: {finding.fix}", style="dim"))
    console().print(table)
