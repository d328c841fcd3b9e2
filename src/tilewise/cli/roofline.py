"""`tilewise roofline`: what bounds standard, fused and decoding attention, and how near to the bound it runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilewise.bench.report.units import rate
from tilewise.cli import OK
from tilewise.cli.calibrated import calibration_option, read, warn_if_stale
from tilewise.cli.grids import print_grid
from tilewise.cli.output import DTYPES, console, json_option, print_json, report_option, write_report
from tilewise.cost.calibration import Calibration, Dot
from tilewise.cost.hardware import DEVICES, Device
from tilewise.cost.roofline import Placement, dot_specs, dot_step, place, standard_steps
from tilewise.cost.tables import Grid

if TYPE_CHECKING:
    from tilewise.bench.report.page import Page

HERE = "here"


@click.command(short_help="Memory-bound or compute-bound, and how near to the bound.")
@click.option(
    "--device",
    type=click.Choice((HERE, *DEVICES), case_sensitive=False),
    help="[default: here if it was calibrated, else H200]",
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default=None, help="[default: what the device is measured in, else 16 bits]"
)
@click.option("--measure", is_flag=True, help="Measure this machine first (about a minute; imports PyTorch).")
@calibration_option
@report_option
@json_option
def roofline(
    device: str | None, dtype: str | None, measure: bool, calibration: Path | None, report: Path | None, as_json: bool
) -> int:
    """Place standard attention (whole and step by step), fused attention and decoding under the roof of a device.

    Hollow dots are what the model allows, filled ones what a calibration measured here.
    """
    if measure:
        if device not in (None, HERE):
            raise click.BadParameter("measures this machine, not " + device, param_hint="--measure")
        from tilewise.cli.calibrated import measure_here

        measure_here(calibration, dtype=dtype)
    found = read(calibration) if device in (None, HERE) else None
    if found is None and device == HERE:
        raise click.UsageError("this machine was not measured yet; add --measure", click.get_current_context())
    where = DEVICES[device or "H200"] if found is None or device not in (None, HERE) else found.device
    kind = dtype or where.usual_dtype
    try:
        placements = placed(where, kind)
    except ValueError as problem:
        raise click.UsageError(str(problem), click.get_current_context()) from None
    measured = {dot.name: dot for dot in found.dots if dot.dtype == kind} if found else {}
    grid = _grid(where, kind, placements, measured)
    write_report(lambda command: _page(where, kind, placements, measured, grid, found, command), report)
    if as_json:
        print_json(_json(where, kind, placements, measured))
        return OK
    warn_if_stale(found)
    print_grid(grid)
    if found is None:
        console().print(
            "Not measured here: `tilewise roofline --measure` fills in what this machine reaches.", style="dim"
        )
    return OK


def placed(device: Device, dtype: str) -> dict[str, Placement]:
    """The three dots and the steps of standard attention under the roof. Raises ValueError for an unknown dtype."""
    specs = dot_specs(device.arch, dtype)
    steps = {name: dot_step(name, spec) for name, spec in specs.items()}
    steps |= {f"standard: {step.name}": step for step in standard_steps(specs["standard"])}
    return {name: place(step, device, dtype) for name, step in steps.items()}


def _grid(device: Device, dtype: str, placements: dict[str, Placement], measured: dict[str, Dot]) -> Grid:
    rows: list[tuple[str, ...]] = []
    for name, p in placements.items():
        dot = measured.get(name)
        reached = (
            ("–", "–") if dot is None else (rate(dot.flops / dot.seconds), f"{100 * p.reached(dot.seconds):.0f} %")
        )
        rows.append((name, f"{p.step.intensity:,.2f}", p.bound, rate(p.attainable), *reached))
    specs = dot_specs(device.arch, dtype)
    title = (
        f"{device.name}, {dtype}: {rate(device.peak(dtype))}, {device.bandwidth / 1e9:,.0f} GB/s, balance "
        f"{device.balance(dtype):.1f} FLOP/byte; square {specs['standard']}, decode {specs['decode']}"
    )
    return Grid(title, ("", "FLOP/byte", "bound", "attainable", "measured", "reached"), tuple(rows))


def _json(device: Device, dtype: str, placements: dict[str, Placement], measured: dict[str, Dot]) -> dict[str, object]:
    steps: dict[str, object] = {}
    for name, p in placements.items():
        dot = measured.get(name)
        steps[name] = {
            "flops": p.step.flops,
            "bytes": p.step.bytes,
            "intensity": p.step.intensity,
            "bound": p.bound,
            "attainable": p.attainable,
            "measured": None if dot is None else dot.flops / dot.seconds,
            "reached": None if dot is None else p.reached(dot.seconds),
        }
    return {"device": asdict(device), "dtype": dtype, "balance": device.balance(dtype), "steps": steps}


def _page(
    device: Device,
    dtype: str,
    placements: dict[str, Placement],
    measured: dict[str, Dot],
    grid: Grid,
    found: Calibration | None,
    command: str,
) -> Page:
    from tilewise.bench.report.grids import grid_section
    from tilewise.bench.report.page import Chart, Page, Section
    from tilewise.bench.report.roofline import Point, roofline_chart

    points: list[Point] = []
    for style, (name, p) in enumerate(placements.items()):
        if name == "standard: PV":  # the same place as QKᵀ for D = Dv
            continue
        dot = measured.get(name)
        reached = None if dot is None else dot.flops / dot.seconds
        points.append(
            Point(
                name.removeprefix("standard: ").replace("QKᵀ", "QKᵀ, PV"),
                p.step.intensity,
                p.attainable,
                reached,
                style,
            )
        )
    chart = roofline_chart(f"Roofline of {device.name}", device.peak(dtype), device.bandwidth, points)
    note = "hollow: what the roof allows; filled: measured" if measured else "what the roof allows"
    facts = {} if found is None else {"machine": device.name, **found.versions, "date": found.date}
    bounds = {name: placements[name].bound for name in ("standard", "flash", "decode")}
    return Page(
        title="roofline",
        headline=f"{device.name}: standard is {bounds['standard']}-bound, flash {bounds['flash']}-bound",
        summary=f"Decoding is {bounds['decode']}-bound. The roof is min(peak, intensity × bandwidth), {dtype}.",
        figures=(),
        sections=[Section("Under the roof", charts=(Chart("Roofline", chart, note),)), grid_section(grid)],
        environment=facts,
        command=command,
    )
