"""Small files that are whole under their name or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; it is flushed and renamed to `path` at the end. After an error nothing of
    it is left, and what was there before stays."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system can; the file itself is written
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write(path: Path, content: str | np.ndarray) -> None:
    """Write text as UTF-8, or an array's bytes, as `whole` does.

    Raises:
        OSError: it cannot be written, with the path and the reason; what was there before stays.
    """
    data = content.encode() if isinstance(content, str) else np.ascontiguousarray(content).data
    try:
        with whole(path) as temporary:
            temporary.write_bytes(data)
    except OSError as problem:
        raise OSError(f"{path}: could not be written ({problem.strerror})") from problem


def write_lines(path: Path, rows: Iterable[NamedTuple]) -> None:
    """Write each row as a line of JSON. Raises OSError as `write`."""
    write(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows))


def read_lines(path: Path, row: Callable[..., T]) -> list[T]:
    """The rows that `row` makes of a file's lines, as far as these are whole; none where there is no file."""
    found: list[T] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(row(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                break
    return found
