"""Time and memory of each backend before it runs: counted work, times what a unit of it was measured to cost here.

A call's time is modelled as a sum over the kinds of work that it does (`work`), each with its own cost in seconds a
unit, found by `bench.calibrate` from short measured runs. A sum and not the largest of them, as overlap is never
complete; costs below zero are excluded. How good that is, a calibration states itself: the error on shapes that it was
not fitted to.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tilewise.cost.counts import ideal_traffic, itemsize, visible_scores
from tilewise.cost.hardware import Device
from tilewise.cost.peak import Pass, peak_bytes, plain_tile
from tilewise.spec import AttentionSpec

KINDS = ("calls", "multiply-adds", "scores", "bytes", "spilled bytes", "longest program")
"""What `work` counts. "calls" is 1 but where the library itself loops over tiles. "longest program" is the work of the
programs that one multiprocessor (or core) runs in turn: it tells a grid that fills the chip from one that does not, or
that leaves the last wave half empty."""

_ROWS = {"standard": 1, "tiled": 128, "sdpa": 128, "triton": 128, "hopper": 128}
_PADDED = 16
_FULL_MATRIX = ("standard",)
_HIDING = 0.8
"""What hiding elements adds to a run of `tiled`, as a share of one: 12 operations beside 15."""


def work(spec: AttentionSpec, backend: str, direction: Pass, device: Device) -> tuple[float, ...]:
    """The units of each of `KINDS` in one call; both passes of it for direction "backward".

    Calibrations time full and causal problems; for windows the counted work is extrapolated from them.
    """
    whole = spec.q_len * spec.k_len
    dense = backend in _FULL_MATRIX or (backend == "sdpa" and spec.windowed)
    visible = whole if dense else _in_tiles(spec)
    heads = spec.batch * spec.heads
    d, dv = (math.ceil(x / _PADDED) * _PADDED for x in (spec.head_dim, spec.v_head_dim))
    passes = 1.0 if direction == "forward" else 3.5
    products = heads * visible * (d + dv) * passes
    scores = heads * visible * (1.0 if direction == "forward" else 2.0)
    moved = float(ideal_traffic(spec).bytes) * (1.0 if direction == "forward" else 3.0)
    spilled = 0.0
    if backend in _FULL_MATRIX:
        # What is rewritten stays in the last level of cache where it fits, and goes to memory where it does not.
        held = heads * whole * (4 if itemsize(spec.dtype) < 8 else 8) * (1 if direction == "forward" else 2)
        moved += held
        spilled = max(0.0, held - device.l2)
    programs = heads * math.ceil(spec.q_len / _ROWS[backend]) if backend not in _FULL_MATRIX else heads
    slots = max(1, device.sms)
    longest = math.ceil(programs / slots) * (products / programs if programs else 0.0)
    calls = _launches(spec) if backend == "tiled" and spec.device != "cpu" else 1.0
    return (calls, products, scores, moved, spilled, longest)


def _launches(spec: AttentionSpec) -> float:
    """What `tiled` does one after the other on a GPU, each some 15 operations: the call, query tiles, runs of scores.

    Long runs of whole tiles stand alone, and what the band cuts beside them; else all is one run.
    """
    batch, rows, keys = plain_tile(spec)
    left, right = spec.reach
    offset = spec.offset or 0
    tiles = 0.0
    for start in range(0, spec.q_len, max(1, rows)):
        first = 0 if left is None else max(0, start + offset - left)
        end = spec.k_len if right is None else min(spec.k_len, start + rows + offset + right)
        sides = (left is not None and first > 0) + (right is not None and end < spec.k_len + rows)
        seen = max(0, end - first)
        whole = seen - rows * sides
        alone = whole > keys // 2
        runs = math.ceil(whole / keys) + sides if alone else math.ceil(seen / max(1, keys))
        cut = sides if alone or not sides else runs
        tiles += 1 + runs + _HIDING * cut
    return 1 + math.ceil(spec.batch / batch) * tiles


def _in_tiles(spec: AttentionSpec) -> float:
    """Scores that a tiled kernel computes: the visible ones and the hidden half of the tiles on their edges."""
    if spec.mask is not None:
        return float(spec.q_len * spec.k_len)
    edges = sum(side is not None for side in spec.reach)
    return min(spec.q_len * spec.k_len, visible_scores(spec) + edges * spec.q_len * 64)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One shape that a fit never saw."""

    label: str
    predicted: float
    """Milliseconds."""
    measured: float
    """Milliseconds, the least of the interleaved runs."""
    spread: float
    """Median of those runs over their least, less 1: how far the machine disagrees with itself."""

    @property
    def error(self) -> float:
        return abs(self.predicted - self.measured) / self.measured


@dataclass(frozen=True, slots=True)
class Fit:
    """Seconds a unit of each of `KINDS`, for one backend, pass and dtype on the calibrated machine."""

    backend: str
    direction: Pass
    dtype: str
    costs: tuple[float, ...]
    held_out: tuple[HeldOut, ...] = ()

    def seconds(self, spec: AttentionSpec, device: Device) -> float:
        """Predicted time of one call."""
        units = work(spec, self.backend, self.direction, device)
        return sum(cost * unit for cost, unit in zip(self.costs, units, strict=True))

    @property
    def median_error(self) -> float:
        """Over the held-out shapes; NaN without any."""
        return statistics.median(shape.error for shape in self.held_out) if self.held_out else math.nan

    @property
    def worst_error(self) -> float:
        return max((shape.error for shape in self.held_out), default=math.nan)

    @property
    def spread(self) -> float:
        """Median over the held-out shapes of how far repeated runs of one shape disagree."""
        return statistics.median(shape.spread for shape in self.held_out) if self.held_out else math.nan


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one backend would take."""

    backend: str
    direction: Pass
    milliseconds: float | None
    """None where no fit for this backend, pass and dtype exists."""
    peak_bytes: int
    """Beyond the inputs; see `tilewise.cost.peak`."""
    error: float | None
    """Median error of the fit on held-out shapes."""


def predict(
    spec: AttentionSpec, fits: Sequence[Fit], device: Device, backends: Sequence[str], direction: Pass = "forward"
) -> list[Prediction]:
    """Predictions for `backends`, fastest first; those without a fit come last."""
    found = {fit.backend: fit for fit in fits if fit.direction == direction and fit.dtype == spec.dtype}
    predictions: list[Prediction] = []
    for backend in backends:
        fit = found.get(backend)
        memory = peak_bytes(spec, backend, direction)
        time = None if fit is None else 1e3 * fit.seconds(spec, device)
        predictions.append(Prediction(backend, direction, time, memory, None if fit is None else fit.median_error))
    return sorted(predictions, key=lambda p: math.inf if p.milliseconds is None else p.milliseconds)
