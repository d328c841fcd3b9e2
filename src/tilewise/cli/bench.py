"""`tilewise bench`: tilewise beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilewise.bench.suites import PASSES, SUITES, Case, select
from tilewise.cli import FAILED, INTERRUPTED, OK
from tilewise.cli.output import OutputFile, PositiveIntegers, command_line, console, pick_device, print_json, progress

if TYPE_CHECKING:
    import torch

    from tilewise.bench.benchmark import Settings
    from tilewise.bench.regression import Changes
    from tilewise.bench.results import Results

STDOUT = "-"
_DTYPES = ("float32", "float16", "bfloat16")
_COLUMNS = (
    "pattern",
    "D",
    "N",
    "backend",
    "time",
    "TFLOP/s",
    "best peer",
    "ratio",
    "of ceiling",
    "of budget",
)
_NARROW_COLUMNS = ("pattern", "D", "N", "backend", "time", "ratio", "best peer")
_LEFT = ("pattern", "backend", "best peer")
_WIDE = 116


class _Names(click.ParamType):
    """A list such as flash,cudnn; "all" and "none" stand alone."""

    name = "NAME,NAME,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(part.strip() for part in str(value).split(",") if part.strip()))


@click.command(
    short_help="tilewise beside its peers: correctness, speed, memory.",
    epilog="Suites: " + "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items()) + ".",
)
@click.option(
    "--suite",
    "suites",
    type=click.Choice(tuple(SUITES)),
    multiple=True,
    help="May be repeated.  [default: dense on a GPU, quick on a CPU]",
)
@click.option("--head-dim", "head_dims", type=PositiveIntegers(), default=(), help="Instead of the suite's own.")
@click.option("--length", "lengths", type=PositiveIntegers(), default=(), help="Instead of the suite's own.")
@click.option("--causal/--full", "causal", default=None, help="Only cases that are, or are not, causal.")
@click.option("--forward", "forward_only", is_flag=True, help="Only the forward.  [default: both]")
@click.option("--backward", "backward_only", is_flag=True, help="Only the backward.")
@click.option(
    "--dtype",
    type=click.Choice(("auto", *_DTYPES)),
    default="auto",
    help="[default: float32 on a CPU, bfloat16 on a GPU]",
)
@click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", help="[default: the GPU if there is one]"
)
@click.option(
    "--backend", "backends", multiple=True, default=("auto",), show_default=True, help="Of tilewise; may be repeated."
)
@click.option("--peers", type=_Names(), default=("all",), help="Whom to compare with; all or none.  [default: all]")
@click.option("--rounds", type=click.IntRange(5), default=5, show_default=True, help="Timed rounds; the median counts.")
@click.option(
    "--json",
    "json_file",
    type=OutputFile(allow_dash=True),
    is_flag=False,
    flag_value=Path(STDOUT),
    help="Where the results go as they come; - or nothing prints them instead of a table.",
)
@click.option("--report", "--html", "report", type=OutputFile(), help="Also write a self-contained HTML page here.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Results of an earlier run: show what changed, exit with 1 if it got slower.",
)
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Keep the cells in the --json file, or measure all anew.  [default: go on where a run was interrupted]",
)
@click.option("--list", "list_only", is_flag=True, help="Show the cells and measure nothing.")
def bench(
    suites: tuple[str, ...],
    head_dims: tuple[int, ...],
    lengths: tuple[int, ...],
    causal: bool | None,
    forward_only: bool,
    backward_only: bool,
    dtype: str,
    device: str,
    backends: tuple[str, ...],
    peers: tuple[str, ...],
    rounds: int,
    json_file: Path | None,
    report: Path | None,
    against: Path | None,
    resume: bool | None,
    list_only: bool,
) -> int:
    """Time attention beside PyTorch's kernels, FlexAttention and others, in the same rounds.

    Every result, and every gradient, is checked against float64 before it is timed. Exits with 1 if one of tilewise's
    exceeds its error budget, or lost ground against an earlier run. Ctrl-C keeps the finished cells in the --json file;
    the same command goes on from there.
    """
    where = pick_device(device)
    kind = dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32"
    named = suites or (("dense",) if where.type == "cuda" else ("quick",))
    try:
        cases = select(named, kind, head_dims=head_dims, lengths=lengths, causal=causal)
    except ValueError as problem:
        raise click.UsageError(str(problem), click.get_current_context()) from problem
    passes = tuple(which for which in PASSES if forward_only == backward_only or (which == "forward") == forward_only)
    if not cases:
        raise click.UsageError("no case of these suites is left", click.get_current_context())
    if list_only:
        _list(cases, passes, backends, as_json=json_file is not None)
        return OK
    return _run(_settings(cases, where, passes, backends, peers, rounds), json_file, report, against, resume)


def _settings(
    cases: list[Case],
    device: torch.device,
    passes: tuple[str, ...],
    backends: tuple[str, ...],
    peers: tuple[str, ...],
    rounds: int,
) -> Settings:
    from tilewise.bench.benchmark import Settings, peers_for

    chosen = peers
    if peers == ("all",):
        chosen = peers_for(device)
    elif peers == ("none",):
        chosen = ()
    return Settings(
        tuple(cases), device, passes, tuple(dict.fromkeys(backends)), chosen, rounds, ahead=device.type == "cuda"
    )


def _run(
    settings: Settings, json_file: Path | None, report: Path | None, against: Path | None, resume: bool | None
) -> int:
    from tilewise.bench.benchmark import begin, run
    from tilewise.bench.regression import compare_runs
    from tilewise.bench.report.benchmark import benchmark_page
    from tilewise.bench.report.page import write as write_page
    from tilewise.bench.results import finite, read, write

    kept = json_file if json_file is not None and str(json_file) != STDOUT else None
    try:
        start = begin(settings)
        earlier = read(against) if against is not None else None
        so_far = _resumed(kept, resume, start)
    except ValueError as problem:
        raise click.UsageError(str(problem), click.get_current_context()) from problem
    latest = so_far

    def save(results: Results) -> None:
        nonlocal latest
        latest = results
        if kept is not None:
            write(results, kept)

    try:
        with progress("benchmark") as told:
            results = run(settings, so_far, told, save)
    except KeyboardInterrupt:
        where = f"are in {kept}: the same command goes on from there" if kept else "are lost: there was no --json file"
        click.echo(f"tilewise bench: interrupted; {len(latest.cells)} finished cells {where}", err=True)
        return INTERRUPTED
    changes = compare_runs(results, earlier) if earlier is not None else None
    if report is not None:
        write_page(benchmark_page(results, command_line(), changes), report)
    if json_file is not None and kept is None:
        print_json(finite(results.as_dict()))
    else:
        _print(results, changes, [file for file in (kept, report) if file is not None])
    return OK if results.passed and (changes is None or changes.passed) else FAILED


def _resumed(path: Path | None, resume: bool | None, start: Results) -> Results:
    """What the file holds, where it is to be continued; else `start`.

    Raises:
        ValueError: it holds no results, or those of another machine, version or setting.
    """
    from tilewise.bench.results import read
    from tilewise.errors import bad_value

    if path is None or resume is False or not path.exists():
        return start
    found = read(path)
    if found.complete and resume is None:
        return start
    for now, then in ((start.environment, found.environment), (start.settings, found.settings)):
        differing = [name for name in now if name != "date" and now[name] != then.get(name)]
        if differing:
            what = ", ".join(f"{name} {then.get(name)!r}" for name in differing)
            fix = "--no-resume measures all anew"
            raise bad_value("--json", f"{str(path)!r}, measured with {what}", "results like those of this run", fix)
    return found


def _list(cases: list[Case], passes: tuple[str, ...], backends: tuple[str, ...], *, as_json: bool) -> None:
    cells = [
        {"case": case.name, "pass": which, "backend": backend, "gflop": case.flops(which) / 1e9}
        for case in cases
        for which in passes
        for backend in backends
    ]
    if as_json:
        print_json(cells)
        return
    for cell in cells:
        click.echo(f"{cell['case']:<54} {cell['pass']:<9} {cell['backend']:<9} {cell['gflop']:>10,.1f} GFLOP")


def _print(results: Results, changes: Changes | None, files: list[Path]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from tilewise.bench.report.benchmark import cells, change_row, changes_verdict, facts, headline, verdict

    out = console()
    columns = _COLUMNS if out.width >= _WIDE else _NARROW_COLUMNS
    shown = facts(results)
    for which in dict.fromkeys(cell.which for cell in results.cells):
        title = f"{shown['machine']}: {which}, {results.settings['rounds']} rounds"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in columns:
            table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
        for cell in (cell for cell in results.cells if cell.which == which):
            texts = cells(cell)
            style = "red" if cell.wrong else "dim" if cell.absent else None
            table.add_row(*(texts[name] for name in columns), style=style)
        out.print(table)
    for reason in dict.fromkeys(f"{cell.backend}: {cell.absent}" for cell in results.cells if cell.absent):
        out.print(reason, style="dim")
    for cell in results.cells:
        if cell.wrong:
            out.print(f"wrong: {cell.case}, {cell.which}, {cell.backend}: {cell.where}", style="red")
    ceilings = (shown["largest matrix product rate"], shown["largest copy rate"])
    out.print(f"ceilings: {ceilings[0]}, {ceilings[1]}")
    if changes is not None:
        for change in changes.changes:
            row = change_row(change)
            line = f"{row['case']}, {row['pass']}, {row['backend']}: {row['ratio then']} → {row['ratio now']}"
            out.print(f"{line} ({row['change']}) {row['verdict']}", style="red" if change.regressed else None)
        out.print(changes_verdict(changes))
    out.print(headline(results), style="bold")
    out.print(verdict(results))
    for file in files:
        out.print(f"written: {file}")
