"""`tilewise profile`: one call under the profiler."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilewise.cli import OK
from tilewise.cli.calibrated import calibration_option, read
from tilewise.cli.grids import print_grid, write_grids
from tilewise.cli.output import OutputFile, command_line, console, json_option, pick_device, print_json, report_option
from tilewise.cli.problem import check_heads, problem_options, spec_of
from tilewise.cost.memory import qkvo_bytes
from tilewise.cost.peak import peak_bytes
from tilewise.cost.tables import Grid

if TYPE_CHECKING:
    from tilewise.bench.profile import Profile

_SHOWN = 12
"""Kernels on the terminal; the others are in --json and the report."""


@click.command(short_help="One call under the profiler: kernels, bytes and FLOPs against the roof.")
@problem_options
@click.option("--backward", is_flag=True, help="Forward and backward together.")
@click.option("--backend", default="auto", show_default=True, help="Which backend to run.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--trace", type=OutputFile(), help="Also write a Chrome trace here.")
@calibration_option
@report_option
@json_option
def profile(
    backward: bool,
    backend: str,
    device: str,
    trace: Path | None,
    calibration: Path | None,
    report: Path | None,
    as_json: bool,
    dtype: str | None,
    **problem: Any,
) -> int:
    """Run one call under PyTorch's profiler and show each kernel's time, FLOPs and bytes.

    The roof is this machine's if it was calibrated (`tilewise roofline --measure`), else measured now.
    """
    if problem["window"] is not None:
        raise click.BadParameter("profiles full and causal problems", param_hint="--window")
    check_heads(problem)
    import torch

    import tilewise
    from tilewise.bench.calibrate import as_device, call_of, machine_rates, stand_ins
    from tilewise.bench.memory import shortage
    from tilewise.bench.profile import profile_call
    from tilewise.errors import UnsupportedError

    where = pick_device(device)
    kind = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    torch_dtype = getattr(torch, kind)
    saved = read(calibration)
    roof = saved.device if saved is not None and kind in saved.device.matmul else None
    if roof is None or (roof.arch == "cpu") != (where.type == "cpu"):
        roof = as_device(machine_rates(where, torch_dtype), where, kind)
    spec = spec_of(dtype=kind, device=roof.arch, **problem)
    direction = "backward" if backward else "forward"
    try:
        ran = tilewise.explain(*stand_ins(spec, where, torch_dtype), causal=spec.causal, backend=backend).backend
        lacking = shortage(qkvo_bytes(spec) + peak_bytes(spec, ran, direction), where)
        if lacking is not None:
            raise click.UsageError(f"{spec} on {ran} {lacking}", click.get_current_context())
        call = call_of(spec, backend, direction, where, torch_dtype)
        found = profile_call(call, spec, where, roof, trace=trace, program=command_line())
    except (UnsupportedError, ValueError) as problem_found:
        raise click.UsageError(str(problem_found), click.get_current_context()) from problem_found
    title = f"{spec}: {'forward and backward' if backward else 'forward'}, backend {ran}, on {roof.name}"
    summary = "One call under PyTorch's profiler: times were measured, FLOPs and bytes are counted from shapes."
    write_grids("profile", [_grid(title, found, len(found.kernels))], report, headline=title, summary=summary)
    if as_json:
        print_json({"spec": spec.as_dict(), "device": roof.name, **asdict(found)})
        return OK
    print_grid(_grid(title, found, _SHOWN))
    if trace is not None:
        console().print(f"trace: {trace} (open in chrome://tracing or ui.perfetto.dev)")
    console().print(f"what the hardware saw: {found.hardware_command}", style="dim")
    return OK


def _grid(title: str, found: Profile, most: int) -> Grid:
    rows = tuple(
        (
            kernel.name,
            str(kernel.calls),
            f"{kernel.milliseconds:.3f} ms",
            f"{100 * kernel.share:.0f} %",
            "–" if not kernel.flops else f"{kernel.flops / 1e9:.2f}",
            "–" if not kernel.bytes else f"{kernel.bytes / 2**20:.1f} MiB",
            "–" if kernel.reached is None else f"{100 * kernel.reached:.0f} %",
        )
        for kernel in found.kernels[:most]
    )
    return Grid(title, ("kernel", "calls", "time", "share", "GFLOP", "bytes", "of the roof"), rows)
