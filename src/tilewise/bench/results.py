"""What `bench` found, as values that go to JSON and come back: table, report and `--against` read only these."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tilewise.bench.report.page import write_whole
from tilewise.errors import bad_value

Key = tuple[str, str, str]
"""Case, pass, backend: what tells a cell from every other one."""

Spread = tuple[float, float]


@dataclass(frozen=True)
class PeerResult:
    """One peer in one cell: times and what else was measured, or the reason why not."""

    absent: str | None = None
    ms: float | None = None
    """Median of the rounds."""
    spread: Spread | None = None
    """Fastest and slowest round, in milliseconds."""
    tflops: float | None = None
    error: float | None = None
    budget: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Cell:
    """One case, one pass, one backend. What was not measured is None: there is no time without a passed check."""

    case: str
    which: str
    """The pass, "forward" or "backward"; called "pass" in JSON."""
    backend: str
    """As it was asked for, "auto" included."""
    problem: dict[str, Any]
    """The case's fields."""
    ran_on: str | None = None
    """The backend that ran."""
    absent: str | None = None
    """Why this backend cannot run this case."""
    ms: float | None = None
    spread: Spread | None = None
    tflops: float | None = None
    ratio: float | None = None
    """The fastest peer's time over ours: above 1 is faster."""
    best_peer: str | None = None
    ceiling_share: float | None = None
    """Of what the machine attains at this intensity: the lower of its matrix rate and its copy rate × intensity."""
    intensity: float | None = None
    """FLOP per byte that any method moves."""
    error: float | None = None
    """In the 128 rows that come nearest to their budget (judge.py)."""
    budget: float | None = None
    where: str | None = None
    """Which rows of which tensor these are."""
    peak_bytes: int | None = None
    """Beyond the inputs; in a backward cell that of forward and backward together."""
    peers: dict[str, PeerResult] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return self.case, self.which, self.backend

    @property
    def wrong(self) -> bool:
        """It ran, and its result is not right."""
        return self.error is not None and self.budget is not None and not self.error <= self.budget

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        peers = {
            name: {"absent": peer["absent"]} if peer["absent"] else {k: v for k, v in peer.items() if k != "absent"}
            for name, peer in values.pop("peers").items()
        }
        return {"pass" if k == "which" else k: v for k, v in values.items()} | {"peers": peers}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Cell:
        known = {"pass" if f.name == "which" else f.name: f.name for f in fields(cls)}
        found = {known[k]: v for k, v in values.items() if k in known}
        peers = {name: PeerResult(**_with_spread(peer)) for name, peer in found.pop("peers", {}).items()}
        return cls(**_with_spread(found), peers=peers)


@dataclass(frozen=True)
class Results:
    """A run, finished or not (`complete`); `ceilings` are the rates that this machine attained in it."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    ceilings: dict[str, float]
    """"matmul_tflops" in the cases' dtype and "copy_gb_per_s", read and written."""
    cells: tuple[Cell, ...] = ()
    complete: bool = False

    @property
    def passed(self) -> bool:
        return not any(cell.wrong for cell in self.cells)

    def by_key(self) -> dict[Key, Cell]:
        return {cell.key: cell for cell in self.cells}

    def with_cells(self, cells: Sequence[Cell]) -> Results:
        """With these too; a cell that is there already is replaced."""
        return replace(self, cells=tuple((self.by_key() | {cell.key: cell for cell in cells}).values()))

    def with_shares(self) -> Results:
        """Every cell's `ceiling_share`, against the ceilings as they stand."""
        matmul, copy = self.ceilings["matmul_tflops"] * 1e12, self.ceilings["copy_gb_per_s"] * 1e9

        def share(cell: Cell) -> Cell:
            if cell.tflops is None or cell.intensity is None:
                return cell
            return replace(cell, ceiling_share=cell.tflops * 1e12 / min(matmul, copy * cell.intensity))

        return replace(self, cells=tuple(share(cell) for cell in self.cells))

    def as_dict(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "settings": self.settings,
            "ceilings": self.ceilings,
            "complete": self.complete,
            "cells": [cell.as_dict() for cell in self.cells],
        }


def read(path: Path) -> Results:
    """The results in a file that `write` wrote.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(Cell.of(cell) for cell in values["cells"])
        return Results(values["environment"], values["settings"], values["ceilings"], cells, values["complete"])
    except OSError as problem:
        raise bad_value("file", f"{str(path)!r} ({problem.strerror})", "results of `tilewise bench --json`") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise bad_value("file", f"{str(path)!r}", "results of `tilewise bench --json`") from None


def write(results: Results, path: Path) -> None:
    """In one step: whoever interrupts a run finds the old file or the new one.

    Raises:
        OSError: the folder is missing or not writable.
    """
    text = json.dumps(finite(results.as_dict()), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(text + "\n", path)


def finite(value: Any) -> Any:
    """`value` with what JSON cannot say as what it can: infinities as the largest number, so that an error that is
    infinite stays beyond its budget, and NaN as null."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
    return value


def _with_spread(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(values) | ({"spread": tuple(values["spread"])} if values.get("spread") else {})
