"""`tilewise compare`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilewise.cli import FAILED, OK
from tilewise.cli.output import (
    DTYPES,
    HEAD_DIM,
    SIZE,
    OutputFile,
    PositiveIntegers,
    command_line,
    console,
    json_option,
    pick_device,
    print_json,
    progress,
)

if TYPE_CHECKING:
    from tilewise.bench.comparison import Comparison
    from tilewise.bench.inputs import Text


_COLUMNS = ("method", "time", "speed-up", "peak memory", "max error", "of budget", "of roofline", "TFLOP/s", "backend")
_NARROW_COLUMNS = _COLUMNS[:6]
_WIDE = 112


@click.command(short_help="Exact attention by every method this machine can run.")
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    help="Text to make Q, K and V from.  [default: Python's own help topics]",
)
@click.option(
    "--lengths", type=PositiveIntegers(), default="512,1024,2048,4096", show_default=True, help="Sequence lengths."
)
@click.option("--heads", type=SIZE, default=8, show_default=True)
@click.option("--head-dim", type=HEAD_DIM, default=64, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(("auto", *DTYPES)),
    default="auto",
    help="[default: float32 on a CPU, bfloat16 on a GPU]",
)
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", help="[default: the GPU if there is one]"
)
@click.option("--causal", is_flag=True, help="Let each token see only itself and what comes before.")
@click.option(
    "--report",
    type=OutputFile(),
    default="tilewise-compare.html",
    show_default=True,
    help="Where the HTML report goes.",
)
@json_option
def compare(
    text_file: Path | None,
    lengths: tuple[int, ...],
    heads: int,
    head_dim: int,
    dtype: str,
    device: str,
    causal: bool,
    report: Path,
    as_json: bool,
) -> int:
    """Run exact attention by every method that works here, on real text.

    Every result is checked against float64, then timed, then its memory is measured. Prints a table, writes one
    self-contained HTML report, and exits with 1 if an error exceeds its budget.
    """
    text = _text(text_file)

    import torch

    from tilewise.bench.comparison import Settings
    from tilewise.bench.comparison import compare as run_comparison
    from tilewise.bench.report.comparison import comparison_page, verdict
    from tilewise.bench.report.page import write

    where = pick_device(device)
    kind = getattr(torch, dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32")
    settings = Settings(text, lengths, heads, head_dim, kind, where, causal)
    try:
        with progress("comparing") as told:
            comparison = run_comparison(settings, told)
    except ValueError as problem:
        raise click.UsageError(str(problem), click.get_current_context()) from problem
    write(comparison_page(comparison, command_line()), report)
    if as_json:
        print_json(comparison.as_dict())
    else:
        _print_table(comparison)
        console().print(f"{verdict(comparison)}\nreport: {report}")
    return OK if comparison.passed else FAILED


def _text(path: Path | None) -> Text:
    from tilewise.bench.inputs import default_text, read_text

    if path is None:
        return default_text()
    try:
        return read_text(path)
    except ValueError as problem:
        raise click.UsageError(str(problem), click.get_current_context()) from problem


def _print_table(comparison: Comparison) -> None:
    from rich.table import Table

    from tilewise.bench.report.comparison import cells, facts, headline

    out = console()
    columns = _COLUMNS if out.width >= _WIDE else _NARROW_COLUMNS
    shown = facts(comparison)
    table = Table(title=f"{shown['machine']}: {shown['problem']}", title_justify="left")
    table.add_column("N", justify="right")
    for name in columns:
        table.add_column(name, justify="left" if name in ("method", "backend") else "right", no_wrap=True)
    for n in comparison.settings.lengths:
        for index, row in enumerate(row for row in comparison.rows if row.n == n):
            texts = cells(comparison, row)
            style = None if row.within else "red"
            table.add_row(f"{n:,}" if index == 0 else "", *(texts[name] for name in columns), style=style)
        table.add_section()
    out.print(table)
    for name, why in comparison.left_out.items():
        out.print(f"no {name}: {why}", style="dim")
    out.print(headline(comparison), style="bold")
