"""The lab's machinery: find the lessons, read their percent format, run them, join them into one HTML book.

A lesson is a plain Python script. It imports the shipped code and, from here, `show` for pictures, `pick` for sizes,
`expect` for claims about time and `measured` for what it found; as a script, in a notebook and in the book it is
the same file.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

T = TypeVar("T")

BUSY = 0.6
"""Load a core from which claims about time are not asserted; a lesson alone brings about half of that."""

_CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a percent-format script; `line` is where its text begins."""

    kind: Literal["markdown", "code"]
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class Lesson:
    """One lesson, by number; the title is its first heading."""

    number: str
    title: str
    path: Path

    def cells(self) -> list[Cell]:
        return cells_of(self.path.read_text(encoding="utf-8"))


@dataclass(slots=True)
class Shown:
    """A cell with what it printed and drew."""

    cell: Cell
    text: str = ""
    pictures: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """A lesson that ran, to its end or to its error."""

    lesson: Lesson
    shown: tuple[Shown, ...]
    seconds: float
    facts: dict[str, str]
    """What it measured, by its own last words."""
    error: str = ""


class _Stage:
    """Where `show` and `measured` go while a lesson is run by `run_lesson`; outside of that they go to the terminal."""

    def __init__(self) -> None:
        self.pictures: list[tuple[str, str]] | None = None
        self.facts: dict[str, str] | None = None


_stage = _Stage()


def pick(tiny: T, full: T) -> T:
    """The size to run at: `full` where there is a GPU, else `tiny`, which suits two CPU cores."""
    import torch

    return full if torch.cuda.is_available() else tiny


def show(picture: str, title: str) -> None:
    """Shows an SVG or a piece of HTML: in the book or a notebook as such, in a terminal as a line that names it."""
    if _stage.pictures is not None:
        _stage.pictures.append((title, picture))
        return
    if hasattr(builtins, "__IPYTHON__"):
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        display(HTML(f"<style>{_notebook_style()}</style><figure><figcaption>{title}</figcaption>{picture}</figure>"))
        return
    print(f"[picture: {title}; `tilewise lab book` shows it]")  # noqa: T201 - this is a lesson's voice


def expect(condition: bool, claim: str) -> None:
    """Asserts a claim about *time* where that means something: on a GPU, and on a CPU that nobody else is using.

    Elsewhere it says whether the claim held, and goes on. Raises AssertionError with the claim.
    """
    import torch

    from tilewise.bench.environment import usable_cores

    load = os.getloadavg()[0] / usable_cores() if hasattr(os, "getloadavg") else 0.0
    if condition or (load > BUSY and not torch.cuda.is_available()):
        held = "" if condition else f" NOT seen under a load of {load:.1f} a core:"
        print(f"Claim:{held} {claim}")  # noqa: T201 - a lesson's voice
        return
    raise AssertionError(claim)


def measured(**facts: str) -> None:
    """What a lesson found, at its end: printed, and kept for the book and `tilewise lab run --json`."""
    if _stage.facts is not None:
        _stage.facts |= facts
    print("Measured here:")  # noqa: T201 - this is a lesson's voice
    for name, value in facts.items():
        print(f"  {name.replace('_', ' ')}: {value}")  # noqa: T201


def _notebook_style() -> str:
    return Path(__file__).parent.joinpath("report", "style.css").read_text(encoding="utf-8").partition("* {")[0]


def folder() -> Path:
    """Where the lessons are: within the installed package, or beside the sources.

    Raises FileNotFoundError where they are in neither place.
    """
    package = Path(__file__).parents[1]
    for candidate in (package / "labs", package.parents[1] / "labs"):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError("the lessons are not part of this installation; they lie in labs/ of the project")


def lessons() -> list[Lesson]:
    """Every lesson, in order. Raises FileNotFoundError where there are none."""
    found: list[Lesson] = []
    for path in sorted(folder().glob("[0-9][0-9]_*.py")):
        heading = re.search(r"^# # (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        title = heading[1] if heading else path.stem
        found.append(Lesson(path.name[:2], title.partition(" ")[2] if title[:2].isdigit() else title, path))
    return found


def cells_of(text: str) -> list[Cell]:
    """The cells of a percent-format script; what stands before the first mark is left out."""
    marks = list(_CELL.finditer(text))
    cells: list[Cell] = []
    for index, mark in enumerate(marks):
        stop = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        body = text[mark.end() + 1 : stop]
        source = body.strip("\n")
        line = text[: mark.end() + 1].count("\n") + len(body) - len(body.lstrip("\n")) + 1
        if "[markdown]" in mark[1]:
            source = "\n".join(re.sub(r"^# ?", "", row) for row in source.splitlines())
            cells.append(Cell("markdown", source, line))
        elif source.strip():
            cells.append(Cell("code", source, line))
    return cells


def run_lesson(lesson: Lesson, told: Callable[[str], object] = lambda text: None) -> Run:
    """Runs a lesson cell by cell in a namespace of its own; an exception ends it and is kept as its error."""
    shown: list[Shown] = []
    facts: dict[str, str] = {}
    names: dict[str, object] = {"__name__": "__lesson__", "__file__": str(lesson.path)}
    error = ""
    begun = time.perf_counter()
    for cell in lesson.cells():
        result = Shown(cell)
        shown.append(result)
        if cell.kind == "markdown":
            continue
        output = io.StringIO()
        with _on_stage(result.pictures, facts), contextlib.redirect_stdout(output):
            try:
                code = compile("\n" * (cell.line - 1) + cell.source, str(lesson.path), "exec")
                exec(code, names)  # noqa: S102 - running the lessons is what this is for
            except ModuleNotFoundError as missing:
                error = f"this lesson needs {missing.name}: pip install 'tilewise[labs]'"
            except Exception:  # noqa: BLE001 - whatever a lesson raises is its result, and is shown
                error = traceback.format_exc(limit=-2)
        result.text = output.getvalue()
        told(result.text)
        if error:
            break
    return Run(lesson, tuple(shown), time.perf_counter() - begun, facts, error)


@contextlib.contextmanager
def _on_stage(pictures: list[tuple[str, str]], facts: dict[str, str]) -> Iterator[None]:
    _stage.pictures, _stage.facts = pictures, facts
    try:
        yield
    finally:
        _stage.pictures = _stage.facts = None
