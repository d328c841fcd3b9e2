"""From timings to what a unit of work costs: the fit behind `cost.prediction`, and the error it states about itself.

Costs are found by least squares on *relative* residuals, none below zero, then refined towards the least absolute
relative residual (iteratively reweighted), so that a few disturbed timings do not bend the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tilewise import errors
from tilewise.cost.hardware import Device
from tilewise.cost.peak import Pass
from tilewise.cost.prediction import KINDS, Fit, HeldOut, work
from tilewise.spec import AttentionSpec

_REFINEMENTS = 8
_SMALLEST_RESIDUAL = 0.02
"""Relative; below it a residual is noise, and weighting by its inverse would chase it."""


class Sample(NamedTuple):
    """One shape with its timings in seconds: the least of several runs and their median."""

    spec: AttentionSpec
    least: float
    median: float


def fit(
    backend: str,
    direction: Pass,
    dtype: str,
    training: Sequence[Sample],
    held_out: Sequence[Sample],
    device: Device,
) -> Fit:
    """The costs that explain `training`, with their errors on `held_out`.

    Raises ValueError for fewer samples than costs.
    """
    if len(training) < len(KINDS):
        raise errors.bad_value("training", f"{len(training)} samples", f"at least {len(KINDS)}", "measure more shapes")
    units = np.array([work(sample.spec, backend, direction, device) for sample in training])
    costs = nonnegative_relative_fit(units, np.array([sample.least for sample in training]))
    bare = Fit(backend, direction, dtype, tuple(float(cost) for cost in costs))
    return Fit(backend, direction, dtype, bare.costs, tuple(_held_out(bare, sample, device) for sample in held_out))


def _held_out(fitted: Fit, sample: Sample, device: Device) -> HeldOut:
    return HeldOut(
        label_of(sample.spec),
        1e3 * fitted.seconds(sample.spec, device),
        1e3 * sample.least,
        sample.median / sample.least - 1,
    )


def label_of(spec: AttentionSpec) -> str:
    """A shape in a few characters: "1×8×1024×64 causal" is B×H×N×D."""
    keys = "" if spec.k_len == spec.q_len else f"/{spec.k_len}"
    shape = f"{spec.batch}×{spec.heads}×{spec.q_len}{keys}×{spec.head_dim}"
    return f"{shape} causal" if spec.causal else shape


def nonnegative_relative_fit(units: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Costs `c ≥ 0` [kinds] with `units @ c ≈ seconds`, in the sense of small relative errors.

    Args:
        units: [samples, kinds], none below zero.
        seconds: [samples], all above zero.
    """
    relative = units / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    weights = np.ones(len(seconds))
    costs = _nonnegative_least_squares(relative / scale, weights)
    for _ in range(_REFINEMENTS):
        residual = np.abs(relative / scale @ costs - 1)
        weights = 1 / np.maximum(residual, _SMALLEST_RESIDUAL)
        costs = _nonnegative_least_squares(relative / scale, weights)
    return costs / scale


def _nonnegative_least_squares(a: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`c ≥ 0` that minimises `Σ w·(a c − 1)²`: the best over all sets of columns that may be in use.

    With six columns there are 63 sets, so the exact answer is found by looking at each.
    """
    root = np.sqrt(weights)
    rows, target = a * root[:, None], root
    best, least = np.zeros(a.shape[1]), float(target @ target)
    for chosen in range(1, 1 << a.shape[1]):
        columns = [column for column in range(a.shape[1]) if chosen >> column & 1]
        solution = np.linalg.lstsq(rows[:, columns], target, rcond=None)[0]
        if (solution < 0).any():
            continue
        residual = rows[:, columns] @ solution - target
        if (loss := float(residual @ residual)) < least:
            best, least = np.zeros(a.shape[1]), loss
            best[columns] = solution
    return best
