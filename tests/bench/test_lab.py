"""The lab: every lesson runs and asserts its claims; the format, the book, the pictures and the traces."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tilewise.bench import lab
from tilewise.bench.lab import Lesson, cells_of, folder, lessons, run_lesson
from tilewise.bench.report.animation import scrubbers
from tilewise.bench.report.book import book
from tilewise.bench.report.pictures import bank_picture, bars, heads_picture
from tilewise.bench.trace import trace_flash
from tilewise.cost.banks import SharedTile
from tilewise.cost.counts import self_attention
from tilewise.cost.tiles import flash_v1_counts, flash_v2_counts
from tilewise.reference import flash_v2

LESSONS = lessons()
VOID = {"meta", "link", "br", "input"}


class Nesting(HTMLParser):
    """Tags nest, and nothing is loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset"):
                assert (value or "").startswith(("data:", "#")), (tag, name, value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A void tag with a slash nests nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_promised_lessons_are_there() -> None:
    assert {lesson.number for lesson in LESSONS} >= {"00", "01", "04", "05", "06", "07"}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
def test_a_lesson_has_its_parts(lesson: Lesson) -> None:
    text = "\n".join(cell.source for cell in lesson.cells() if cell.kind == "markdown")
    assert text.startswith(f"# {lesson.number} ")
    for part in ("After this lesson you know", "## Checklist", "## Questions"):
        assert part in text
    questions = re.findall(r"^\d\. \*.+\?\*", text, re.MULTILINE)
    assert len(questions) >= 3, "each with its answer"
    code = "\n".join(cell.source for cell in lesson.cells() if cell.kind == "code")
    assert len(re.findall(r"^\s*(?:assert|expect)\b", code, re.MULTILINE)) >= 3
    assert "measured(" in code
    assert "from tilewise" in code or "import tilewise" in code


@pytest.mark.parametrize("lesson", [x for x in LESSONS if x.number < "08"], ids=lambda x: x.path.stem)
def test_a_lesson_runs_and_its_claims_hold(lesson: Lesson) -> None:
    done = run_lesson(lesson)
    assert done.error == ""
    assert len(done.facts) >= 3
    assert any(shown.pictures for shown in done.shown)
    for shown in done.shown:
        for _, picture in shown.pictures:
            Nesting(picture)


def test_a_lesson_is_a_script() -> None:
    done = subprocess.run([sys.executable, str(LESSONS[0].path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Measured here:" in done.stdout
    assert "[picture: " in done.stdout


def test_lessons_are_found_beside_the_sources_or_where_they_were_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder().name == "labs"
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "lib" / "tilewise" / "bench" / "lab.py"))
    with pytest.raises(FileNotFoundError, match="not part of this installation"):
        folder()
    beside = tmp_path / "labs"
    beside.mkdir()
    assert folder() == beside
    installed = tmp_path / "lib" / "tilewise" / "labs"
    installed.mkdir(parents=True)
    assert folder() == installed


def test_a_lesson_that_lacks_a_library_says_which_extra_has_it(tmp_path: Path) -> None:
    script = tmp_path / "09_x.py"
    script.write_text("# %%\nimport no_such_library\n", encoding="utf-8")
    done = run_lesson(Lesson("09", "x", script))
    assert done.error == "this lesson needs no_such_library: pip install 'tilewise[labs]'"


def test_cells() -> None:
    text = '"""x"""\n# %% [markdown]\n# # 09 Title\n#\n# text\n\n# %%\nx = 1\n\n# %%\n\n# %% [markdown]\n# end\n'
    cells = cells_of(text)
    assert [(cell.kind, cell.source) for cell in cells] == [
        ("markdown", "# 09 Title\n\ntext"),
        ("code", "x = 1"),
        ("markdown", "end"),
    ]
    assert text.splitlines()[cells[1].line - 1] == "x = 1"


@pytest.fixture
def broken(tmp_path: Path) -> Lesson:
    path = tmp_path / "99_broken.py"
    path.write_text(
        '# %% [markdown]\n# # 99 Broken\n\n# %%\nprint("before")\n\n'
        '# %%\n\n\nraise ValueError("<why>")\n\n# %%\nprint("after")\n'
    )
    return Lesson("99", "Broken", path)


def test_a_lesson_that_fails_says_where(broken: Lesson) -> None:
    done = run_lesson(broken)
    assert "ValueError: <why>" in done.error
    assert "line 10" in done.error
    assert [shown.text for shown in done.shown] == ["", "before\n", ""]
    page = book([done], "# Path", "# Glossary", {"machine": "a box"})
    assert "&lt;why&gt;" in page
    assert "This lesson stopped here" in page


def test_the_book_is_whole_and_loads_nothing() -> None:
    done = run_lesson(LESSONS[0])
    texts = [(folder() / name).read_text(encoding="utf-8") for name in ("learning_path.md", "glossary.md")]
    page = book([done], texts[0], texts[1], {"machine": "a box"})
    Nesting(page)
    assert page.count("<h1>") == 1
    assert "http" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert 'id="lesson-00"' in page
    assert "Learning path" in page
    assert "<td>online softmax</td>" in page
    assert "prefers-color-scheme: dark" in page
    assert page.count('<script type="application/json">') == 2


def test_show_in_a_terminal_names_the_picture(capsys: pytest.CaptureFixture[str]) -> None:
    lab.show("<svg></svg>", "a name")
    assert capsys.readouterr().out.startswith("[picture: a name;")


def test_claims_about_time_are_asserted_on_a_quiet_machine_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(lab.os, "getloadavg", lambda: (0.1, 0, 0))
    lab.expect(True, "so it is")
    with pytest.raises(AssertionError, match="and yet"):
        lab.expect(False, "and yet")
    monkeypatch.setattr(lab.os, "getloadavg", lambda: (64.0, 0, 0))
    lab.expect(False, "too busy")
    assert "NOT seen under a load" in capsys.readouterr().out


def test_sizes_go_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, size in ((True, "full"), (False, "tiny")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert lab.pick("tiny", "full") == size


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(12, 12), (5, 13), (9, 4)])
def test_a_trace_is_what_the_loop_did(n: int, m: int, causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, n, 4), torch.randn(1, 1, m, 4), torch.randn(1, 1, m, 4)
    for version, model in (("v1", flash_v1_counts), ("v2", flash_v2_counts)):
        trace = trace_flash(q, k, v, version, causal=causal)
        spec = self_attention(n, 4, dtype="float32", causal=causal)
        spec = type(spec)(**{**spec.as_dict(), "k_len": m})  # type: ignore[arg-type]
        counts = model(spec, 4, 4)
        assert len(trace.frames) == counts.tiles_visited
        assert len(trace.skipped) == counts.tiles_skipped
        assert trace.total.elements == counts.traffic.elements
        if trace.frames:
            assert trace.frames[-1].bytes_written == trace.total.bytes_written
            assert trace.frames[-1].divisions == trace.total.divisions
        places = [(frame.row_tile, frame.col_tile) for frame in trace.frames]
        assert len(set(places) | set(trace.skipped)) == -(-n // 4) * -(-m // 4)
        for frame in trace.frames:
            rows = slice(4 * frame.row_tile, 4 * frame.row_tile + len(frame.scores))
            keys = slice(4 * frame.col_tile, 4 * frame.col_tile + len(frame.scores[0]))
            tile = q[0, 0, rows] @ k[0, 0, keys].T / 2
            for line, wanted in zip(frame.scores, tile.tolist(), strict=True):
                assert all(
                    got is None or got == pytest.approx(want, abs=1e-5) for got, want in zip(line, wanted, strict=True)
                )
        out, _ = flash_v2(q, k, v, causal=causal)
        if version == "v2" and trace.frames:
            last = max(trace.frames, key=lambda frame: (frame.row_tile, frame.col_tile))
            if last.row_tile == -(-n // 4) - 1 and all(last.l):
                final = torch.tensor(last.acc) / torch.tensor(last.l)[:, None]
                torch.testing.assert_close(final, out.out[0, 0, 4 * last.row_tile :], rtol=1e-4, atol=1e-5)


def test_an_unknown_loop_order() -> None:
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="version: got 'v3'; wants one of v1, v2"):
        trace_flash(x, x, x, "v3")


def test_the_animation_carries_its_own_data_style_and_script() -> None:
    x = torch.randn(1, 1, 8, 4)
    html = scrubbers([trace_flash(x, x, x, version, causal=True) for version in ("v1", "v2")])
    Nesting(html)
    assert html.count("<style>") == 1
    assert html.count("<script>") == 1
    assert html.count('type="range"') == 2
    assert 'aria-label="step"' in html
    assert "Infinity" not in html
    assert "NaN" not in html


def test_pictures_are_drawn_from_the_simulation() -> None:
    plain, swizzled = (bank_picture(SharedTile(64, 64, layout=name), "matrix") for name in ("plain", "swizzled"))  # type: ignore[arg-type]

    def columns(svg: str) -> int:
        return len(set(re.findall(r'<rect class="marker" x="([\d.]+)"', svg)))

    assert columns(plain) == 4
    assert columns(swizzled) == 8
    for svg in (plain, swizzled, heads_picture(8, 2), bars("x", {"a": 1.0, "b": 3.0}, str)):
        Nesting(svg)
    assert heads_picture(8, 2).count("query head") == 32
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="18"', bars("x", {"a": 1.0, "b": 3.0}, str))]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    assert bars("nothing", {}, str) == ""
