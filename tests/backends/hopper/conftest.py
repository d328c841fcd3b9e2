"""The helpers of ahead-of-time compilation lie with the Triton backend's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tilewise.backends.triton import interpreting

sys.path.append(str(Path(__file__).parents[1] / "triton"))


@pytest.fixture
def compiler() -> None:
    """Skip where kernels are interpreted and so cannot be compiled."""
    if interpreting():
        pytest.skip("the interpreter replaces the compiler")
