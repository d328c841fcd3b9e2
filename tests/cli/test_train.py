"""`tilewise train` and `generate`: killed at any moment and resumed, a run ends with the same file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewise.cli import BAD_USAGE, FAILED, OK, run

COMMAND = [sys.executable, "-c", "import sys; from tilewise.cli import run; sys.exit(run())"]
TINY = [
    "--dim", "16", "--layers", "1", "--heads", "2", "--length", "24", "--batch", "2", "--steps", "120", "--dropout",
    "0.1", "--warmup", "5", "--checkpoint-every", "20", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    return path


def test_killed_and_resumed(text: Path, tmp_path: Path) -> None:
    """SIGKILL before the first checkpoint, and again between two later ones."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*COMMAND, "train", str(text), "--out", str(whole), *TINY], check=False).returncode == OK
    arguments = [str(text), *TINY]
    for lines in (1, 7):
        process = subprocess.Popen([*COMMAND, "train", "--out", str(killed), *arguments], stderr=subprocess.DEVNULL)
        metrics = killed / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and metrics.read_text().count("\n") >= lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL
        arguments = ["--resume"]
    assert not (killed / "model.safetensors").exists()
    done = subprocess.run(
        [*COMMAND, "train", "--out", str(killed), "--resume", "--json"], capture_output=True, check=False
    )
    assert done.returncode == OK, done.stderr
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    said = json.loads(done.stdout)
    assert said["held_out_loss"] < said["unigram_entropy"]
    assert len(list(killed.glob("step-*"))) == 3


def test_what_is_trained_speaks(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = [*TINY[:-6], "--checkpoint-every", "5", "--device", "cpu", "--steps", "12", "--mechanism", "retention"]
    assert run(["train", str(text), "--out", str(out), *options, "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["tokens"] > 1000
    assert (out / "metrics.svg").is_file()
    for source in (out, out / "step-0000010.safetensors"):
        assert run(["generate", str(source), "--prompt", "def ", "--tokens", "9", "--seed", "3", "--json"]) == OK
        assert json.loads(capsys.readouterr().out)["tokens"] == 9
    texts = []
    for _ in range(2):
        assert run(["generate", str(out), "--tokens", "20", "--seed", "4", "--top-p", "0.9", "--top-k", "50"]) == OK
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def ")
    assert run(["train", str(text), "--out", str(out)]) == BAD_USAGE
    assert "already holds a run" in capsys.readouterr().err
    assert run(["train", "--out", str(out), "--resume", "--lr", "0.5"]) == BAD_USAGE
    assert "has lr = 0.003, not 0.5" in capsys.readouterr().err


def test_byte_pairs_and_documents(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    options = [*TINY, "--steps", "3", "--tokens", "bpe", "--vocab-size", "300", "--documents", "--json"]
    assert run(["train", str(text), "--out", str(tmp_path / "out"), *options]) == OK
    assert json.loads(capsys.readouterr().out)["tokens"] < text.stat().st_size / 2
    assert run(["generate", str(tmp_path / "out"), "--tokens", "5"]) == OK
    capsys.readouterr()


def test_mistakes_are_one_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for i, (arguments, says) in enumerate(
        [
            ([str(empty)], "text: got no text"),
            ([str(binary)], "which is not UTF-8 at byte 0"),
            ([str(tmp_path / "gone")], "which does not exist"),
            ([str(text), "--mechanism", "magic"], "mechanism: got 'magic'"),
            ([str(text), "--length", "100000"], "a text longer than a sequence"),
            ([str(text), "--mechanism", "linear", "--documents", *TINY], "linear sums over all"),
            (["--resume"], "holds no run"),
        ]
    ):
        assert run(["train", *arguments, "--out", str(tmp_path / f"run{i}"), "--device", "cpu"]) == BAD_USAGE
        assert says in capsys.readouterr().err
    diverging = [str(text), *TINY, "--lr", "1e20", "--clip", "1e20", "--out", str(tmp_path / "diverging")]
    assert run(["train", *diverging]) == FAILED
    assert "Fix: a smaller --lr" in capsys.readouterr().err
    assert run(["generate", str(tmp_path / "gone")]) == BAD_USAGE
    assert "a file that `tilewise train` wrote" in capsys.readouterr().err
