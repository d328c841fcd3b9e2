"""What the modules check of their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tilewise.errors import bad_type, bad_value
from tilewise.ops import checks


def tokens(name: str, x: Any, width: int, projection: nn.Module | None = None) -> None:
    """Raises TypeError or ValueError unless x is floating point [B, N, width], in the dtype of a plain projection."""
    checks.is_float(name, x)
    if x.dim() != 3:
        fix = f"{name}.unsqueeze(0)" if x.dim() == 2 else None
        raise bad_value(name, f"shape {list(x.shape)}", f"three dimensions, [B, tokens, {width}]", fix)
    if x.shape[2] != width:
        raise bad_value(name, f"shape {list(x.shape)}", f"[B, tokens, {width}]")
    if type(projection) is nn.Linear and x.dtype != projection.weight.dtype:
        if x.is_meta or torch.is_autocast_enabled(x.device.type):
            return
        dtype = projection.weight.dtype
        fix = f"{name} = {name}.to({dtype}), module.to({x.dtype}), or torch.autocast"
        raise bad_type(name, f"dtype {x.dtype}", f"the module's {dtype}", fix)
