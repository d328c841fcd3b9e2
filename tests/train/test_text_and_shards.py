"""Text to tokens to batches: nothing lost, nothing mixed up, the same for the same seed and step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tilewise.train import shards as module
from tilewise.train import text
from tilewise.train.shards import Shards, prepare
from tilewise.train.tokenizers import BytePairs, Bytes, Tokenizer, load

TEXTS = ["def f(x):\n    return x + 1\n" * 5, "größer — 日本語 \N{ROCKET}\n", "a" * 40, "class A: pass\n" * 9]


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "bytes":
        return Bytes()
    pytest.importorskip("tokenizers")
    return BytePairs.learn(TEXTS, 300)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_tokenizer_gives_back_what_it_took(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    again = load(tokenizer.save())
    assert again.vocab_size == tokenizer.vocab_size
    for each in [*TEXTS, "".join(map(chr, range(1, 300)))]:
        tokens = tokenizer.encode(each)
        assert tokens.max() < tokenizer.vocab_size
        assert tokenizer.end not in tokens
        assert tokenizer.decode(tokens.tolist()).decode() == each
        assert np.array_equal(again.encode(each), tokens)
    if kind == "bpe":
        assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
        with pytest.raises(ValueError, match="vocab_size: got 256"):
            BytePairs.learn(TEXTS, 256)


@pytest.mark.parametrize("size", [7, 64, 1 << 20])
def test_batches(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the tokens are cut into files, a batch is a stretch of the whole, and its targets are one further on."""
    monkeypatch.setattr(module, "SHARD_TOKENS", size)
    shards = prepare(TEXTS, Bytes(), tmp_path)
    whole = b"".join(each.encode() + b"\0" for each in TEXTS)
    ends = np.cumsum([len(each.encode()) + 1 for each in TEXTS])
    assert shards.tokens == len(whole)
    for step in range(20):
        batch = shards.batch(3, step, 4, 6, documents=True)
        assert batch.documents is not None
        for ids, targets, documents in zip(*(x.tolist() for x in batch), strict=True):
            stretch = bytes(0 if token == 256 else token for token in [*ids, targets[-1]])
            assert ids[1:] == targets[:-1]
            places = [i for i in range(shards.trained) if whole[i : i + 7] == stretch]
            assert places
            owners = [[int(np.searchsorted(ends, p + i, side="right")) + 1 for i in range(6)] for p in places]
            assert documents in owners
        again = Shards(tmp_path).batch(3, step, 4, 6)
        assert again.ids.equal(batch.ids)
        assert not shards.batch(4, step, 4, 6).ids.equal(batch.ids)
    held = shards.held_out(3, 50)
    assert bytes(0 if t == 256 else t for t in held.ids[0].tolist()) in whole[shards.trained :]


def test_entropy(tmp_path: Path) -> None:
    shards = prepare(["ab" * 50], Bytes(), tmp_path)
    p = np.array([50, 50, 1]) / 101
    assert math.isclose(shards.unigram_entropy, float(-(p * np.log(p)).sum()))


def test_a_folder_is_walked_in_order(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.txt", "a/y.bin", ".hidden/x.py", "__pycache__/c.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert [path.name for path in text.find([tmp_path])] == ["z.txt", "b.py"]
    assert list(text.documents(text.find([tmp_path]), most=8)) == ["a/z.txt", "b"]
    assert len(text.find([text.default_folder()])) > 100


def test_bad_text(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("größer".encode("latin1"))
    with pytest.raises(ValueError, match=r"latin\.txt, which is not UTF-8 at byte 2; wants text\. Fix: iconv"):
        list(text.documents([latin]))
    with pytest.raises(ValueError, match="which does not exist"):
        text.find([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a text file"):
        text.find([tmp_path / "empty"])
    with pytest.raises(ValueError, match="text: got no text"):
        prepare([], Bytes(), tmp_path / "tokens")
    with pytest.raises(ValueError, match="a folder of tokens with its"):
        Shards(tmp_path / "tokens")
    shards = prepare(["short"], Bytes(), tmp_path / "tokens")
    with pytest.raises(ValueError, match="length: got 100 tokens of a text with 5"):
        shards.batch(0, 0, 1, 100)
    (tmp_path / "tokens" / "00000.bin").write_bytes(b"ab")
    with pytest.raises(ValueError, match="with 1 tokens; wants 6"):
        Shards(tmp_path / "tokens")
    for name, content in (("index.json", "{"), ("index.json", "{}"), ("00000.bin", "")):
        kept = (tmp_path / "tokens" / name).read_bytes()
        (tmp_path / "tokens" / name).write_text(content)
        with pytest.raises(ValueError, match=r"folder: got .*wants the tokens.*Fix: delete it; it is made again"):
            Shards(tmp_path / "tokens")
        (tmp_path / "tokens" / name).write_bytes(kept)
    (tmp_path / "tokens" / "documents.bin").unlink()
    with pytest.raises(ValueError, match=r"documents\.bin"):
        Shards(tmp_path / "tokens")
