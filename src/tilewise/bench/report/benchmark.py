"""The report of `tilewise bench`: what `Results` look like as rows, a verdict and a page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tilewise.bench.regression import TOLERANCE, Change, Changes
from tilewise.bench.report import units
from tilewise.bench.report.charts import Limit, Series, log_chart
from tilewise.bench.report.page import Chart, Figure, Group, Page, Section, Table
from tilewise.bench.results import Cell, Results

_TEXT_COLUMNS = ("pattern", "backend", "best peer")
_FAMILY = ("pattern", "head_dim", "heads", "kv_heads", "dtype")
"""Cells that differ in length and batch alone share a chart."""


def benchmark_page(results: Results, command: str, changes: Changes | None = None) -> Page:
    """The page of one run; `command` is what runs it again."""
    sections = [section for which in _passes(results) for section in _pass_sections(results, which)]
    if changes is not None:
        sections.insert(0, _changes_section(changes))
    absent = _absences(results)
    if absent:
        sections.append(Section("Who is missing, and why", facts=absent))
    return Page(
        title="benchmark",
        headline=headline(results),
        summary=_summary(results),
        figures=_figures(results),
        sections=[*sections, _method()],
        environment=facts(results),
        command=command,
        passed=results.passed and (changes is None or changes.passed),
        verdict=verdict(results) if changes is None else f"{verdict(results)}; {changes_verdict(changes)}",
    )


def headline(results: Results) -> str:
    """The conclusion in one sentence."""
    ratios = [cell.ratio for cell in results.cells if cell.ratio is not None]
    if not results.passed:
        return f"Not right here: {', '.join(dict.fromkeys(cell.backend for cell in results.cells if cell.wrong))}"
    if not ratios:
        return "tilewise, measured alone"
    ahead = sum(ratio >= 1 for ratio in ratios)
    low, high = units.times(min(ratios)), units.times(max(ratios))
    return f"As fast as the fastest peer or faster in {ahead} of {len(ratios)} cells: {low} to {high} its speed"


def verdict(results: Results) -> str:
    ran = [cell for cell in results.cells if cell.error is not None]
    wrong = sum(cell.wrong for cell in ran)
    if wrong:
        return f"{wrong} of {len(ran)} results exceed their error budget and got no time"
    unfinished = "" if results.complete else "; the run is not finished"
    return f"all {len(ran)} results are within their error budget{unfinished}"


def changes_verdict(changes: Changes) -> str:
    compared, lost = len(changes.changes), len(changes.regressions)
    if not compared:
        return "no cell of the earlier run can be compared"
    if lost:
        return f"{lost} of {compared} cells lost ground to their fastest peer since the earlier run"
    return f"none of {compared} cells lost ground to its fastest peer since the earlier run"


def facts(results: Results) -> dict[str, str]:
    """The environment, settings and ceilings with names and units for people."""
    shown = {name.replace("_", " "): str(value) for name, value in results.environment.items()}
    peers = results.settings["peers"]
    return shown | {
        "rounds": str(results.settings["rounds"]),
        "peers asked for": ", ".join(peers) if peers else "none",
        "largest matrix product rate": f"{units.significant(results.ceilings['matmul_tflops'])} TFLOP/s",
        "largest copy rate": f"{units.significant(results.ceilings['copy_gb_per_s'])} GB/s, read and write",
    }


def cells(cell: Cell) -> dict[str, str]:
    """One cell as text by column, what matters most first; "–" for what was not measured."""
    best = cell.peers.get(cell.best_peer or "")
    return {
        "pattern": str(cell.problem["pattern"]),
        "D": str(cell.problem["head_dim"]),
        "N": f"{cell.problem['length']:,}",
        "backend": backend_name(cell),
        "time": "–" if cell.ms is None else units.duration(cell.ms),
        "TFLOP/s": _rate(cell.tflops),
        "best peer": "–" if cell.best_peer is None else cell.best_peer,
        "its TFLOP/s": _rate(best.tflops if best else None),
        "ratio": "–" if cell.ratio is None else units.times(cell.ratio),
        "of ceiling": "–" if cell.ceiling_share is None else units.percent(cell.ceiling_share),
        "of budget": units.percent(cell.error / cell.budget) if cell.error is not None and cell.budget else "–",
        "peak memory": "–" if cell.peak_bytes is None else units.size(cell.peak_bytes),
        "slowest–fastest": "–" if cell.spread is None else units.duration_range(*cell.spread),
    }


def backend_name(cell: Cell) -> str:
    """ "auto (tiled)", "triton", or "hopper: cannot run this"."""
    if cell.absent is not None:
        return f"{cell.backend}: cannot"
    return cell.backend if cell.ran_on in (None, cell.backend) else f"{cell.backend} ({cell.ran_on})"


def change_row(change: Change) -> dict[str, str]:
    """One change as text by column."""
    return {
        "case": change.cell.case,
        "pass": change.cell.which,
        "backend": change.cell.backend,
        "ratio then": units.times(change.then),
        "ratio now": units.times(change.now),
        "change": f"{change.relative:+.1%}".replace("%", f"{units.SPACE}%"),
        "verdict": "regressed" if change.regressed else "within the spread or better",
    }


def _rate(tflops: float | None) -> str:
    return "–" if tflops is None else units.significant(tflops)


def _passes(results: Results) -> list[str]:
    return list(dict.fromkeys(cell.which for cell in results.cells))


def _summary(results: Results) -> str:
    cases = len({cell.case for cell in results.cells})
    machine = results.environment["machine"]
    return (
        f"{cases} cases on {machine}, every contender in the same rounds. A ratio is the fastest peer's time over "
        "tilewise's: above 1 tilewise is faster."
    )


def _figures(results: Results) -> list[Figure]:
    figures: list[Figure] = []
    for which in _passes(results):
        timed = [cell for cell in results.cells if cell.which == which and cell.tflops is not None]
        if not timed:
            continue
        fastest = max(timed, key=lambda cell: cell.tflops or 0.0)
        share = f", {units.percent(fastest.ceiling_share)} of the ceiling" if fastest.ceiling_share else ""
        title = f"Highest rate, {which}"
        figures.append(Figure(title, f"{_rate(fastest.tflops)} TFLOP/s", f"{_short(fastest)}{share}"))
        rated = [cell for cell in timed if cell.ratio is not None]
        if rated:
            best = max(rated, key=lambda cell: cell.ratio or 0.0)
            note = f"{best.best_peer}'s, {_short(best)}"
            figures.append(Figure(f"Best ratio, {which}", units.times(best.ratio or 0.0), note))
    return figures


def _short(cell: Cell) -> str:
    return f"{cell.problem['pattern']}, D = {cell.problem['head_dim']}, {units.length(cell.problem['length'])}"


def _pass_sections(results: Results, which: str) -> list[Section]:
    chosen = [cell for cell in results.cells if cell.which == which]
    styles = _styles(results)
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in chosen:
        groups.setdefault(tuple(cell.problem[name] for name in _FAMILY), []).append(cell)
    families = [found for found in groups.values() if len({cell.problem["length"] for cell in found}) > 1]
    drawn = {name: style for name, style in styles.items() if any(_in_sight(found, name) for found in families)}
    charts = tuple(_chart(results, which, found, drawn) for found in families)
    sections: list[Section] = []
    if charts:
        slower = [name for name in styles if name not in drawn and any(_point(cell, name) for cell in chosen)]
        text = (f"Below a tenth of the fastest, so not drawn: {', '.join(slower)}.",) if slower else ()
        sections.append(Section(f"TFLOP/s by length, {which}", text=text, charts=charts, legend=drawn))
    rows = [cells(cell) for cell in chosen]
    columns = tuple(rows[0])
    table = Table(
        "Medians of interleaved rounds; the ratio is the best peer's time over ours.",
        columns,
        (Group("", tuple(tuple(row.values()) for row in rows)),),
        text_columns=frozenset(columns.index(name) for name in _TEXT_COLUMNS),
    )
    return [*sections, Section(f"All measurements, {which}", table=table), _peer_section(chosen, which)]


def _peer_section(chosen: Sequence[Cell], which: str) -> Section:
    """Every contender's rate beside every other's."""
    names = list(dict.fromkeys(name for cell in chosen for name, peer in cell.peers.items() if peer.ms is not None))
    backends = list(dict.fromkeys(cell.backend for cell in chosen))
    rows: dict[str, dict[str, str]] = {}
    for cell in chosen:
        row = rows.setdefault(cell.case, {"case": cell.case})
        row |= {name: _rate(cell.peers[name].tflops) if name in cell.peers else "–" for name in names}
        row[cell.backend] = _rate(cell.tflops)
    columns = ("case", *backends, *names)
    table = Table(
        "TFLOP/s; a gap means that the contender could not run that case, or was wrong.",
        columns,
        (Group("", tuple(tuple(row.get(name, "–") for name in columns) for row in rows.values())),),
    )
    return Section(f"Side by side, {which}", table=table)


def _styles(results: Results) -> dict[str, int]:
    """A style for each contender, ours first."""
    backends = dict.fromkeys(cell.backend for cell in results.cells)
    peers = dict.fromkeys(name for cell in results.cells for name, peer in cell.peers.items() if peer.ms is not None)
    return {name: style for style, name in enumerate([*backends, *peers])}


def _point(cell: Cell, name: str) -> tuple[float, float] | None:
    """(N, TFLOP/s) of a contender in a cell of its own, or of a peer in any."""
    tflops = cell.tflops if name == cell.backend else cell.peers[name].tflops if name in cell.peers else None
    return None if tflops is None else (float(cell.problem["length"]), tflops)


def _points(found: Sequence[Cell], name: str) -> tuple[tuple[float, float], ...]:
    return tuple(sorted(dict(point for point in (_point(cell, name) for cell in found) if point is not None).items()))


def _in_sight(found: Sequence[Cell], name: str) -> bool:
    """Whether a contender comes within a factor of ten of the fastest: a slower one would flatten all other lines."""
    rates = {other: max((y for _, y in _points(found, other)), default=0.0) for other in _contenders(found)}
    return rates.get(name, 0.0) > max(rates.values(), default=0.0) / 10


def _contenders(found: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys([*(cell.backend for cell in found), *(name for cell in found for name in cell.peers)]))


def _chart(results: Results, which: str, found: Sequence[Cell], styles: dict[str, int]) -> Chart:
    backends = {cell.backend for cell in results.cells}
    lines = {name: _points(found, name) for name in styles}
    series = [Series(name, points, styles[name], strong=name in backends) for name, points in lines.items() if points]
    ceiling = results.ceilings["matmul_tflops"]
    lengths = sorted({float(cell.problem["length"]) for cell in found})
    problem = found[0].problem
    shared = problem["heads"] // problem["kv_heads"]
    title = f"{problem['pattern']}, D = {problem['head_dim']}" + (f", {shared} heads share one" if shared > 1 else "")
    svg = log_chart(
        f"TFLOP/s against sequence length, {which}, {title}",
        series,
        x_label="sequence length N",
        x_text=lambda n: f"{n:,.0f}",
        y_text=lambda value: f"{units.significant(value)} TFLOP/s",
        y_tick=partial(units.significant, digits=1),
        limit=Limit("largest matrix product", tuple((n, ceiling) for n in lengths)) if series else None,
    )
    return Chart(title[0].upper() + title[1:], svg, "TFLOP/s, log scale")


def _changes_section(changes: Changes) -> Section:
    rows = [change_row(change) for change in sorted(changes.changes, key=lambda change: change.relative)]
    table = None
    if rows:
        columns = tuple(rows[0])
        left = frozenset(columns.index(name) for name in ("case", "pass", "backend", "verdict"))
        group = Group("", tuple(tuple(row.values()) for row in rows))
        table = Table("Ratios to the fastest peer that both runs timed.", columns, (group,), text_columns=left)
    text = (
        "A cell has regressed when the new ratio's whole range, from the slowest to the fastest round of both sides, "
        f"lies below the earlier one's, and the ratio fell by more than {TOLERANCE:.0%}.".replace(
            "%", f"{units.SPACE}%"
        ),
    )
    reasons: dict[str, list[str]] = {}
    for cell, reason in changes.left_out.items():
        reasons.setdefault(reason, []).append(cell)
    facts = {reason[0].upper() + reason[1:]: "; ".join(named) for reason, named in reasons.items()}
    return Section("Against the earlier run", text=text, table=table, facts=facts)


def _absences(results: Results) -> dict[str, str]:
    """Each reason once, with how many cells it holds for."""
    count: dict[tuple[str, str], list[Cell]] = {}
    for cell in results.cells:
        named = {cell.backend: cell.absent} | {name: peer.absent for name, peer in cell.peers.items()}
        for name, reason in named.items():
            if reason:
                count.setdefault((name, reason), []).append(cell)
    shown: dict[str, str] = {}
    for (name, reason), found in count.items():
        total = sum(name == cell.backend or name in cell.peers for cell in results.cells)
        cases = list(dict.fromkeys(f"{cell.problem['pattern']} D = {cell.problem['head_dim']}" for cell in found))
        where = "everywhere" if len(found) == total else ", ".join(cases)
        passes = dict.fromkeys(cell.which for cell in found)
        only = f", {next(iter(passes))} only" if len(passes) == 1 and len(_passes(results)) > 1 else ""
        label = f"{name} ({where}{only})"
        shown[label] = f"{shown[label]}; {reason}" if label in shown else reason
    return shown


def _method() -> Section:
    return Section(
        "How it was measured",
        text=(
            "Right first: output and gradients are compared with float64 attention, each 128 rows against a budget of "
            "their own that follows from the error of standard attention in the same number format. A contender that "
            "exceeds it gets no time.",
            "Then time: in every round the contenders take turns in a new order, each for at least 20 ms that count; "
            "on a GPU after 60 ms that do not, which its clock needs to settle, and with the inputs out of its L2 "
            "cache. A round counts with its median, a cell with the median of its rounds. Forward is the forward of a "
            "training step, backward is the backward alone.",
            "TFLOP/s count 4·B·H·N²·D operations forward, half that when causal, only what is seen under a window or "
            "blocks, and 2.5 times as many backward, for every contender alike. The ceiling is the smaller of this "
            "machine's best matrix product and its best copy times the operations per byte, both measured in this run.",
        ),
    )
