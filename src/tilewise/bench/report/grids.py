"""Plain tables of text as a report: what `cost`, `predict`, `advise` and `profile` write."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tilewise.bench.report.page import Group, Page, Section, Table
from tilewise.cost.tables import Grid

COMPUTED = "Computed from sizes alone; nothing was run. 1 KB = 1024 bytes."


def grid_section(grid: Grid) -> Section:
    """A section that holds one table, under the first part of its title; columns of words are aligned left."""
    title, _, caption = re.sub("[.;] ", "\n", grid.title, count=1).partition("\n")
    return Section(title, table=Table(caption, grid.columns, (Group("", grid.rows),), text_columns=grid.text_columns))


def grids_page(title: str, grids: Sequence[Grid], command: str, *, headline: str = "", summary: str = COMPUTED) -> Page:
    """A page of tables; `summary` says where their figures come from."""
    return Page(
        title=title,
        headline=headline or "What attention costs",
        summary=summary,
        figures=(),
        sections=[grid_section(grid) for grid in grids],
        environment={},
        command=command,
    )
