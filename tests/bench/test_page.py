"""The report is one well-formed document that loads nothing and says what the comparison says."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparisons import LENGTHS, SPEEDS, sample

from tilewise.bench.report import units
from tilewise.bench.report.comparison import cells, comparison_page, headline, verdict
from tilewise.bench.report.page import Group, Page, Section, Table, render, write

VOID = {"meta", "link", "br", "path", "circle", "rect"}


class Document(HTMLParser):
    """Checks that tags nest, and collects attributes, text by tag, and ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


@pytest.fixture(scope="module")
def html() -> str:
    return render(comparison_page(sample(), "tilewise compare --text 'a b.txt'"))


def test_tags_nest_and_ids_are_unique_and_referred_to(html: str) -> None:
    document = Document(html)
    ids = [value for _, name, value in document.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for _, name, value in document.attributes:
        if name == "aria-labelledby":
            assert value in ids


def test_nothing_is_loaded_from_anywhere(html: str) -> None:
    document = Document(html)
    assert "script" not in document.texts
    for tag, name, value in document.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith("data:"), (tag, name, value)
    assert "@import" not in html
    assert "url(" not in html
    assert "http" not in html


def test_light_dark_phone_and_screen_reader(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert '<html lang="en">' in html
    charts = [value for tag, name, value in Document(html).attributes if tag == "svg" and name == "aria-label"]
    assert len(charts) == 4
    for style in range(8):
        light, dark = re.findall(rf"--series-{style}: (#\w+)", html)
        assert light != dark


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_meets_wcag(html: str, scheme: int) -> None:
    """WCAG 2.1: 4.5 for text, 3 for the lines of a chart."""
    colour = {name: values[scheme] for name, values in _palette(html).items()}
    for text in ("text", "muted", "accent"):
        assert _contrast(colour[text], colour["card"]) >= 4.5
        assert _contrast(colour[text], colour["page"]) >= 4.5
    for state in ("good", "bad"):
        assert _contrast(colour[state], colour[f"{state}-tint"]) >= 4.5
    for style in range(8):
        assert _contrast(colour[f"series-{style}"], colour["card"]) >= 3


def _palette(html: str) -> dict[str, list[str]]:
    palette: dict[str, list[str]] = {}
    for name, value in re.findall(r"--([\w-]+): (#[0-9a-f]{6})", html):
        palette.setdefault(name, []).append(value)
    return palette


def test_every_row_and_the_plan_are_there(html: str) -> None:
    document = Document(html)
    comparison = sample()
    rows = [method for n in LENGTHS for method in SPEEDS if not (method == "flash-v1" and n > 1024)]
    assert [text for text in document.texts["th"] if text in SPEEDS] == rows
    shown = set(document.texts["td"])
    for row in comparison.rows:
        assert set(list(cells(comparison, row).values())[1:]) <= shown
    assert "tiled calls the same kernel" in document.texts["dd"]
    assert "tilewise compare --text 'a b.txt'" in document.texts["code"]
    assert "2-core CPU (AVX-512)" in document.texts["dd"]


def test_hostile_names_are_escaped() -> None:
    html = render(comparison_page(sample(text_name="<script>alert(1)</script>&"), "tilewise compare"))
    assert "<script>" not in html
    Document(html)


def test_headline_is_the_longest_length() -> None:
    said = headline(sample()).replace(units.SPACE, " ")
    assert said == "4.10× the speed of standard attention at N = 4,096, in 1/128 of its memory"
    assert "memory" not in headline(sample(peaks=False))


def test_a_failed_check_is_the_headline() -> None:
    failed = sample(error=3e-6)
    assert headline(failed).startswith("Not exact here: auto, ")
    assert verdict(failed) == "22 of 22 results exceed their error budget"
    document = Document(render(comparison_page(failed, "tilewise compare")))
    assert any("exceed" in text for text in document.texts["p"])


def test_an_infinite_error_can_be_shown() -> None:
    html = render(comparison_page(sample(error=math.inf), "tilewise compare"))
    Document(html)
    assert "inf" in html


def test_a_bare_page() -> None:
    table = Table("A table", ("a", "b"), (Group("", (("1", "2"),)),))
    page = Page("t", "Headline", "Summary", [], [Section("One", table=table), Section("Two")], {}, "tilewise mask")
    document = Document(render(page))
    assert document.texts["h1"] == ["Headline"]
    assert document.texts["h2"] == ["One", "Two", "Making this page again"]


def test_write_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    broken = Page("t", "h", "s", [], [], {}, "c")
    monkeypatch.setattr("pathlib.Path.replace", _refuse)
    with pytest.raises(OSError, match="disk full"):
        write(broken, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write(broken, path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def _refuse(*_: object) -> None:
    raise OSError("disk full")
