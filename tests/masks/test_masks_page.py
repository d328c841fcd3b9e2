"""docs/masks.md: what it prints, and the pictures beside it, are what the code draws."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "masks.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def test_output_and_pictures_are_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed = ""
    for kind, content in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "text":
            assert content == printed
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(content, str(PAGE), "exec"), names)  # noqa: S102 - the project's own documentation
        printed = output.getvalue()
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    kept = {path.name: path.read_text(encoding="utf-8") for path in (PAGE.parent / "masks").glob("*.svg")}
    assert drawn == kept
    assert all(f"(masks/{name})" in PAGE.read_text(encoding="utf-8") for name in kept)
