"""Tables of text, on the terminal and as a page: what the commands that compute something print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tilewise.cli.output import console, write_report
from tilewise.cost.tables import Grid


def print_grid(grid: Grid) -> None:
    """A table; where the terminal is too narrow for it to keep its words whole, one cell a line."""
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(grid.columns):
        table.add_column(column, overflow="fold", justify="left" if index in grid.text_columns else "right")
    for row in grid.rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(Text(grid.title, style="bold"))
    if Measurement.get(out, out.options.update(max_width=10_000), table).minimum <= out.width:
        out.print(table)
    else:
        for row in grid.rows:
            for index, (column, cell) in enumerate(zip(grid.columns, row, strict=True)):
                if cell:
                    out.print(Text(cell if index == 0 else f"  {column}: {cell}" if column else f"  {cell}"))
    out.print()


def write_grids(
    title: str, grids: Sequence[Grid], path: Path | None, *, headline: str = "", summary: str | None = None
) -> None:
    """The tables as one page, if there is a path for it; `summary` where they are not computed from sizes alone."""
    from tilewise.bench.report.grids import COMPUTED, grids_page

    write_report(
        lambda command: grids_page(title, grids, command, headline=headline, summary=summary or COMPUTED), path
    )
