"""The dropout generator against Philox in Python integers, and against what a random mask must look like."""

from __future__ import annotations

import math

import pytest
import torch

import oracle
from tilewise.backends.philox import keep_mask

pytestmark = pytest.mark.filterwarnings("error")


def block(seed: int, dropout: float, batch: int, heads: int, rows: range, keys: range) -> torch.Tensor:
    return keep_mask(torch.tensor([seed]), dropout, torch.arange(batch), torch.arange(heads), rows, keys)


@pytest.mark.parametrize("seed", [0, 1, 0x1234_5678_9ABC_DEF0, 2**63 - 1])
def test_equals_philox_in_python_integers(seed: int) -> None:
    expected = oracle.philox_keep(seed, 0.3, 2, 3, 5, 11)
    assert torch.equal(block(seed, 0.3, 2, 3, range(5), range(11)), expected)


def test_known_answer_of_the_paper() -> None:
    """Random123's known-answer vector: counter and key zero give 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for j, word in enumerate(words):
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            assert block(0, p, 1, 1, range(1), range(4))[0, 0, 0, j].item() is kept


def test_tiles_of_any_shape_agree_with_the_whole() -> None:
    whole = block(99, 0.5, 2, 2, range(40), range(53))
    for rows in (range(0, 7), range(7, 40)):
        for keys in (range(0, 1), range(1, 30), range(30, 53)):
            part = block(99, 0.5, 2, 2, rows, keys)
            assert torch.equal(part, whole[:, :, rows.start : rows.stop, keys.start : keys.stop])


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.97])
def test_keeps_one_minus_p(dropout: float) -> None:
    kept = block(7, dropout, 4, 4, range(128), range(128))
    n = kept.numel()
    sigma = math.sqrt(dropout * (1 - dropout) / n)
    assert abs(kept.double().mean().item() - (1 - dropout)) <= 5 * sigma
