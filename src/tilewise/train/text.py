"""Real text: files and folders as documents, in an order that depends on their names alone."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tilewise.errors import bad_value

# fmt: off
SUFFIXES = frozenset((
    ".c", ".cc", ".cpp", ".cu", ".go", ".h", ".hpp", ".html", ".java", ".js", ".json", ".md", ".py", ".rs", ".rst",
    ".sh", ".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml",
))
# fmt: on
"""What is taken from a folder. A file that is named itself may end in anything."""

SKIPPED = frozenset(("__pycache__", "site-packages", "node_modules", "test", "tests", "idle_test"))
"""Folders that are not walked: what is generated, what others wrote, and Python's own tests, half of its text."""


def default_folder() -> Path:
    """Where Python keeps its library: source text with its documentation, on every machine that runs this."""
    return Path(sysconfig.get_path("stdlib"))


def find(paths: Iterable[Path | str]) -> list[Path]:
    """The files that `paths` name, folders walked in order of name.

    Raises:
        ValueError: a path that does not exist, or a folder without any text.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            inside = [each for each in sorted(path.rglob("*")) if _is_text(each, path)]
            if not inside:
                raise bad_value(
                    "text", f"{path}, without a text file", f"files ending in {', '.join(sorted(SUFFIXES))}"
                )
            found += inside
        else:
            raise bad_value("text", f"{path}, which does not exist", "files and folders")
    return found


def _is_text(path: Path, root: Path) -> bool:
    inside = path.relative_to(root).parts
    hidden = any(part in SKIPPED or part.startswith(".") for part in inside)
    return path.suffix in SUFFIXES and not hidden and path.is_file()


def documents(files: Iterable[Path], *, most: int | None = None) -> Iterator[str]:
    """The texts of files, one after another, until `most` characters have been given.

    Raises:
        ValueError: a file that is not UTF-8.
    """
    given = 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            where = f"{path}, which is not UTF-8 at byte {problem.start}"
            raise bad_value("text", where, "text", f"iconv -f latin1 -t utf-8 {path}, or leave it out") from problem
        if most is not None and given + len(text) > most:
            text = text[: most - given]
        given += len(text)
        if text.strip():
            yield text
        if most is not None and given >= most:
            return
