"""`tilewise advise`: which mechanism and backend for a workload, and when not to bother."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tilewise.cli import OK
from tilewise.cli.calibrated import calibration_option, read
from tilewise.cli.grids import print_grid, write_grids
from tilewise.cli.output import json_option, print_json, report_option
from tilewise.cli.problem import problem_options, spec_of
from tilewise.cost.advice import TASKS, Advice, Task
from tilewise.cost.advice import advise as give
from tilewise.cost.hardware import DEVICES
from tilewise.cost.tables import Grid


@click.command(short_help="Which mechanism and backend, why, and when not to bother.")
@problem_options
@click.option("--task", type=click.Choice(TASKS), default="train", show_default=True)
@click.option("--layers", type=click.IntRange(1), default=24, show_default=True)
@click.option(
    "--device",
    type=click.Choice(("here", *DEVICES), case_sensitive=False),
    help="[default: here if it was calibrated, else H200]",
)
@calibration_option
@report_option
@json_option
def advise(
    task: Task,
    layers: int,
    device: str | None,
    calibration: Path | None,
    report: Path | None,
    as_json: bool,
    dtype: str | None,
    **problem: Any,
) -> int:
    """Say what to use for a workload, with the numbers that the advice follows from; nothing is run.

    --task decode takes --seq new tokens (usually 1) over --keys cached ones.
    """
    found = read(calibration) if device in (None, "here") else None
    if found is None and device == "here":
        raise click.UsageError("this machine was not measured yet: run `tilewise roofline --measure`")
    where = found.device if found is not None else DEVICES[device or "H200"]
    kind = dtype or where.usual_dtype
    if task == "decode" and problem["keys"] is None:
        problem |= {"keys": problem["seq"], "seq": 1}
    try:
        advice = give(spec_of(dtype=kind, device=where.arch, **problem), where, task, layers=layers)
    except ValueError as reason:
        raise click.UsageError(str(reason), click.get_current_context()) from None
    grid = _grid(advice, task)
    write_grids("advise", [grid], report, headline=_headline(advice))
    if as_json:
        print_json({"device": where.name, "task": task, **asdict(advice)})
        return OK
    print_grid(grid)
    return OK


def _headline(advice: Advice) -> str:
    return (
        f"{advice.mechanism} on {advice.backend}" if advice.bother else "Not worth a change: attention is a small part"
    )


def _grid(advice: Advice, task: str) -> Grid:
    rows = [("use", f"{advice.mechanism}, backend {advice.backend}")]
    rows += [("because", reason) for reason in advice.reasons]
    rows += [("otherwise", alternative) for alternative in advice.instead]
    return Grid(f"{task}: {_headline(advice)}", ("", ""), tuple(rows))
