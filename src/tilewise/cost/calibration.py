"""This machine as it was measured: its two ceilings, its fits and its dots, with the versions they hold for.

`bench.calibrate` measures and saves; everything here only reads, so that `tilewise roofline` and `predict` can use a
measurement without importing PyTorch.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tilewise
from tilewise.cost.hardware import Device
from tilewise.cost.prediction import Fit, HeldOut

FORMAT = 2
"""Raised when the meaning of a saved number changes; older files then count as absent."""
_WATCHED = ("torch", "triton")


@dataclass(frozen=True, slots=True)
class Dot:
    """One measured point under the roof."""

    name: str
    flops: float
    bytes: float
    seconds: float
    dtype: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration run found."""

    device: Device
    versions: dict[str, str]
    date: str
    seconds: float
    """How long it took."""
    dots: tuple[Dot, ...] = ()
    fits: tuple[Fit, ...] = ()
    load: float | None = None
    """The machine's load average when it began: timings of a busy machine are worth less."""

    def stale(self) -> str | None:
        """Why these numbers may not hold any more, or None."""
        now = versions()
        changed = [
            f"{name} was {then} and is {now.get(name, 'absent')}"
            for name, then in self.versions.items()
            if now.get(name) != then
        ]
        return "; ".join(changed) or None


def versions() -> dict[str, str]:
    """What a measurement depends on, without importing any of it."""
    found: dict[str, str] = {"processor": platform.machine(), "tilewise": tilewise.__version__}
    for name in _WATCHED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def default_path() -> Path:
    """Where a calibration is kept for this user. Raises RuntimeError where the user has no home."""
    return Path.home() / ".cache" / "tilewise" / "machine.json"


def save(calibration: Calibration, path: Path) -> None:
    """Writes the file in one step. Raises OSError where that is not possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    value = {"format": FORMAT, **dataclasses.asdict(calibration)}
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Calibration | None:
    """The saved calibration; None where there is none, or none that this version can read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        return None
    try:
        return _from_json(value)
    except (KeyError, TypeError, ValueError):
        return None


def _from_json(value: dict[str, Any]) -> Calibration:
    fits = tuple(
        Fit(
            **{
                **fit,
                "costs": tuple(fit["costs"]),
                "held_out": tuple(HeldOut(**shape) for shape in fit["held_out"]),
            }
        )
        for fit in value["fits"]
    )
    dots = tuple(Dot(**dot) for dot in value["dots"])
    return Calibration(**{**value, "device": Device(**value["device"]), "fits": fits, "dots": dots})
