"""Tokens on disk, memory-mapped: written once, read in any order, the same batch for the same seed and step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tilewise.errors import bad_value
from tilewise.train import files
from tilewise.train.tokenizers import Tokenizer, load

SHARD_TOKENS = 1 << 26
"""Tokens of one file: 128 MiB."""

HELD_OUT = 0.02
"""Share of the tokens, at the end, that is never trained on."""

INDEX = "index.json"


class Batch(NamedTuple):
    """Inputs, the token after each, and, where asked for, which document each token is of: all [B, N] int64."""

    ids: Tensor
    targets: Tensor
    documents: Tensor | None


class Shards:
    """Tokens that `prepare` wrote. Nothing but what a batch needs is read.

    Args:
        folder: where they are.

    Raises:
        ValueError: the folder holds none, or other ones than it says.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise bad_value("folder", folder, "a folder of tokens with its index.json")
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.fingerprint: str = index["fingerprint"]
            self.tokens: int = index["tokens"]
            self.counts = np.array(index["counts"], np.int64)
            self.tokenizer = load(index["tokenizer"])
            self._starts = np.fromfile(folder / "documents.bin", np.int64)
            self._files = [np.memmap(folder / name, np.uint16, "r") for name in index["files"]]
        except (OSError, ValueError, KeyError) as problem:
            fix = "delete it; it is made again"
            raise bad_value("folder", f"{folder} ({problem})", "the tokens that were written there", fix) from problem
        if sum(map(len, self._files)) != self.tokens:
            found = sum(map(len, self._files))
            raise bad_value("folder", f"{folder} with {found} tokens", f"{self.tokens}", "delete it; it is made again")

    @property
    def unigram_entropy(self) -> float:
        """Loss in nats a token of a model that knows how often each token is, and nothing else."""
        share = self.counts[self.counts > 0] / self.counts.sum()
        return float(-(share * np.log(share)).sum())

    @property
    def trained(self) -> int:
        """Tokens before those held out."""
        return self.tokens - max(1, math.ceil(self.tokens * HELD_OUT))

    def batch(self, seed: int, step: int, batch: int, length: int, *, documents: bool = False) -> Batch:
        """`batch` stretches of `length` tokens from anywhere in what is trained on: a pure function of its arguments.

        Raises:
            ValueError: a text shorter than a stretch.
        """
        room = self.trained - length
        if room < 1:
            got = f"{length} tokens of a text with {self.trained}"
            raise bad_value("length", got, "a text longer than a sequence", "more text, or a smaller --length")
        places = np.random.Generator(np.random.Philox(key=(seed, step))).integers(room, size=batch)
        return self._stretches(places, length, documents)

    def held_out(self, batch: int, length: int) -> Batch:
        """Up to `batch` stretches of what is never trained on, spread evenly; shorter ones where there is less."""
        room = self.tokens - self.trained
        length = min(length, room - 1)
        if length < 1:
            raise bad_value("text", f"{room} tokens held out", "at least 2", "more text")
        most = max(1, min(batch, (room - 1) // length))
        places = self.trained + np.linspace(0, room - 1 - length, most).astype(np.int64)
        return self._stretches(places, length, False)

    def _stretches(self, places: np.ndarray, length: int, documents: bool) -> Batch:
        rows = np.stack([self._read(int(place), length + 1) for place in places]).astype(np.int64)
        ids = None
        if documents:
            positions = places[:, None] + np.arange(length)
            ids = torch.from_numpy(np.searchsorted(self._starts, positions, side="right"))
        whole = torch.from_numpy(rows)
        return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), ids)

    def _read(self, start: int, count: int) -> np.ndarray:
        first, offset = divmod(start, SHARD_TOKENS)
        part = self._files[first][offset : offset + count]
        if len(part) == count:
            return part
        return np.concatenate([part, self._files[first + 1][: count - len(part)]])


def prepare(texts: Iterable[str], tokenizer: Tokenizer, folder: Path) -> Shards:
    """Write the tokens of `texts`, each followed by the tokenizer's end, into `folder`, and open them.

    The index is written last: what a killed run left behind is not taken for whole.

    Raises:
        ValueError: there is no text.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    names: list[str] = []
    starts, total = [], 0
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    digest = hashlib.sha256(tokenizer.save().encode())
    waiting: list[np.ndarray] = []

    def write(*, everything: bool) -> None:
        joined = np.concatenate(waiting)
        whole = len(joined) if everything else len(joined) - len(joined) % SHARD_TOKENS
        for at in range(0, whole, SHARD_TOKENS):
            names.append(f"{len(names):05d}.bin")
            files.write(folder / names[-1], joined[at : min(at + SHARD_TOKENS, whole)])
        waiting[:] = [joined[whole:]]

    for text in texts:
        tokens = np.append(tokenizer.encode(text), np.uint16(tokenizer.end))
        starts.append(total)
        total += len(tokens)
        counts += np.bincount(tokens, minlength=tokenizer.vocab_size)
        digest.update(tokens.tobytes())
        waiting.append(tokens)
        if total - len(names) * SHARD_TOKENS >= SHARD_TOKENS:
            write(everything=False)
    if total == 0:
        raise bad_value("text", "no text", "at least one document that is not empty")
    write(everything=True)
    files.write(folder / "documents.bin", np.array(starts, np.int64))
    index = {
        "fingerprint": digest.hexdigest(),
        "tokens": total,
        "counts": counts.tolist(),
        "tokenizer": tokenizer.save(),
        "files": names,
    }
    files.write(folder / INDEX, json.dumps(index))
    return Shards(folder)
