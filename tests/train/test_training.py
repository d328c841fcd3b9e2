"""The loop: it learns, every state can be taken up again bit for bit, and what goes wrong loses nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tilewise.models import GPT, GPTConfig
from tilewise.train import TrainConfig, Trainer, checkpoints, files, latest, read
from tilewise.train.loop import FINAL, METRICS, DivergedError, read_metrics
from tilewise.train.plot import plot
from tilewise.train.shards import Batch

SMALL = GPTConfig(vocab_size=13, length=16, dim=16, layers=1, heads=2, dropout=0.1)
PLAN = TrainConfig(steps=40, batch=4, length=16, lr=1e-2, warmup=4, checkpoint_every=10, log_every=5, accumulate=2)


def batch_of(index: int) -> Batch:
    """Counting modulo 13 from anywhere: all that there is to learn."""
    start = torch.randint(13, (4, 1), generator=torch.Generator().manual_seed(index))
    row = (start + torch.arange(17)) % 13
    return Batch(row[:, :-1], row[:, 1:], None)


def trainer_of(folder: Path, plan: TrainConfig = PLAN, config: GPTConfig = SMALL, **options: Any) -> Trainer:
    torch.manual_seed(plan.seed)
    return Trainer(GPT(config), options.pop("batch_of", batch_of), plan, folder, described={"text": "13"}, **options)


def test_it_learns_and_tells(tmp_path: Path) -> None:
    steps = list(trainer_of(tmp_path).run())
    assert [step.step for step in steps] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert steps[0].loss > 2.0
    assert steps[-1].loss < 0.7
    assert steps[-1].tokens == 40 * 2 * 4 * 16
    assert all(step.tokens_per_second > 0 and step.memory > 0 for step in steps)
    assert read_metrics(tmp_path / METRICS) == steps
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{n:07d}.safetensors" for n in (10, 20, 30)]
    plot(steps, tmp_path / "curves.svg", unigram=2.5)
    assert (tmp_path / "curves.svg").read_text().count("<path") > 4
    final = read(tmp_path / FINAL)
    assert final.described["step"] == 40
    assert final.described["train"]["lr"] == PLAN.lr


def test_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Also where dropout draws, and where a killed run had measured further and written half a line."""
    list(trainer_of(tmp_path / "whole").run())
    stopped = trainer_of(tmp_path / "stopped")
    for step in stopped.run():
        if step.step == 25:
            break
    with (tmp_path / "stopped" / METRICS).open("a") as metrics:
        metrics.write('{"step": 99, "lo')
    again = trainer_of(tmp_path / "stopped")
    path = latest(tmp_path / "stopped")
    assert path is not None
    assert path.name == "step-0000020.safetensors"
    torch.manual_seed(12345)
    again.resume(path)
    list(again.run())
    assert (tmp_path / "stopped" / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
    kept, whole = (read_metrics(tmp_path / name / METRICS) for name in ("stopped", "whole"))
    assert [step[:4] for step in kept] == [step[:4] for step in whole]


def test_schedule() -> None:
    plan = replace(PLAN, steps=100, warmup=10, lr=1.0)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert max(rates) == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """Two passes of four sequences and one of eight give one gradient, so one next loss."""

    def wide(index: int) -> Batch:
        first, second = batch_of(2 * index), batch_of(2 * index + 1)
        return Batch(torch.cat([first.ids, second.ids]), torch.cat([first.targets, second.targets]), None)

    config = replace(SMALL, dropout=0.0)
    plan = replace(PLAN, steps=3, log_every=1)
    split = list(trainer_of(tmp_path / "a", plan, config).run())
    whole = list(trainer_of(tmp_path / "b", replace(plan, accumulate=1, batch=8), config, batch_of=wide).run())
    for a, b in zip(split, whole, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_weights_beside_a_vector_decay(tmp_path: Path) -> None:
    groups = trainer_of(tmp_path).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [PLAN.weight_decay, 0.0]
    assert all(p.dim() < 2 for p in groups[1]["params"])
    assert all(p.dim() >= 2 for p in groups[0]["params"])


class Poisoned(torch.nn.Module):
    """A GPT whose loss is no number from some pass on."""

    def __init__(self, inner: GPT, first: int) -> None:
        super().__init__()
        self.inner, self.first, self.calls = inner, first, 0

    def forward(self, ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        self.calls += 1
        loss = self.inner(ids, targets, documents=documents)
        return loss * float("nan") if self.calls >= self.first else loss


def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plan = replace(PLAN, accumulate=1)
    trainer = Trainer(Poisoned(GPT(SMALL), 23), batch_of, plan, tmp_path, described={})
    with pytest.raises(DivergedError, match=r"step 23: the loss is nan.*step-0000020.* is the last good checkpoint"):
        list(trainer.run())
    path = latest(tmp_path)
    assert path is not None
    assert all(x.isfinite().all() for x in read(path).tensors.values())
    assert not (tmp_path / FINAL).exists()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """The file size limit stands for the disk: writing fails in the middle of the file."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from pathlib import Path
        from tilewise.train import checkpoints
        path = Path(sys.argv[1]) / "step-0000001.safetensors"
        checkpoints.write(path, {"x": torch.zeros(10)}, {"step": 1})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints.write(path, {"x": torch.ones(100_000)}, {"step": 1})
        except OSError as problem:
            print("said:", problem)
        """
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "could not be written" in run.stdout, run.stderr
    assert "what was there before is untouched" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001.safetensors"]
    assert not read(tmp_path / "step-0000001.safetensors").tensors["x"].any()


def test_checkpoints_of_another_run(tmp_path: Path) -> None:
    list(trainer_of(tmp_path).run())
    path = latest(tmp_path)
    assert path is not None
    with pytest.raises(ValueError, match=r"training lr = 0\.01; wants 0\.5"):
        trainer_of(tmp_path, replace(PLAN, lr=0.5)).resume(path)
    with pytest.raises(ValueError, match="wants the weights of this model"):
        trainer_of(tmp_path, config=replace(SMALL, dim=32)).resume(path)
    with pytest.raises(ValueError, match="with another text"):
        Trainer(GPT(SMALL), batch_of, PLAN, tmp_path, described={"text": "14"}).resume(path)
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    with pytest.raises(ValueError, match="a file that `tilewise train` wrote"):
        read(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint: got .*gone"):
        read(tmp_path / "gone.safetensors")
    checkpoints.write(tmp_path / "next.safetensors", {"x": torch.zeros(1)}, {"version": checkpoints.VERSION + 1})
    with pytest.raises(ValueError, match=r"of version 3; wants version 2\. Fix: the release of tilewise that wrote"):
        read(tmp_path / "next.safetensors")


def test_files_are_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "numbers"
    files.write(path, np.arange(5, dtype=np.int64)[::2])
    assert np.fromfile(path, np.int64).tolist() == [0, 2, 4]

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"numbers: could not be written \(No space left on device\)"):
        files.write(path, "größer")
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == ["numbers"]
    assert path.stat().st_size == 24
    files.write(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    """Cut short anywhere, or one bit turned anywhere: told, never trained from."""
    path = tmp_path / "step-0000001.safetensors"
    checkpoints.write(path, {"x": torch.randn(50), "y": torch.ones(3, dtype=torch.bfloat16)}, {"step": 1})
    whole = path.read_bytes()
    assert read(path).tensors["y"].dtype == torch.bfloat16
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"checkpoint: got .*0000001.*without this file `--resume` goes on from"):
            read(path)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"checkpoint: got "):
            read(path)


def test_a_checkpoint_without_moments(tmp_path: Path) -> None:
    list(trainer_of(tmp_path).run())
    path = latest(tmp_path)
    assert path is not None
    found = read(path)
    found.tensors.pop("first.wte.weight")
    checkpoints.write(path, found.tensors, found.described)
    with pytest.raises(ValueError, match=r"first\.wte\.weight.*wants the weights of this model"):
        trainer_of(tmp_path).resume(path)


def test_the_loop_leaves_the_generators_of_others_alone(tmp_path: Path) -> None:
    """What dropout draws is its own, whatever else a process draws between the steps."""
    finals = []
    for name, noisy in (("quiet", False), ("noisy", True)):
        trainer = trainer_of(tmp_path / name)
        torch.manual_seed(9)
        drawn = [torch.rand(()).item() for _ in trainer.run() if noisy]
        finals.append((tmp_path / name / FINAL).read_bytes())
    torch.manual_seed(9)
    assert drawn == [torch.rand(()).item() for _ in drawn]
    assert finals[0] == finals[1]


def test_bad_plans() -> None:
    for change, message in [
        ({"steps": 0}, "steps: got 0"),
        ({"batch": 1.5}, "batch: got 1.5"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"lr": float("nan")}, "lr: got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(PLAN, **change)


def test_autocast(tmp_path: Path) -> None:
    plan = replace(PLAN, autocast="bfloat16", steps=40)
    assert list(trainer_of(tmp_path, plan).run())[-1].loss < 0.6


def test_metrics_are_json(tmp_path: Path) -> None:
    list(trainer_of(tmp_path, replace(PLAN, steps=5)).run())
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert set(json.loads(line)) == {
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "flops", "memory",
    }  # fmt: skip
