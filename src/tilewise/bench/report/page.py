"""A report as values, and the one function that turns it into a self-contained HTML page.

Every command that draws something builds a `Page`; nothing but this file and its template knows HTML.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tilewise.bench.report.charts import swatch


@dataclass(frozen=True)
class Figure:
    """One number worth seeing first, with what it is and what it is compared with."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawn chart (`log_chart`) under its title."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Table rows that belong together; `rows` are cells in column order, text already formatted."""

    title: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Table:
    """`caption` may be empty; `text_columns` are aligned left, all others right; rows that begin as one of `marked` do
    stand out."""

    caption: str
    columns: tuple[str, ...]
    groups: tuple[Group, ...]
    text_columns: frozenset[int] = frozenset({0})
    marked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Section:
    """A titled part: paragraphs, charts with one shared legend (name → style), a table, facts; each may be empty."""

    title: str
    text: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    legend: Mapping[str, int] = field(default_factory=dict)
    table: Table | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A whole report. `passed` is None where the command checks nothing."""

    title: str
    headline: str
    summary: str
    figures: Sequence[Figure]
    sections: Sequence[Section]
    environment: Mapping[str, str]
    command: str
    passed: bool | None = None
    verdict: str = ""


def render(page: Page) -> str:
    """The page as one HTML document that loads nothing: style and drawings are inside it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tilewise.bench.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(page=page, swatch=swatch)


def write(page: Page, path: Path) -> None:
    """Renders to `path`, as `write_whole` does.

    Raises:
        OSError: the folder is missing or not writable.
    """
    write_whole(render(page), path)


def write_whole(text: str, path: Path) -> None:
    """Writes a file in one step: whoever reads or interrupts finds the old file or the new one.

    Raises:
        OSError: the folder is missing or not writable.
    """
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
