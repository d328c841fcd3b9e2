"""The report of `tilewise compare`: what a `Comparison` looks like as a page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tilewise.bench.cases import BASELINE
from tilewise.bench.comparison import Comparison, Row
from tilewise.bench.report import units
from tilewise.bench.report.charts import Limit, Series, log_chart
from tilewise.bench.report.page import Chart, Figure, Group, Page, Section, Table

AUTO = "auto"


def comparison_page(comparison: Comparison, command: str) -> Page:
    """The page of one run; `command` is what runs it again."""
    sections = [
        _time_and_memory(comparison),
        _exactness_and_rate(comparison),
        _plan(comparison),
        _table(comparison),
        _method(),
    ]
    return Page(
        title="comparison",
        headline=headline(comparison),
        summary=_summary(comparison),
        figures=_figures(comparison),
        sections=sections,
        environment=facts(comparison),
        command=command,
        passed=comparison.passed,
        verdict=verdict(comparison),
    )


def headline(comparison: Comparison) -> str:
    """The conclusion in one sentence, for the longest length."""
    auto, standard = _at_longest(comparison, AUTO), _at_longest(comparison, BASELINE)
    if not comparison.passed:
        over = sorted({row.method for row in comparison.rows if not row.within})
        return f"Not exact here: {', '.join(over)}"
    if auto is None or standard is None or auto.speedup is None:
        return "Exact attention, method by method"
    sentence = f"{units.times(auto.speedup)} the speed of standard attention at {units.length(auto.n)}"
    if auto.peak_bytes and standard.peak_bytes and standard.peak_bytes > auto.peak_bytes:
        sentence += f", in 1/{standard.peak_bytes / auto.peak_bytes:.0f} of its memory"
    return sentence


def verdict(comparison: Comparison) -> str:
    total, good = len(comparison.rows), sum(row.within for row in comparison.rows)
    if good == total:
        return f"all {total} results are within their error budget"
    return f"{total - good} of {total} results exceed their error budget"


def facts(comparison: Comparison) -> dict[str, str]:
    """The environment with names and units for people."""
    environment = dict(comparison.environment)
    rates = comparison.rates
    problem = (
        f"batch {environment.pop('batch')}, {environment.pop('heads')} heads of {environment.pop('head_dim')}, "
        f"{environment.pop('dtype')}, {'causal' if environment.pop('causal') else 'not causal'}"
    )
    text = f"{environment.pop('text')}, {units.size(comparison.environment['text_bytes'])}"  # type: ignore[arg-type]
    for name in ("text_bytes", "matmul_tflops", "copy_gb_per_s"):
        del environment[name]
    shown = {name.replace("_", " "): str(value) for name, value in environment.items()}
    return shown | {
        "problem": problem,
        "text": text,
        "largest matrix product rate": f"{units.significant(rates.matmul / 1e12)} TFLOP/s",
        "largest copy rate": f"{units.significant(rates.copy / 1e9)} GB/s, read and write",
    }


def cells(comparison: Comparison, row: Row) -> dict[str, str]:
    """One row as text by column, what matters most first; "–" for what was not measured."""
    timing = comparison.timings.get((row.method, row.n))

    def shown(value: float | None, text: Callable[[float], str]) -> str:
        return "–" if value is None else text(value)

    return {
        "method": row.method,
        "time": shown(row.ms, units.duration),
        "speed-up": shown(row.speedup, units.times),
        "peak memory": shown(row.peak_bytes, units.size),
        "max error": units.error(row.error),
        "of budget": units.percent(row.error / row.budget) if row.budget else "–",
        "TFLOP/s": shown(row.tflops, units.significant),
        "of roofline": shown(row.roofline, units.percent),
        "fastest–slowest": units.duration_range(timing.least, timing.most) if timing else "–",
        "runs": str(timing.runs) if timing else "–",
        "backend": row.backend,
    }


def _at_longest(comparison: Comparison, method: str) -> Row | None:
    longest = max(comparison.settings.lengths)
    return next((row for row in comparison.rows if row.n == longest and row.method == method), None)


def _summary(comparison: Comparison) -> str:
    methods = len({row.method for row in comparison.rows})
    settings = comparison.settings
    return (
        f"{methods} ways to compute the same attention, on Q, K and V that a small transformer block made from "
        f"{settings.text.name}: {settings.heads} heads of {settings.head_dim}, {settings.dtype_name}. "
        f"Machine: {comparison.environment['machine']}."
    )


def _figures(comparison: Comparison) -> list[Figure]:
    auto, standard = _at_longest(comparison, AUTO), _at_longest(comparison, BASELINE)
    figures: list[Figure] = []
    if auto is None:
        return figures
    at = f"at {units.length(auto.n)}"
    if auto.ms is not None:
        versus = f"standard takes {units.duration(standard.ms)}" if standard and standard.ms else ""
        figures.append(Figure(f"Time {at}", units.duration(auto.ms), versus))
    if auto.peak_bytes is not None:
        versus = f"standard needs {units.size(standard.peak_bytes)}" if standard and standard.peak_bytes else ""
        figures.append(Figure(f"Extra memory {at}", units.size(auto.peak_bytes), versus))
    figures.append(Figure(f"Largest error {at}", units.error(auto.error), f"budget {units.error(auto.budget)}"))
    if auto.roofline is not None and auto.tflops is not None:
        note = f"{units.significant(auto.tflops)} TFLOP/s"
        figures.append(Figure("Of what this machine attains", units.percent(auto.roofline), note))
    return figures


def _series(comparison: Comparison, value: Callable[[Row], float | None]) -> list[Series]:
    series: list[Series] = []
    for name, style in _styles(comparison).items():
        found = [(row.n, value(row)) for row in comparison.rows if row.method == name]
        points = tuple((float(n), y) for n, y in found if y is not None and 0 < y < float("inf"))
        if points:
            series.append(Series(name, points, style, strong=name == AUTO))
    return series


def _styles(comparison: Comparison) -> dict[str, int]:
    """A style for each method, in the order of the rows."""
    return {name: style for style, name in enumerate(dict.fromkeys(row.method for row in comparison.rows))}


def _length(n: float) -> str:
    return f"{n:,.0f}"


def _time_and_memory(comparison: Comparison) -> Section:
    x = {"x_label": "sequence length N", "x_text": _length}
    time = log_chart(
        "Time against sequence length",
        _series(comparison, lambda row: row.ms),
        y_text=units.duration,
        y_tick=partial(units.duration, digits=1),
        **x,
    )
    memory = log_chart(
        "Peak extra memory against sequence length",
        _series(comparison, lambda row: row.peak_bytes),
        y_text=units.size,
        binary=True,
        **x,
    )
    charts = (Chart("Time", time, "median, log scale"), Chart("Extra memory", memory, "peak, log scale"))
    return Section("Time and memory", charts=charts, legend=_styles(comparison))


def _exactness_and_rate(comparison: Comparison) -> Section:
    x = {"x_label": "sequence length N", "x_text": _length}
    budget = Limit("budget", tuple(sorted({(float(row.n), row.budget) for row in comparison.rows})), forbidden=True)
    error = log_chart(
        "Largest error against sequence length",
        _series(comparison, lambda row: row.error),
        y_text=units.error,
        limit=budget,
        **x,
    )
    best = comparison.rates.matmul / 1e12
    ceiling = Limit("largest matrix product", tuple((float(n), best) for n in comparison.settings.lengths))
    rate = log_chart(
        "TFLOP/s against sequence length",
        _series(comparison, lambda row: row.tflops),
        y_text=lambda value: f"{units.significant(value)} TFLOP/s",
        y_tick=partial(units.significant, digits=1),
        limit=ceiling,
        **x,
    )
    return Section(
        "Exactness and rate",
        text=(
            "Every output is compared with one computed in float64. The budget, twice the error of plain standard "
            "attention in the same number format plus one unit in the last place, separates rounding from mistakes.",
        ),
        charts=(Chart("Largest error", error, "log scale"), Chart("Rate", rate, "TFLOP/s, log scale")),
        legend=_styles(comparison),
    )


def _plan(comparison: Comparison) -> Section:
    length, plan = max(comparison.plans.items())
    others = {n: p.backend for n, p in comparison.plans.items() if p.backend != plan.backend}
    text = [f"At {units.length(length)}, auto runs on {plan.backend}: {plan.reason}."]
    if others:
        text.append("Elsewhere: " + ", ".join(f"{backend} at {units.length(n)}" for n, backend in others.items()) + ".")
    return Section(
        "Which backend, and why", text=tuple(text), facts={f"not {name}": why for name, why in plan.rejected.items()}
    )


def _table(comparison: Comparison) -> Section:
    by_length = {
        n: [cells(comparison, row) for row in comparison.rows if row.n == n] for n in comparison.settings.lengths
    }
    columns = tuple(next(iter(by_length.values()))[0])
    table = Table(
        "Medians of interleaved runs; speed-up over standard at the same length.",
        columns,
        tuple(Group(units.length(n), tuple(tuple(row.values()) for row in rows)) for n, rows in by_length.items()),
        text_columns=frozenset({columns.index("method"), columns.index("backend")}),
        marked=frozenset({AUTO}),
    )
    return Section("All measurements", table=table, facts={f"no {k}": why for k, why in comparison.left_out.items()})


def _method() -> Section:
    return Section(
        "How it was measured",
        text=(
            "Error first: a method that exceeds its budget gets no time. Then time: the methods take turns, round "
            "after round, so that a busy moment of the machine hits all of them; the median counts. Then memory: on a "
            "CPU the largest resident set of a process that makes the call, as the system reports it, less that of "
            "the same process without the call; on a GPU the allocator's peak. It includes the result.",
            "TFLOP/s count 4·H·N²·D operations for every method, half that when causal, whatever it really does. The "
            "roofline is the smaller of this machine's best matrix product and its best copy times the operations per "
            "byte of Q, K, V and the output, both measured in this run.",
        ),
    )
