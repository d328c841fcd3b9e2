"""What `roofline` and `predict` share: the saved calibration of this machine, and making one."""

from __future__ import annotations

from pathlib import Path

import click

from tilewise.cli.output import console, progress
from tilewise.cost.calibration import Calibration, default_path, load, save

calibration_option = click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Where this machine's measurements are kept.  [default: ~/.cache/tilewise/machine.json]",
)


def path_of(given: Path | None) -> Path:
    """The file to read and write.

    Raises:
        click.BadParameter: none was given and this user has no home.
    """
    if given is not None:
        return given
    try:
        return default_path()
    except RuntimeError as problem:
        raise click.BadParameter("no home folder to keep it in; name a file", param_hint="--calibration") from problem


def read(given: Path | None) -> Calibration | None:
    """The saved calibration, or None."""
    return load(path_of(given))


def warn_if_stale(found: Calibration | None) -> None:
    """One line on stderr if versions have changed since the measurement."""
    stale = None if found is None else found.stale()
    if stale:
        console(stderr=True).print(f"measured under other versions ({stale}); measure again", style="yellow")


def measure_here(
    given: Path | None, *, dtype: str | None = None, device: str = "auto", seconds: float | None = None
) -> Calibration:
    """Calibrates this machine and keeps the result.

    Raises:
        click.BadParameter: there is no such device, or the file cannot be written.
    """
    import torch

    from tilewise.bench.calibrate import SECONDS, calibrate
    from tilewise.cli.output import pick_device

    path = path_of(given)
    where = pick_device(device)
    kind = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"))
    with progress("calibrating") as told:
        found = calibrate(where, kind, seconds=SECONDS if seconds is None else seconds, progress=told)
    try:
        save(found, path)
    except OSError as problem:
        raise click.BadParameter(f"{str(path)!r}: {problem.strerror}", param_hint="--calibration") from problem
    return found
