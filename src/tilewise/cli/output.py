"""What every command shares: the console, JSON, progress, and options that take several values."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tilewise.bench.report.page import Page

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")

report_option = click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Also write a self-contained HTML page here.",
)

DTYPES = ("float32", "float16", "bfloat16", "float64")


def console(*, stderr: bool = False) -> Console:
    """A rich console; on a pipe it keeps tables whole instead of folding them to 80 columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 120, highlight=False)


def print_json(value: object) -> None:
    """`value` as JSON on stdout. What JSON cannot say (NaN, infinities) becomes null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr, shown on a terminal only; yields a function of (what begins now, share done).

    It is redrawn when told something and never by a thread of its own, which would disturb what is being timed.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    target = console(stderr=True)
    with Progress(*columns, console=target, transient=True, auto_refresh=False, disable=not target.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def told(label: str, share: float) -> None:
            bar.update(task, description=f"{label:<34}", completed=share, refresh=True)

        yield told


class PositiveIntegers(click.ParamType):
    """A list such as 512,1024,2048: sorted, each once."""

    name = "N,N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = sorted({int(part) for part in str(value).split(",")})
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 512,1024", param, ctx)
        if numbers[0] < 1:
            self.fail(f"{value!r} holds {numbers[0]}; every entry must be at least 1", param, ctx)
        return tuple(numbers)


def pick_device(name: str) -> torch.device:
    """The torch device called `name`, "auto" being the GPU if there is one.

    Raises:
        click.BadParameter: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this PyTorch sees no GPU; `tilewise doctor` says why", param_hint="--device")
    return torch.device(name)


def write_report(page_of: Callable[[str], Page], path: Path) -> None:
    """Writes the page that `page_of(command)` makes, `command` being the line that runs this again.

    Raises:
        click.BadParameter: the folder is missing or not writable.
    """
    from tilewise.bench.report.page import write

    page = page_of(shlex.join(["tilewise", *(click.get_current_context().obj or ())]))
    try:
        write(page, path)
    except OSError as problem:
        raise click.BadParameter(f"{str(path)!r}: {problem.strerror}", param_hint="--report") from problem
    click.echo(f"report: {path}", err=True)
