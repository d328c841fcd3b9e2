"""The report of `tilewise bench` is one well-formed document that says what the results say."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import CASES, sample, timed_cell, wrong
from test_page import Document

from tilewise.bench.regression import compare_runs
from tilewise.bench.report import units
from tilewise.bench.report.benchmark import benchmark_page, cells, changes_verdict, headline, verdict
from tilewise.bench.report.page import render
from tilewise.bench.results import Cell, Results

COMMAND = "tilewise bench --html 'a b.html'"


def html_of(results: Results, *against: Results) -> str:
    changes = compare_runs(results, *against) if against else None
    return render(benchmark_page(results, COMMAND, changes))


def test_every_cell_and_every_contender_is_there() -> None:
    results = sample()
    document = Document(html_of(results))
    shown = set(document.texts["td"])
    for cell in results.cells:
        assert set(list(cells(cell).values())[1:]) <= shown
    assert {"auto", "flash", "cudnn", "math"} <= set(document.texts["th"])
    assert "not today" in document.texts["dd"]
    assert COMMAND in document.texts["code"]
    assert "800 TFLOP/s" in document.texts["dd"]


def test_a_chart_per_family_and_pass() -> None:
    document = Document(html_of(sample()))
    labels = [value for tag, name, value in document.attributes if tag == "svg" and name == "aria-label"]
    families = {(case.pattern, case.head_dim) for case in CASES}
    assert len(labels) == len(set(labels)) == 2 * len(families)
    assert "TFLOP/s against sequence length, backward, causal, D = 128" in labels


def test_what_is_far_slower_is_not_drawn_but_listed() -> None:
    document = Document(html_of(sample()))
    assert any("not drawn: math" in text for text in document.texts["p"])
    assert "math" not in document.texts["li"]
    assert "30.0" in document.texts["td"]


def test_one_length_makes_a_table_and_no_chart() -> None:
    document = Document(html_of(sample(timed_cell(CASES[0], "forward"))))
    assert not [name for tag, name, _ in document.attributes if tag == "svg" and name == "aria-label"]


def test_the_headline_counts_cells() -> None:
    slower = timed_cell(CASES[0], "forward", speed=0.8)
    results = sample(slower, timed_cell(CASES[1], "forward", speed=1.25))
    said = headline(results).replace(units.SPACE, " ")
    assert said == "As fast as the fastest peer or faster in 1 of 2 cells: 0.800× to 1.25× its speed"
    assert verdict(results) == "all 2 results are within their error budget"
    alone = replace(slower, ratio=None, best_peer=None, peers={})
    assert headline(sample(alone)) == "tilewise, measured alone"
    assert "not finished" in verdict(replace(results, complete=False))


def test_a_wrong_result_is_the_headline() -> None:
    results = sample(wrong(timed_cell(CASES[0], "forward")), timed_cell(CASES[1], "forward"))
    assert headline(results) == "Not right here: auto"
    assert verdict(results) == "1 of 2 results exceed their error budget and got no time"
    assert "✗" in html_of(results)


def test_a_backend_that_cannot_run_says_why() -> None:
    absent = Cell(CASES[0].name, "forward", "hopper", CASES[0].as_dict(), absent="needs an sm_90 <GPU>")
    document = Document(html_of(sample(absent, timed_cell(CASES[0], "forward"))))
    assert "needs an sm_90 <GPU>" in document.texts["dd"]
    assert "hopper: cannot" in document.texts["td"]


def test_changes_come_first_and_name_regressions() -> None:
    then, now = sample(timed_cell(CASES[0], "forward")), sample(timed_cell(CASES[0], "forward", speed=1.0))
    document = Document(html_of(now, then))
    assert document.texts["h2"][0] == "Against the earlier run"
    assert "regressed" in document.texts["td"]
    assert "−16.7 %".replace("−", "-").replace(" ", units.SPACE) in document.texts["td"]
    assert "1 of 1 cells lost ground" in changes_verdict(compare_runs(now, then))
    assert "none of 1 cells lost ground" in changes_verdict(compare_runs(then, then))
    assert changes_verdict(compare_runs(now, sample(timed_cell(CASES[1], "forward")))).startswith("no cell")
