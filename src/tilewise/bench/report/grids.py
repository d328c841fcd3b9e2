"""Plain tables of text as a report: what `cost`, `predict` and `advise` write."""

from __future__ import annotations

from collections.abc import Sequence

from tilewise.bench.report.page import Chart, Group, Page, Section, Table
from tilewise.cost.tables import Grid


def grid_section(grid: Grid) -> Section:
    """A section that holds one table; cells without a digit are aligned left."""
    title = grid.title.split(". ")[0].split("; ")[0]
    return Section(
        title, table=Table(grid.title, grid.columns, (Group("", grid.rows),), text_columns=grid.text_columns)
    )


def grids_page(
    title: str, grids: Sequence[Grid], command: str, *, headline: str = "", charts: Sequence[Chart] = ()
) -> Page:
    """A page of tables, computed from sizes: it names no machine."""
    drawn = [Section("Picture", charts=tuple(charts))] if charts else []
    return Page(
        title=title,
        headline=headline or "What attention costs",
        summary="Computed from sizes alone; nothing was run. 1 KB = 1024 bytes.",
        figures=(),
        sections=[*drawn, *(grid_section(grid) for grid in grids)],
        environment={},
        command=command,
    )
