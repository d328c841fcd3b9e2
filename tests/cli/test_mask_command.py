"""`tilewise mask`: the picture, its figures, its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tilewise.cli import BAD_USAGE, OK, run


def test_picture_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["mask", "causal", "--n", "256"]) == OK
    assert "25.0% of the work saved" in capsys.readouterr().out
    assert run(["mask", "causal", "--n", "256", "--json"]) == OK
    tiles = json.loads(capsys.readouterr().out)["tiles"]
    assert (tiles["full"], tiles["partial"], tiles["skipped"]) == (1, 2, 1)


@pytest.mark.parametrize("option", ["--report", "--html"])
def test_the_page_is_in_the_one_style(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "m.html"
    assert run(["mask", "causal & window(64, 0)", "--n", "300", option, str(page)]) == OK
    html = page.read_text(encoding="utf-8")
    assert "<svg" in html
    assert "<title>mask · tilewise</title>" in html
    assert "tilewise mask &#39;causal &amp; window(64, 0)&#39;" in html
    assert "report: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["nope"], ["causal &"], ["causal", "--n", "0"], ["causal", "--offset", "9" * 30], ["causal", "--html", "/no/x"]],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["mask", *arguments]) == BAD_USAGE
    assert "Traceback" not in capsys.readouterr().err
