"""What the modules check of their sizes and inputs."""

from __future__ import annotations

from typing import Any

from tilewise.errors import bad_type, bad_value
from tilewise.ops import checks


def whole(**sizes: Any) -> None:
    """Raises TypeError or ValueError unless each is an int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise bad_type(name, size, "an int")
        if size < 1:
            raise bad_value(name, size, "at least 1")


def tokens(name: str, x: Any, width: int) -> None:
    """Raises TypeError or ValueError unless x is floating point [B, N, width]."""
    checks.is_float(name, x)
    if x.dim() != 3:
        fix = f"{name}.unsqueeze(0)" if x.dim() == 2 else None
        raise bad_value(name, f"shape {list(x.shape)}", f"three dimensions, [B, tokens, {width}]", fix)
    if x.shape[2] != width:
        raise bad_value(name, f"shape {list(x.shape)}", f"[B, tokens, {width}]")
