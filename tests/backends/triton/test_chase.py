"""The pointer chase follows its chain: where the kernel ends is where a loop in Python ends."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE

from tilewise.bench.latency import chain, chase

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_the_kernel_follows_the_chain(steps: int) -> None:
    from tilewise.backends.triton.chase import last_of_chain

    links = chain(2048)
    place = int(links[0])
    for _ in range(steps):
        place = int(links[place])
    assert last_of_chain(torch.from_numpy(links).to(DEVICE), steps).item() == place


@pytest.mark.gpu
def test_memory_answers_later_than_a_cache() -> None:
    found = chase([2**14, 2**28], torch.device("cuda"), steps=5000)
    assert found[0].nanoseconds > 0
    assert found[1].nanoseconds > 2 * found[0].nanoseconds
