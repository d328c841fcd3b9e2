"""The methods that `compare` sets side by side: the readable references, each backend by name, and `auto`.

Which backends there are and whether they can run is the dispatcher's word; nothing is listed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor

BASELINE = "standard"
"""The method that speed-ups are over."""


@dataclass(frozen=True)
class Method:
    """One way to compute attention.

    `run(q, k, v, causal=...)` takes and returns [B, H, N, D]. `backend` is "reference" for a readable reference, "auto"
    where the dispatcher chooses, else the backend's name. Beyond `longest`, running it takes too long to be worth it.
    """

    name: str
    backend: str
    run: Callable[..., Tensor]
    longest: int | None = None
    note: str = ""


def all_methods() -> list[Method]:
    """Every method by name, whether or not it can run here, slowest idea first."""
    from tilewise.backends.base import BACKEND_NAMES

    loops = "a readable loop over tiles in Python"
    references = [
        Method("six-steps", "reference", _six_steps, note="standard attention as six separate steps"),
        Method("flash-v1", "reference", _flash_v1, longest=1024, note=f"FlashAttention-1, {loops}"),
        Method("flash-v2", "reference", _flash_v2, longest=1024, note=f"FlashAttention-2, {loops}"),
    ]
    slowest_first = reversed(BACKEND_NAMES)
    backends = [Method(name, name, _through(name)) for name in slowest_first]
    return [*references, *backends, Method("auto", "auto", _through("auto"))]


def _six_steps(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    from tilewise.reference.standard import six_step_attention

    return six_step_attention(q, k, v, causal=causal)[0].out


def _flash_v1(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    from tilewise.reference.flash import flash_v1

    return flash_v1(q, k, v, causal=causal)[0].out


def _flash_v2(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    from tilewise.reference.flash import flash_v2

    return flash_v2(q, k, v, causal=causal)[0].out


def _through(backend: str) -> Callable[..., Tensor]:
    """`tilewise.attention` on one backend."""

    def run(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        import tilewise

        return cast("Tensor", tilewise.attention(q, k, v, causal=causal, layout="bhsd", backend=backend))

    return run
