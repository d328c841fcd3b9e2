"""Tensors that stay on a device between calls: schedules, tile maps, rotary frequencies.

They are made once and read by later calls. Such a call may be on another stream, where it must wait until they are
there. And a CUDA graph reads such a tensor at every replay, when the cache that held it may long have let it go: what a
graph reads is kept for good.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_MADE: dict[tuple[int | None, int], Any] = {}
"""By device and stream: an event behind what was last made there."""

_READ_BY_GRAPHS: dict[int, Any] = {}
"""By identity; few, as a graph reads one or two for each shape that was captured."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def from_host(x: Tensor, device: torch.device, what: str) -> Tensor:
    """`x` on `device`, on its way when this returns; on the CPU x itself. `what` names it to the user.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would copy from memory that is gone when it is replayed.
    """
    if capturing(device):
        raise RuntimeError(
            f"{what} is not on {device} yet, and a CUDA graph that is being captured cannot copy it from the host. "
            "Fix: make the same call once before the capture"
        )
    return made(x.to(device, non_blocking=True), device)


def made(value: T, device: torch.device) -> T:
    """`value`, whose making the current stream has been told of: callers on other streams will wait for it."""
    if device.type == "cuda" and not capturing(device):
        stream = torch.cuda.current_stream(device)
        _MADE[device.index, stream.cuda_stream] = stream.record_event()
    return value


def used(value: T, device: torch.device) -> T:
    """`value`, for the current stream to read now.

    If a CUDA graph is being captured, which will read it at every replay, it is never freed. (A capture begins when the
    device has finished everything, so there is nothing to wait for.)
    """
    if capturing(device):
        _READ_BY_GRAPHS[id(value)] = value
    elif device.type == "cuda":
        here = torch.cuda.current_stream(device)
        for (index, stream), event in list(_MADE.items()):
            if index == device.index and stream != here.cuda_stream:
                here.wait_event(event)
    return value
