"""Text to numbers: bytes as they are, or byte pairs learned from the text itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from tilewise.errors import bad_value


class Tokenizer(Protocol):
    """What training and generation ask of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int:
        """The token that ends a document."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """[tokens] uint16."""
        ...

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Bytes of UTF-8; a cut may fall inside a character."""
        ...

    def save(self) -> str:
        """What `load` makes it of again."""
        ...


class Bytes:
    """256 bytes of UTF-8 and an end."""

    vocab_size = 257
    end = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return bytes(token for token in tokens if token < self.end)

    def save(self) -> str:
        return json.dumps({"kind": "bytes"})


class BytePairs:
    """Byte pairs (Sennrich et al., 2016) over GPT-2's words, by the `tokenizers` library."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        self.end: int = inner.token_to_id(_END)
        self._bytes = {number: _as_bytes(word) for word, number in inner.get_vocab().items() if word != _END}

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> BytePairs:
        """Learned from `texts`: the same texts give the same tokens.

        Raises:
            ValueError: a vocabulary below the 256 bytes and the end, or beyond 16 bits.
        """
        from tokenizers import Tokenizer as Inner
        from tokenizers import models, pre_tokenizers, trainers

        if not 257 <= vocab_size <= 1 << 16:
            raise bad_value("vocab_size", vocab_size, "257 to 65536 tokens")
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.uint16)

    def decode(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self._bytes.get(token, b"") for token in tokens)

    def save(self) -> str:
        return json.dumps({"kind": "bpe", "tokenizer": json.loads(self._inner.to_str())})


_END = "<|endoftext|>"


def _alphabet() -> dict[str, int]:
    """GPT-2 writes bytes that print as themselves, and the others as the characters from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _as_bytes(word: str) -> bytes:
    return bytes(_ALPHABET[character] for character in word)


def load(saved: str) -> Tokenizer:
    """The tokenizer that `save` described.

    Raises:
        ValueError: a kind that is not known here.
    """
    described = json.loads(saved)
    if described["kind"] == "bytes":
        return Bytes()
    if described["kind"] == "bpe":
        from tokenizers import Tokenizer as Inner

        return BytePairs(Inner.from_str(json.dumps(described["tokenizer"])))
    raise bad_value("tokenizer", described["kind"], "bytes or bpe")
