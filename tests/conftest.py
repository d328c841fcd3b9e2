"""Settings for the whole suite."""

from __future__ import annotations

import pytest
import torch

torch.use_deterministic_algorithms(True, warn_only=True)
"""Beside its name's meaning this fills every `torch.empty` with NaN, so an output that was never written shows."""


def pytest_make_parametrize_id(val: object) -> str | None:
    """A set of feature names as one sorted id: the workers of a parallel run must collect the same ids."""
    return "+".join(sorted(map(str, val))) or "plain" if isinstance(val, (set, frozenset)) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and say so, where PyTorch sees no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
