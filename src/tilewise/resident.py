"""Tensors that stay on a device between calls: schedules, tile maps, rotary frequencies.

They are made once and read by later calls. Such a call may run on another stream: what comes from the host has arrived
before anybody else can find it. And a CUDA graph reads such a tensor at every replay, when the cache that held it may
long have let it go: what a graph reads is kept for good.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_READ_BY_GRAPHS: dict[int, Any] = {}
"""By identity; few, as a graph reads one or two for each shape that was captured."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def from_host(x: Tensor, device: torch.device, what: str) -> Tensor:
    """`x` on `device`, arrived when this returns; on the CPU x itself. `what` names it to the user.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would copy from memory that is gone when it is replayed.
    """
    if capturing(device):
        raise RuntimeError(
            f"{what} is not on {device} yet, and a CUDA graph that is being captured cannot copy it from the host. "
            "Fix: make the same call once before the capture"
        )
    return x.to(device)


def used(value: T, device: torch.device) -> T:
    """`value`; if a CUDA graph is being captured, which will read it at every replay, it is never freed."""
    if capturing(device):
        _READ_BY_GRAPHS[id(value)] = value
    return value
