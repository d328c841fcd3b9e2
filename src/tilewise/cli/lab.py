"""`tilewise lab`: list the lessons, run them, turn them into notebooks, or into one HTML book."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilewise.cli import FAILED, OK
from tilewise.cli.grids import print_grid
from tilewise.cli.output import OutputFile, console, json_option, print_json, progress
from tilewise.cost.tables import Grid

if TYPE_CHECKING:
    from tilewise.bench.lab import Lesson, Run

PATH_FILE, GLOSSARY_FILE = "learning_path.md", "glossary.md"


@click.group(invoke_without_command=True, short_help="The lessons: list, run, notebooks, one HTML book.")
@json_option
@click.pass_context
def lab(context: click.Context, as_json: bool) -> int:
    """Lessons on attention that run on this machine, from the online softmax to sparse patterns.

    Without a command, lists them.
    """
    return context.invoke(list_lessons, as_json=as_json) if context.invoked_subcommand is None else OK


@lab.command("list")
@json_option
def list_lessons(as_json: bool = False) -> int:
    """The lessons and what each is about."""
    found = _lessons()
    if as_json:
        print_json([{"number": lesson.number, "title": lesson.title, "file": lesson.path.name} for lesson in found])
    else:
        print_grid(Grid("Lessons", ("", "title"), tuple((lesson.number, lesson.title) for lesson in found)))
        console().print("tilewise lab run 00 · tilewise lab book · tilewise lab notebooks", style="dim")
    return OK


@lab.command()
@click.argument("numbers", nargs=-1)
@json_option
def run(numbers: tuple[str, ...], as_json: bool) -> int:
    """Run lessons by NUMBER (all of them without one) and print what they say.

    Exits with 1 if a lesson's own assertions do not hold here.
    """
    from tilewise.bench.lab import run_lesson

    runs: list[Run] = []
    for lesson in _chosen(numbers):
        if not as_json:
            console().print(f"{lesson.number} {lesson.title}", style="bold")
        done = run_lesson(lesson, (lambda text: None) if as_json else _print_text)
        runs.append(done)
        if not as_json:
            console().print(f"{done.seconds:.1f} s", style="dim")
        if done.error:
            click.echo(done.error, err=True)
    if as_json:
        print_json(
            [{"lesson": r.lesson.number, "seconds": r.seconds, "measured": r.facts, "error": r.error} for r in runs]
        )
    return FAILED if any(done.error for done in runs) else OK


@lab.command()
@click.argument("numbers", nargs=-1)
@click.option(
    "--output",
    type=OutputFile(),
    default="tilewise-lab.html",
    show_default=True,
    help="Where the book goes.",
)
@json_option
def book(numbers: tuple[str, ...], output: Path, as_json: bool) -> int:
    """Run lessons and write them, with all they print and draw, as one self-contained HTML file."""
    missing = [name for name in ("markdown_it", "pygments") if find_spec(name) is None]
    if missing:
        raise click.UsageError(f"the book needs {', '.join(missing)}; install the extra: pip install 'tilewise[cli]'")
    import torch

    from tilewise.bench.environment import environment
    from tilewise.bench.lab import folder, run_lesson
    from tilewise.bench.report.book import book as book_of
    from tilewise.bench.report.page import write_whole

    chosen = _chosen(numbers)
    runs: list[Run] = []
    with progress("running the lessons") as told:
        for index, lesson in enumerate(chosen):
            told(f"{lesson.number} {lesson.title}", index / len(chosen))
            runs.append(run_lesson(lesson))
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {name: str(value) for name, value in environment(where).items()}
    texts = [(folder() / name).read_text(encoding="utf-8") for name in (PATH_FILE, GLOSSARY_FILE)]
    write_whole(book_of(runs, texts[0], texts[1], facts), output)
    failed = [done.lesson.number for done in runs if done.error]
    if as_json:
        print_json({"book": str(output), "lessons": [r.lesson.number for r in runs], "failed": failed})
    else:
        click.echo(f"book: {output}" + (f"; stopped early: {', '.join(failed)}" if failed else ""))
    return FAILED if failed else OK


@lab.command()
@click.argument("numbers", nargs=-1)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="tilewise-notebooks",
    show_default=True,
    help="The folder for them; made if it does not exist.",
)
@json_option
def notebooks(numbers: tuple[str, ...], output: Path, as_json: bool) -> int:
    """Convert lessons to Jupyter notebooks."""
    if find_spec("jupytext") is None:
        raise click.UsageError("notebooks need jupytext; install the extra: pip install 'tilewise[labs]'")
    import jupytext  # pyright: ignore[reportMissingImports]

    written: list[str] = []
    output.mkdir(parents=True, exist_ok=True)
    for lesson in _chosen(numbers):
        target = output / lesson.path.with_suffix(".ipynb").name
        jupytext.write(jupytext.read(lesson.path, fmt="py:percent"), target)
        written.append(str(target))
    if as_json:
        print_json({"notebooks": written})
    else:
        click.echo("\n".join(written))
    return OK


def _lessons() -> list[Lesson]:
    from tilewise.bench.lab import lessons

    try:
        return lessons()
    except FileNotFoundError as problem:
        raise click.ClickException(str(problem)) from problem


def _chosen(numbers: tuple[str, ...]) -> list[Lesson]:
    found = {lesson.number: lesson for lesson in _lessons()}
    unknown = [number for number in numbers if number not in found]
    if unknown:
        raise click.BadParameter(f"no lesson {', '.join(unknown)}; there are {', '.join(found)}", param_hint="NUMBERS")
    return [found[number] for number in numbers] if numbers else list(found.values())


def _print_text(text: str) -> None:
    if text:
        click.echo(text, nl=False)
