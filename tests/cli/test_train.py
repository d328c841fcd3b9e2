"""`tilewise train` and `generate`: killed at any moment and resumed, a run ends with the same file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tilewise.cli import BAD_USAGE, FAILED, INTERRUPTED, OK, run
from tilewise.train import Shards, checkpoints

COMMAND = [sys.executable, "-m", "tilewise.cli"]
TINY = [
    "--dim", "16", "--layers", "1", "--heads", "2", "--length", "24", "--batch", "2", "--steps", "120", "--dropout",
    "0.1", "--warmup", "5", "--checkpoint-every", "20", "--device", "cpu",
]  # fmt: skip


def text_in(folder: Path) -> Path:
    path = folder / "text.py"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_in(tmp_path)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The final file of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("never_stopped")
    assert run(["train", str(text_in(folder)), "--out", str(folder / "out"), *TINY]) == OK
    return (folder / "out" / "model.safetensors").read_bytes()


def test_killed_and_resumed(
    text: Path, tmp_path: Path, never_stopped: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL before the first checkpoint, and again between two later ones."""
    killed = tmp_path / "killed"
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
    capsys.readouterr()
    assert run(["train", "--out", str(killed), "--resume", "--json"]) == OK
    assert (killed / "model.safetensors").read_bytes() == never_stopped
    said = json.loads(capsys.readouterr().out)
    assert said["held_out_loss"] < said["unigram_entropy"]
    assert len(list(killed.glob("step-*"))) == 3


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where a shell that started the suite in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_stopped_by_what_comes_from_outside(
    text: Path,
    tmp_path: Path,
    never_stopped: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C, and a disk that is full while a checkpoint, a measurement and the final weights are written: the last
    checkpoint stays, and the run that goes on from it ends like one that was never stopped."""
    out = tmp_path / "out"
    drawn = Shards.batch

    def interrupted(self: Shards, seed: int, step: int, *arguments: Any, **options: Any) -> Any:
        if step == 33:
            signal.raise_signal(signal.SIGINT)
        return drawn(self, seed, step, *arguments, **options)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def nothing_fits(*arguments: Any, **options: Any) -> None:
        raise full

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Shards, "batch", interrupted)
        assert run(["train", str(text), "--out", str(out), *TINY]) == INTERRUPTED
    said = capsys.readouterr().err
    assert f"--out {out} --resume` goes on from {out}/step-0000020.safetensors" in said
    for place in ("safetensors.torch.save_file", "tilewise.train.loop.Step._asdict", "pathlib.Path.replace"):
        with monkeypatch.context() as patched:
            patched.setattr(place, nothing_fits)
            assert run(["train", "--out", str(out), "--resume"]) == FAILED
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert "step-0000020.safetensors" in said
        assert [path.name for path in out.glob("*step*")] == ["step-0000020.safetensors"]
    assert run(["train", "--out", str(out), "--resume", "--json"]) == OK
    assert (out / "model.safetensors").read_bytes() == never_stopped
    capsys.readouterr()
    saved = checkpoints.write

    def all_but_the_last(path: Path, *arguments: Any) -> None:
        if path.name == "model.safetensors":
            raise full
        saved(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write", all_but_the_last)
        assert run(["train", str(text), "--out", str(tmp_path / "late"), *TINY]) == FAILED
    assert "step-0000100.safetensors" in capsys.readouterr().err
    assert run(["train", "--out", str(tmp_path / "late"), "--resume"]) == OK
    assert (tmp_path / "late" / "model.safetensors").read_bytes() == never_stopped


def test_damaged_runs(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of another mechanism, a cut one, damaged tokens and settings; once they are gone, all is well.
    And two at once."""
    out, other = tmp_path / "out", tmp_path / "other"
    for folder, mechanism in ((out, "mha"), (other, "gqa")):
        options = [*TINY, "--steps", "40", "--mechanism", mechanism]
        assert run(["train", str(text), "--out", str(folder), *options, "--json"]) == OK
    capsys.readouterr()
    newest = out / "step-0000030.safetensors"

    def says(*words: str) -> None:
        assert run(["train", "--out", str(out), "--resume"]) == BAD_USAGE
        said = capsys.readouterr().err
        assert all(each in said for each in words), said
        assert "Traceback" not in said

    shutil.copy(other / "step-0000020.safetensors", newest)
    says("with another model", "'mechanism': 'mha'")
    newest.write_bytes(newest.read_bytes()[:-9])
    says(str(newest), "without this file `--resume` goes on from the checkpoint before it")
    newest.unlink()
    (out / "tokens" / "00000.bin").write_bytes(b"ab")
    says("with 1 tokens", "delete it; it is made again")
    shutil.rmtree(out / "tokens")
    text.write_text(text.read_text() + "# one line more\n")
    says("with another text")
    shutil.rmtree(out / "tokens")
    text.write_text(text.read_text()[: -len("# one line more\n")])
    assert run(["train", "--out", str(out), "--resume", "--json"]) == OK
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    says(f"another process is training in {out}")
    os.close(handle)
    (out / "run.json").write_text("{")
    says("run.json cannot be read")


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
    for arguments, says in [
        ([str(empty)], "text: got no text"),
        ([str(binary)], "which is not UTF-8 at byte 0"),
        ([str(tmp_path / "gone")], "which does not exist"),
        ([str(text), "--mechanism", "magic"], "mechanism: got 'magic'"),
        ([str(text), "--length", "100000"], "a text longer than a sequence"),
        ([str(text), "--mechanism", "linear", "--documents", *TINY], "linear sums over all"),
        (["--resume"], "holds no run"),
        ([str(text), "--out", str(text / "run")], "Not a directory"),
        (["--out", str(text / "run"), "--resume"], "holds no run"),
    ]:
        assert run(["train", "--out", str(tmp_path / "run"), "--device", "cpu", *arguments]) == BAD_USAGE
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    assert run(["train", str(text), "--out", str(tmp_path / "run"), *TINY, "--steps", "2"]) == OK
    capsys.readouterr()
    diverging = [str(text), *TINY, "--lr", "1e20", "--clip", "1e20", "--out", str(tmp_path / "diverging")]
    assert run(["train", *diverging]) == FAILED
    assert "Fix: a smaller --lr" in capsys.readouterr().err
    assert run(["generate", str(tmp_path / "gone")]) == BAD_USAGE
    assert "a file that `tilewise train` wrote" in capsys.readouterr().err
