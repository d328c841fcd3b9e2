"""Tasks with a known answer: what a mechanism remembers, and where it loses it.

Each is a pure function of a seed and an index, as batches of text are; targets are −100 where nothing is asked.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tilewise.errors import bad_value
from tilewise.train.shards import Batch

NOTHING = -100
"""A target that counts for nothing."""

MARK = 0
"""The token that separates; all others are content."""

_NAMES = np.arange(ord("A"), ord("Z") + 1)
_ANSWERS = np.arange(ord("0"), ord("9") + 1)


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


def recall(seed: int, index: int, batch: int, length: int, vocab: int, pairs: int = 16, *, asks: int = 1) -> Batch:
    """Multi-query associative recall (Arora et al., Zoology, 2023): `pairs` keys, each followed by its value; then
    the keys again, in another order, at random places among marks. Asked is the value that belongs to each.

    Args:
        seed, index, batch: as in `copy`.
        length: N, at least 4·pairs.
        vocab: tokens; keys are those of the lower half, values those of the upper. At least 2·pairs + 2.
        pairs: keys of a sequence.
        asks: how often each is asked, as far as there is room. More than once is for training: each asked key comes
            with its value, so a later one can be answered from nearby.
    """
    rng = _draws(seed, index, length, 4 * pairs, vocab, 2 * pairs + 2)
    half, room = vocab // 2, (length - 2 * pairs) // 2
    key = 1 + _chosen(rng, batch, half - 1, pairs)
    value = rng.integers(half, vocab, (batch, pairs))
    rows = np.full((batch, length + 1), MARK)
    rows[:, 0 : 2 * pairs : 2], rows[:, 1 : 2 * pairs : 2] = key, value
    total = min(room, asks * pairs)
    places = 2 * pairs + 2 * np.sort(_chosen(rng, batch, room, total))
    order = rng.permuted(np.tile(np.arange(total) % pairs, (batch, 1)), axis=1)
    every = np.arange(batch)[:, None]
    rows[every, places], rows[every, places + 1] = key[every, order], value[every, order]
    asked = np.zeros((batch, length), bool)
    asked[every, places] = True
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


def questions(
    text: np.ndarray, seed: int, index: int, batch: int, length: int, facts: int = 4, *, asks: int = 1
) -> Batch:
    """Question answering over a document: real text with facts in it, `@Q7` at random places, and questions behind it,
    `@Q`, whose answer `7` is asked. Tokens are bytes; no fact is told twice, no two are about the same letter.

    Args:
        text: [bytes] uint8 of real text; a stretch of it is each document.
        seed, index, batch: as in `copy`.
        length: N, at least 3·facts·(asks + 1) − 1.
        facts: of a document, at most 26.
        asks: how often each is asked; as in `recall`, once is for tests.
    """
    rows, rng = _stretches(text, seed, index, batch, length, facts, 3 * facts * (asks + 1) - 1)
    document = length + 1 - 3 * facts * asks
    told = 3 * np.sort(_chosen(rng, batch, document // 3, facts))
    wanted = document + 3 * np.arange(facts * asks)
    return _batch(rows, _told_and_asked(rows, rng, told, np.tile(wanted, (batch, 1))))


def dialogue(
    text: np.ndarray, seed: int, index: int, batch: int, length: int, facts: int = 4, *, asks: int = 1, turn: int = 24
) -> Batch:
    """A long dialogue: turns of real text, in turn by A and by B. The first ones tell a fact each, `@Q7`; the last ones
    ask, `@Q`, each about one of them; those between do neither. Asked is the answer.

    Args:
        text, seed, index, batch, facts, asks: as in `questions`.
        length: N, at least turn·facts·(asks + 1) − 1.
        turn: bytes of a turn, at least 6.
    """
    if turn < 6:
        raise bad_value("turn", turn, "at least 6 bytes: who speaks, and a fact")
    rows, rng = _stretches(text, seed, index, batch, length, facts, turn * facts * (asks + 1) - 1)
    begins = turn * np.arange((length + 1) // turn)
    rows[:, begins], rows[:, begins + 2] = ord("\n"), ord(":")
    rows[:, begins + 1] = np.where(np.arange(len(begins)) % 2, ord("B"), ord("A"))
    told, wanted = begins[:facts] + 3, begins[-facts * asks :] + 3
    return _batch(rows, _told_and_asked(rows, rng, np.tile(told, (batch, 1)), np.tile(wanted, (batch, 1))))


def _stretches(
    text: np.ndarray, seed: int, index: int, batch: int, length: int, facts: int, shortest: int
) -> tuple[np.ndarray, np.random.Generator]:
    """[batch, length + 1] bytes of real text, and the generator for what goes into them."""
    if not 1 <= facts <= len(_NAMES):
        raise bad_value("facts", facts, f"1 to {len(_NAMES)}")
    rng = _draws(seed, index, length, shortest, 256, 256)
    if len(text) <= length + 1:
        raise bad_value("text", f"{len(text)} bytes", f"more than {length + 1}")
    places = rng.integers(len(text) - length - 1, size=batch)
    return text[places[:, None] + np.arange(length + 1)].astype(np.int64), rng


def _told_and_asked(rows: np.ndarray, rng: np.random.Generator, told: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Writes facts at `told` and questions with their answers at `wanted`, [batch, count] each; where it is asked."""
    batch, facts = told.shape
    every = np.arange(batch)[:, None]
    names = _NAMES[_chosen(rng, batch, len(_NAMES), facts)]
    answers = _ANSWERS[rng.integers(len(_ANSWERS), size=(batch, facts))]
    order = rng.permuted(np.tile(np.arange(wanted.shape[1]) % facts, (batch, 1)), axis=1)
    for places, which in ((told, np.tile(np.arange(facts), (batch, 1))), (wanted, order)):
        rows[every, places], rows[every, places + 1] = ord("@"), names[every, which]
        rows[every, places + 2] = answers[every, which]
    asked = np.zeros((batch, rows.shape[1] - 1), bool)
    asked[every, wanted + 1] = True
    return asked


def summaries(paths: Iterable[Path]) -> list[tuple[str, list[str]]]:
    """What people wrote as the summary of a text, and the text's own sentences: docstrings, whose first line sums up
    the rest by convention (PEP 257). Of those with at least five sentences after it, each of more than three words.

    Args:
        paths: of Python source.

    Raises:
        SyntaxError: a file that is no Python of this version.
    """
    found: list[tuple[str, list[str]]] = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                head, _, rest = text.partition("\n\n")
                sentences = [s for s in re.split(r"(?<=[.!?:])\s+|\n\n+", rest) if len(words(s)) > 3]
                if "\n" not in head and len(words(head)) > 3 and len(sentences) >= 5:
                    found.append((head, sentences))
    return found


def words(text: str) -> list[str]:
    """Of at least three letters, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Za-z]{3,}", text)]


TASKS: dict[str, Callable[..., Batch]] = {"copy": copy, "recall": recall, "needle": needle}


def _draws(seed: int, index: int, length: int, shortest: int, vocab: int, fewest: int) -> np.random.Generator:
    if length < shortest:
        raise bad_value("length", length, f"at least {shortest}")
    if vocab < fewest:
        raise bad_value("vocab", vocab, f"at least {fewest}")
    return np.random.Generator(np.random.Philox(key=(seed, index)))


def _chosen(rng: np.random.Generator, batch: int, among: int, count: int) -> np.ndarray:
    """[batch, count], in each row different integers below `among` in random order."""
    return rng.permuted(np.tile(np.arange(among), (batch, 1)), axis=1)[:, :count]


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
