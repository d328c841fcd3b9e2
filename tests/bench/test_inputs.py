from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tilewise.bench import inputs
from tilewise.bench.inputs import Text, attention_inputs, default_text, read_text, sinusoids


def test_default_text_is_long_english() -> None:
    text = default_text()
    assert len(text.data) > 100_000
    assert b" the " in text.data


@pytest.mark.parametrize(("length", "heads", "head_dim"), [(1, 1, 1), (2, 3, 7), (65, 2, 40), (113, 8, 64)])
def test_shapes_and_layout(length: int, heads: int, head_dim: int) -> None:
    for tensor in attention_inputs(Text("t", b"some text, "), length=length, heads=heads, head_dim=head_dim):
        assert tensor.shape == (1, heads, length, head_dim)
        assert tensor.is_contiguous()
        assert tensor.isfinite().all()


def test_same_text_same_numbers_and_the_global_generator_is_left_alone() -> None:
    text = Text("t", b"the quick brown fox jumps over the lazy dog")
    state = torch.get_rng_state()
    first = attention_inputs(text, length=63, heads=2, head_dim=16)
    again = attention_inputs(text, length=63, heads=2, head_dim=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = attention_inputs(Text("t", b"a different text of about the same length"), length=63, heads=2, head_dim=16)
    assert not torch.equal(first.q, other.q)
    assert not torch.equal(first.q, first.k)


def test_a_short_text_repeats() -> None:
    """Rows of the same byte differ by their position alone, so with equal positions they would be equal."""
    once = attention_inputs(Text("t", b"abc"), length=7, heads=1, head_dim=8)
    written_out = attention_inputs(Text("t", b"abcabca"), length=7, heads=1, head_dim=8)
    assert torch.equal(once.q, written_out.q)


def test_longer_inputs_begin_with_the_shorter_ones() -> None:
    text = default_text()
    short = attention_inputs(text, length=64, heads=2, head_dim=32)
    long = attention_inputs(text, length=200, heads=2, head_dim=32)
    torch.testing.assert_close(long.k[:, :, :64], short.k)


def test_scores_spread_as_at_the_start_of_training() -> None:
    """q and k have entries of unit variance, so attention is neither uniform nor a single key."""
    q, k, _ = attention_inputs(default_text(), length=512, heads=8, head_dim=64)
    assert 0.9 < q.std() < 1.1
    assert 0.9 < k.std() < 1.1
    assert 0.5 < (q @ k.mT / 8).std() < 2


def test_dtype() -> None:
    assert (
        attention_inputs(Text("t", b"x"), length=3, heads=1, head_dim=4, dtype=torch.bfloat16).v.dtype == torch.bfloat16
    )


def test_sinusoids_follow_their_formula() -> None:
    table = sinusoids(5, 7).double()
    for position in range(5):
        for pair in range(3):
            angle = torch.tensor(position / 10000 ** (2 * pair / 7), dtype=torch.float64)
            assert table[position, 2 * pair] == pytest.approx(angle.sin().item(), abs=1e-6)
            assert table[position, 2 * pair + 1] == pytest.approx(angle.cos().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"\x89PNG\xff\xfe", "not UTF-8"), (b"text\0more", "NUL")],
)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as refusal:
        read_text(path)
    assert "\n" not in str(refusal.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_text(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a directory"):
        read_text(tmp_path)


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "näme.txt"
    path.write_text("Grüße", encoding="utf-8")
    assert read_text(path) == ("näme.txt", "Grüße".encode())


def test_of_a_long_file_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut within a character, which is no reason to refuse it; a character cut at the end of a file is one."""
    monkeypatch.setattr(inputs, "MOST_TEXT", 7)
    long, torn = tmp_path / "long.txt", tmp_path / "torn.txt"
    long.write_bytes("ääääää".encode())
    assert read_text(long).data == "ääää".encode()[:7]
    torn.write_bytes("äää".encode()[:5])
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(torn)
