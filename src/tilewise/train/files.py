"""Small files that are whole under their name or not there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


def write(path: Path, content: str | np.ndarray) -> None:
    """Write text as UTF-8, or an array's bytes, to a temporary name, flush and rename.

    Raises:
        OSError: it cannot be written, with the path and the reason; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.part")
    data = content.encode() if isinstance(content, str) else np.ascontiguousarray(content).data
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: could not be written ({problem.strerror})") from problem
