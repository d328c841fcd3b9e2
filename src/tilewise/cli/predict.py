"""`tilewise predict`: time and memory of each backend before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tilewise.cli import FAILED, OK
from tilewise.cli.calibrated import calibration_option, measure_here, read, warn_if_stale
from tilewise.cli.grids import print_grid, write_grids
from tilewise.cli.output import console, json_option, print_json, report_option
from tilewise.cli.problem import check_heads, problem_options, spec_of
from tilewise.cost.calibration import Calibration
from tilewise.cost.peak import BACKENDS
from tilewise.cost.prediction import Fit, Prediction
from tilewise.cost.prediction import predict as predict_times
from tilewise.cost.tables import Grid

MEDIAN_LIMIT = {"cpu": 0.25}
GPU_MEDIAN_LIMIT = 0.15
"""The median error on held-out shapes up to which --check passes."""


@click.command(short_help="Time and memory of each backend before it runs.")
@problem_options
@click.option("--backward", is_flag=True, help="Forward and backward together.")
@click.option("--calibrate", "again", is_flag=True, help="Calibrate again, even if this was done before.")
@click.option("--check", is_flag=True, help="Show predicted and measured time of every held-out shape.")
@calibration_option
@report_option
@json_option
def predict(
    backward: bool,
    again: bool,
    check: bool,
    calibration: Path | None,
    report: Path | None,
    as_json: bool,
    dtype: str | None,
    **problem: Any,
) -> int:
    """Predict what a call takes, from a calibration of this machine (made when there is none, in about a minute).

    The error is the calibration's own: the median over shapes that it was not fitted to. With --check the exit code is
    1 if that exceeds 25 % on a CPU or 15 % on a GPU.
    """
    check_heads(problem)
    found = None if again else read(calibration)
    if found is None or (dtype is not None and dtype not in found.device.matmul):
        found = measure_here(calibration, dtype=dtype)
    kind = dtype or found.device.usual_dtype
    spec = spec_of(dtype=kind, device=found.device.arch, **problem)
    direction = "backward" if backward else "forward"
    fitted = tuple(dict.fromkeys(fit.backend for fit in found.fits)) or BACKENDS
    predictions = predict_times(spec, found.fits, found.device, fitted, direction)
    title = f"{spec}: {'forward and backward' if backward else 'forward'} on {found.device.name}"
    grids = [_grid(title, predictions), _errors(found)]
    if check:
        grids += [_held_out(fit) for fit in found.fits]
    summary = f"Times from a calibration of {found.device.name} on {found.date}; memory from sizes alone."
    write_grids("predict", grids, report, headline=title, summary=summary)
    limit = MEDIAN_LIMIT.get(found.device.arch, GPU_MEDIAN_LIMIT)
    within = all(fit.median_error <= limit for fit in found.fits)
    if as_json:
        print_json(_json(found, predictions, limit, within))
    else:
        warn_if_stale(found)
        for grid in grids:
            print_grid(grid)
        if found.load is not None and found.load > 1.3:
            console().print(f"calibrated under a load of {found.load:.1f}: times of a busy machine", style="yellow")
    return OK if within or not check else FAILED


def _grid(title: str, predictions: list[Prediction]) -> Grid:
    rows = tuple(
        (
            p.backend,
            "–" if p.milliseconds is None else f"{p.milliseconds:.3g} ms",
            f"{p.peak_bytes / 2**20:,.1f} MiB",
            "–" if p.error is None else f"{100 * p.error:.0f} %",
        )
        for p in predictions
    )
    return Grid(title, ("backend", "time", "peak memory", "median error"), rows)


def _errors(found: Calibration) -> Grid:
    rows = tuple(
        (
            fit.backend,
            fit.direction,
            fit.dtype,
            f"{100 * fit.median_error:.1f} %",
            f"{100 * fit.worst_error:.0f} %",
            f"{100 * fit.spread:.1f} %",
            str(len(fit.held_out)),
        )
        for fit in found.fits
    )
    title = f"How good that is: errors on held-out shapes, calibrated {found.date} in {found.seconds:.0f} s"
    return Grid(title, ("backend", "pass", "dtype", "median", "worst", "repeats differ by", "shapes"), rows)


def _held_out(fit: Fit) -> Grid:
    rows = tuple(
        (s.label, f"{s.predicted:.3g} ms", f"{s.measured:.3g} ms", f"{100 * s.error:.0f} %", f"{100 * s.spread:.0f} %")
        for s in fit.held_out
    )
    return Grid(
        f"{fit.backend}, {fit.direction}, {fit.dtype}: shapes that the fit never saw (B×H×N×D)",
        ("shape", "predicted", "measured", "error", "repeats differ by"),
        rows,
    )


def _json(found: Calibration, predictions: list[Prediction], limit: float, within: bool) -> dict[str, Any]:
    fits = [
        {
            "backend": fit.backend,
            "direction": fit.direction,
            "dtype": fit.dtype,
            "median_error": fit.median_error,
            "worst_error": fit.worst_error,
            "spread": fit.spread,
            "held_out": [
                {"shape": s.label, "predicted_ms": s.predicted, "measured_ms": s.measured} for s in fit.held_out
            ],
        }
        for fit in found.fits
    ]
    return {
        "device": found.device.name,
        "versions": found.versions,
        "stale": found.stale(),
        "predictions": [
            {
                "backend": p.backend,
                "direction": p.direction,
                "ms": p.milliseconds,
                "peak_bytes": p.peak_bytes,
                "median_error": p.error,
            }
            for p in predictions
        ],
        "fits": fits,
        "median_error_limit": limit,
        "within": within,
    }
