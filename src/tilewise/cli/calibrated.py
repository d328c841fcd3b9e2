"""What `roofline` and `predict` share: the saved calibration of this machine, and making one."""

from __future__ import annotations

from pathlib import Path

import click

from tilewise.cli.output import console, pick_device, progress, unwritable
from tilewise.cost.calibration import Calibration, default_path, load, save

calibration_option = click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Where this machine's measurements are kept.  [default: ~/.cache/tilewise/machine.json]",
)


def read(given: Path | None) -> Calibration | None:
    """The saved calibration, or None where there is none; one that cannot be read counts as none, and is told of."""
    try:
        path = given or default_path()
    except RuntimeError:  # a user without a home
        return None
    found = load(path)
    if found is None and path.exists():
        click.echo(f"{path} holds no calibration of this version; --measure or --calibrate replaces it", err=True)
    return found


def warn_if_stale(found: Calibration | None) -> None:
    """One line on stderr if versions have changed since the measurement."""
    stale = None if found is None else found.stale()
    if stale:
        console(stderr=True).print(f"measured under other versions ({stale}); measure again", style="yellow")


def measure_here(
    given: Path | None, *, dtype: str | None = None, device: str = "auto", seconds: float | None = None
) -> Calibration:
    """Calibrates this machine and keeps the result; where the usual file cannot be written it says so.

    Raises:
        click.BadParameter: there is no such device, or the file that was given cannot be written.
    """
    reason = None if given is None else unwritable(given)
    if reason is not None:
        raise click.BadParameter(reason, param_hint="--calibration")
    import torch

    from tilewise.bench.calibrate import calibrate

    where = pick_device(device)
    kind = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    with progress("calibrating") as told:
        found = calibrate(where, kind, seconds=seconds, progress=told)
    try:
        save(found, given or default_path())
    except (OSError, RuntimeError) as problem:
        click.echo(f"measured, but not kept for the next time: {problem}", err=True)
    return found
