"""Kernels run where there is a GPU, or under TRITON_INTERPRET=1 on the CPU; compilation needs neither, but no
interpreter."""

from __future__ import annotations

import pytest
import torch

from tilewise.backends.triton import interpreting


@pytest.fixture
def kernels() -> None:
    """Skip where Triton kernels cannot run."""
    if not interpreting() and not torch.cuda.is_available():
        pytest.skip("kernels run on a GPU or under TRITON_INTERPRET=1")


@pytest.fixture
def compiler() -> None:
    """Skip where kernels are interpreted and so cannot be compiled."""
    if interpreting():
        pytest.skip("the interpreter replaces the compiler")
