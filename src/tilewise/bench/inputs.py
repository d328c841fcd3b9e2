"""Q, K and V from real text: bytes through the first half of a small transformer block.

The weights are random but seeded, scaled so that q and k have entries of unit variance: scores then spread as those
of a block at the start of training, and repeated bytes attend to each other, which independent noise never shows.
"""

from __future__ import annotations

import codecs
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tilewise.errors import bad_value


class Text(NamedTuple):
    """Bytes to run through the block, and where they come from."""

    name: str
    data: bytes


class Inputs(NamedTuple):
    """q, k, v [1, H, N, D], contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor


def default_text() -> Text:
    """The topics of Python's own help: about 700 kB of English that every CPython has."""
    from pydoc_data.topics import topics

    return Text("Python's help topics", "\n".join(topics[name] for name in sorted(topics)).encode())


MOST_TEXT = 2**26
"""Bytes that are read of a file: more tokens than any machine compares methods on."""


def read_text(path: Path) -> Text:
    """The text in `path`, or the first 64 MiB of it.

    Raises:
        ValueError: the file is missing, unreadable, empty or not UTF-8 text; the message says which.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_TEXT)
    except OSError as problem:
        reason = (problem.strerror or "unreadable").lower()
        raise bad_value("text", f"{str(path)!r} ({reason})", "a readable file") from problem
    if not data.strip():
        raise bad_value("text", f"{str(path)!r}, which is empty", "a file with text in it")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < MOST_TEXT)
    except UnicodeDecodeError as problem:
        raise bad_value("text", f"{str(path)!r}, which is not UTF-8", "a text file", "convert it to UTF-8") from problem
    if "\0" in text:
        raise bad_value("text", f"{str(path)!r}, which holds NUL bytes", "a text file, not a binary one")
    return Text(path.name, data)


def attention_inputs(
    text: Text,
    *,
    length: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """q, k, v [1, heads, length, head_dim] of the first `length` bytes; a shorter text is repeated.

    Byte embedding + sinusoidal positions, layer norm, then the three projections, all in float32 on the CPU, so that
    every device and dtype gets the same numbers up to its own rounding.
    """
    dim = heads * head_dim
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.from_numpy(np.resize(np.frombuffer(text.data, dtype=np.uint8), length)).long()
    embedding = torch.randn(256, dim, generator=generator)
    x = F.layer_norm(embedding[tokens] + sinusoids(length, dim), (dim,))
    projected = [x @ (torch.randn(dim, dim, generator=generator) / math.sqrt(dim)) for _ in range(3)]
    return Inputs(*(_split_heads(p, heads).to(device, dtype) for p in projected))


def sinusoids(length: int, dim: int) -> Tensor:
    """Positions [length, dim] as in "Attention is all you need", section 3.5; an odd `dim` drops the last cosine."""
    frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :dim]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, H·D] to [1, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1).unsqueeze(0).contiguous()
