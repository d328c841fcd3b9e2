"""Choose a backend for a problem, and say why: the only place where that is decided.

Each backend is asked `why_not(spec)` in the order of speed on the device; the first that can serve is the plan. A plan
depends on nothing but the spec, so it is cached, and forward and backward find the same one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from tilewise.backends.base import BACKEND_NAMES
from tilewise.backends.registry import REGISTRY
from tilewise.errors import UnsupportedError, bad_value
from tilewise.spec import AttentionSpec, DecodeSpec, LinearSpec

Spec = TypeVar("Spec", AttentionSpec, DecodeSpec, LinearSpec)
"""The problems that one dispatcher chooses for, one kind of spec an op."""

_log = logging.getLogger("tilewise")

SPEED_ORDER = {
    "cpu": ("tiled", "sdpa", "standard", "triton", "hopper"),
    "cuda": ("hopper", "triton", "sdpa", "tiled", "standard"),
}
"""Fastest first. On a CPU `tiled` calls the same fused kernel as `sdpa`, and only on the tiles that are visible."""


@dataclass(frozen=True, slots=True)
class Plan(Generic[Spec]):
    """What will run and why: printed by `explain`, followed by the op."""

    op: str
    backend: str
    config: Any
    reason: str
    rejected: dict[str, str]
    """Every other backend with one sentence on why it was not chosen."""
    spec: Spec

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.spec}", f"  {self.backend}: {self.reason}", f"  config: {self.config}"]
        lines += [f"  not {name}: {sentence}" for name, sentence in self.rejected.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        config = self.config._asdict() if hasattr(self.config, "_asdict") else self.config
        return {
            "op": self.op,
            "backend": self.backend,
            "config": config,
            "reason": self.reason,
            "rejected": self.rejected,
            "spec": self.spec.as_dict(),
        }


def check_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKEND_NAMES:
        raise bad_value("backend", repr(backend), f"'auto' or one of {', '.join(BACKEND_NAMES)}")


def speed_order(device: str) -> tuple[str, ...]:
    return SPEED_ORDER["cpu" if device == "cpu" else "cuda"]


@lru_cache(maxsize=4096)
def choose(spec: Spec, backend: str = "auto", op: str = "attention") -> Plan[Spec]:
    """The plan for `spec`.

    Raises ValueError for an unknown backend name, and UnsupportedError when the named backend cannot serve the spec:
    the message says why, and which one can.
    """
    check_name(backend)
    order = speed_order(spec.device)
    obstacles = {name: REGISTRY[op, name].why_not(spec) for name in order}
    able = [name for name in order if obstacles[name] is None]
    if backend != "auto" and obstacles[backend] is not None:
        alternative = f"backend={able[0]!r} can" if able else "no backend can"
        raise UnsupportedError(f"backend={backend!r} cannot run {spec}: {obstacles[backend]}. {alternative}")
    if not able:
        reasons = "; ".join(f"{name}: {obstacles[name]}" for name in order)
        raise UnsupportedError(f"no backend can run {spec}: {reasons}")
    chosen, outrun = _fastest(op, able, spec) if backend == "auto" else (backend, None)
    rejected = {name: obstacles[name] or _not_needed(name, chosen, spec, order) for name in order if name != chosen}
    if backend != "auto":
        reason = "asked for by name"
    elif outrun is not None:
        reason = rejected[able[0]] = outrun
    elif chosen == order[0]:
        reason = f"the first choice on {spec.device}"
    else:
        missing = ", ".join(name for name in order[: order.index(chosen)])
        reason = f"the first choice on {spec.device} that can serve this; {missing} cannot"
        _log.info("attention runs on %s, not on %s: %s", chosen, order[0], obstacles[order[0]])
    return Plan(op, chosen, REGISTRY[op, chosen].configure(spec), reason, rejected, spec)


def _fastest(op: str, able: list[str], spec: Spec) -> tuple[str, str | None]:
    """The first that can serve the spec; or one that outruns it there, and why."""
    ask = getattr(REGISTRY[op, able[0]], "outrun_by", None)
    found = ask(spec) if ask is not None else None
    return found if found is not None and found[0] in able else (able[0], None)


def _not_needed(name: str, chosen: str, spec: Spec, order: tuple[str, ...]) -> str:
    """Why a backend that could serve was passed over."""
    if order.index(name) < order.index(chosen):
        return f"can serve this and comes first on {spec.device}, but {chosen} was asked for by name"
    return f"can serve this, but {_slower(name, chosen, spec)}"


def _slower(name: str, chosen: str, spec: Spec) -> str:
    if name == "standard":
        width = 8 if spec.dtype == "float64" else 4
        kibibytes = spec.batch * spec.heads * spec.q_len * spec.k_len * width / 2**10
        size = f"{kibibytes / 2**10:,.1f} MiB" if kibibytes >= 1024 else f"{kibibytes:,.1f} KiB"
        return f"builds the whole score matrix, up to {size}"
    if name == "sdpa" and spec.device == "cpu":
        return "tiled calls the same kernel, where a mask is large only on tiles that something sees"
    return f"{chosen} comes first on {spec.device}"
