"""What every command shares: the console, JSON, progress, and options that take several values."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tilewise.bench.report.page import Page

DTYPES = ("float32", "float16", "bfloat16", "float64")
MOST = 2**31 - 1
SIZE = click.IntRange(1, MOST)
"""A length, or a number of heads or sequences."""
HEAD_DIM = click.IntRange(1, 512)


class OutputFile(click.Path):
    """A file to write. That its folder takes files is seen before any work begins, not when the result is there."""

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(path_type=Path, dir_okay=False, allow_dash=allow_dash)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        if self.allow_dash and str(path) == "-":
            return path
        reason = unwritable(path)
        if reason is not None:
            self.fail(reason, param, ctx)
        return path


def unwritable(path: Path) -> str | None:
    """Why a file cannot be written there, or None."""
    if path.is_dir():
        return f"{str(path)!r} is a folder"
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"the folder of {str(path)!r} does not exist"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as problem:
        return f"the folder of {str(path)!r} takes no files: {problem.strerror}"


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")

report_option = click.option(
    "--report", type=OutputFile(), default=None, help="Also write a self-contained HTML page here."
)


def console(*, stderr: bool = False) -> Console:
    """A rich console; on a pipe it keeps tables whole instead of folding them to 80 columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 120, highlight=False)


def print_json(value: object) -> None:
    """`value` as JSON on stdout. What JSON cannot say (NaN, infinities) becomes null."""
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False))


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
        for number in (numbers[0], numbers[-1]):
            if not 1 <= number <= MOST:
                self.fail(f"{value!r} holds {number}; every entry must be at least 1 and below 2³¹", param, ctx)
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


def command_line() -> str:
    """The line that runs this again."""
    return shlex.join(["tilewise", *(click.get_current_context().obj or ())])


def write_report(page_of: Callable[[str], Page], path: Path | None) -> None:
    """Writes the page that `page_of(command)` makes, if there is a path for it; `command` runs this again."""
    if path is None:
        return
    from tilewise.bench.report.page import write

    write(page_of(command_line()), path)
    click.echo(f"report: {path}", err=True)


def only_with(mode: str, *useful: str) -> None:
    """Refuses options that were given and have no say here: `mode` is what else was asked for.

    Raises:
        click.UsageError: names the first such option.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in useful:
            raise click.UsageError(f"{parameter.opts[0]} says nothing {mode}", context)
