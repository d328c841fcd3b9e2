"""Tasks with a known answer: what a mechanism remembers, and where it loses it.

Each is a pure function of a seed and an index, as batches of text are; targets are −100 where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tilewise.errors import bad_value
from tilewise.train.shards import Batch

NOTHING = -100
"""A target that counts for nothing."""

MARK = 0
"""The token that separates; all others are content."""


def copy(seed: int, index: int, batch: int, length: int, vocab: int) -> Batch:
    """Random tokens, a mark, and the same tokens again: every one of the second half is asked.

    Args:
        seed, index: of the batch.
        batch: B.
        length: N, at least 3.
        vocab: tokens, the mark among them; at least 3.
    """
    rng = _draws(seed, index, length, 3, vocab, 3)
    half = length // 2
    content = rng.integers(1, vocab, (batch, half))
    rows = np.full((batch, length + 1), MARK)
    rows[:, :half] = content
    rows[:, half + 1 : 2 * half + 1] = content
    asked = np.zeros(length, bool)
    asked[half : 2 * half] = True
    return _batch(rows, np.broadcast_to(asked, (batch, length)))


def recall(seed: int, index: int, batch: int, length: int, vocab: int, pairs: int = 16) -> Batch:
    """Multi-query associative recall (Arora et al., Zoology, 2023): `pairs` keys, each followed by its value; then
    every key once more, in another order, at random places among marks. Asked is the value that belongs to it.

    Args:
        seed, index, batch: as in `copy`.
        length: N, at least 4·pairs.
        vocab: tokens; keys are those of the lower half, values those of the upper. At least 2·pairs + 2.
        pairs: keys.
    """
    rng = _draws(seed, index, length, 4 * pairs, vocab, 2 * pairs + 2)
    keys = vocab // 2
    rows = np.full((batch, length + 1), MARK)
    asked = np.zeros((batch, length), bool)
    room = (length - 2 * pairs) // 2
    for row, ask in zip(rows, asked, strict=True):
        key = rng.permutation(np.arange(1, keys))[:pairs]
        value = rng.integers(keys, vocab, pairs)
        row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = key, value
        places = 2 * pairs + 2 * np.sort(rng.permutation(room)[:pairs])
        order = rng.permutation(pairs)
        row[places], row[places + 1] = key[order], value[order]
        ask[places] = True
    return _batch(rows, asked)


def needle(seed: int, index: int, batch: int, length: int, vocab: int) -> Batch:
    """Random filler with one mark somewhere, followed by a token; at the end the mark again. Asked is that token.

    Args:
        seed, index, batch: as in `copy`.
        length: N, at least 4.
        vocab: at least 3.
    """
    rng = _draws(seed, index, length, 4, vocab, 3)
    rows = rng.integers(1, vocab, (batch, length + 1))
    places = rng.integers(0, length - 2, batch)
    every = np.arange(batch)
    rows[every, places] = MARK
    rows[:, length - 1] = MARK
    rows[:, length] = rows[every, places + 1]
    asked = np.zeros((batch, length), bool)
    asked[:, length - 1] = True
    return _batch(rows, asked)


TASKS: dict[str, Callable[..., Batch]] = {"copy": copy, "recall": recall, "needle": needle}


def _draws(seed: int, index: int, length: int, shortest: int, vocab: int, fewest: int) -> np.random.Generator:
    if length < shortest:
        raise bad_value("length", length, f"at least {shortest}")
    if vocab < fewest:
        raise bad_value("vocab", vocab, f"at least {fewest}")
    return np.random.Generator(np.random.Philox(key=(seed, index)))


def _batch(rows: np.ndarray, asked: np.ndarray) -> Batch:
    ids = torch.from_numpy(rows[:, :-1].astype(np.int64))
    targets = torch.from_numpy(rows[:, 1:].astype(np.int64))
    return Batch(ids, targets.masked_fill(~torch.from_numpy(asked.copy()), NOTHING), None)


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """The share of what is asked that the likeliest token answers; leaves the model in evaluation mode."""
    model.eval()
    place: Tensor = next(model.parameters())
    targets = batch.targets.to(place.device)
    found = model(batch.ids.to(place.device)).argmax(-1)
    asked = targets != NOTHING
    return float((found == targets)[asked].double().mean())
