"""Two processes that train one model on a CPU: the run of one process, up to rounding; and none waits for a failed one.

`torchrun` starts this file itself; each scenario leaves its findings in a folder, and the tests look at them. The last
scenario is a process that fails alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tilewise.cli import BAD_USAGE, FAILED, OK, run
from tilewise.models import GPT, GPTConfig
from tilewise.train import Processes, TrainConfig, Trainer, checkpoints, joined, latest
from tilewise.train.loop import FINAL, METRICS, DivergedError, read_metrics
from tilewise.train.processes import ElsewhereError
from tilewise.train.shards import Batch

CONFIG = GPTConfig(vocab_size=13, length=16, dim=18, layers=2, heads=3)
PLAN = TrainConfig(steps=8, batch=4, length=16, lr=1e-2, warmup=2, checkpoint_every=3, log_every=2, accumulate=2)
TINY = [
    "--dim", "16", "--layers", "1", "--heads", "2", "--length", "24", "--steps", "8", "--warmup", "2",
    "--checkpoint-every", "4", "--device", "cpu", "--json",
]  # fmt: skip


def batch_of(index: int) -> Batch:
    """Counting modulo 13; the rows count for ever less of the loss, and the last process's of the first pass for
    nothing."""
    start = torch.randint(13, (4, 1), generator=torch.Generator().manual_seed(index))
    row = (start + torch.arange(17)) % 13
    targets = row[:, 1:].clone()
    for i in range(4):
        targets[i, : 4 * i] = -100
    targets[2:] = -100 if index == 0 else targets[2:]
    return Batch(row[:, :-1], targets, torch.arange(16).expand(4, 16) // 7)


def trainer_of(
    folder: Path, processes: Processes, plan: TrainConfig = PLAN, config: GPTConfig = CONFIG, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    model = GPT(config)
    model.saving = "block"
    processes.shard(model, model.blocks)
    given = {"described": {"text": "13"}, "batch_of": batch_of} | options
    return Trainer(model, given.pop("batch_of"), plan, folder, processes=processes, **given)


def stop_at(trainer: Trainer, last: int) -> None:
    for step in trainer.run():
        if step.step == last:
            return


def scenarios(folder: Path, processes: Processes) -> dict[str, Any]:
    """What a process finds."""
    found: dict[str, Any] = {}
    trainer = trainer_of(folder / "two", processes)
    weights = list(trainer.named.values())
    held = sum(p.to_local().numel() for p in weights)  # type: ignore[operator]
    found["share"] = held / sum(p.numel() for p in weights)
    list(trainer.run())

    first = trainer_of(folder / "one to two", processes)
    found["began at"] = latest(folder / "one to two").name  # type: ignore[union-attr]
    first.resume(latest(folder / "one to two"))  # type: ignore[arg-type]
    list(first.run())

    dropping = replace(CONFIG, dropout=0.2)
    list(trainer_of(folder / "whole", processes, config=dropping).run())
    stop_at(trainer_of(folder / "stopped", processes, config=dropping), 4)
    again = trainer_of(folder / "stopped", processes, config=dropping)
    torch.manual_seed(processes.rank)
    again.resume(latest(folder / "stopped"))  # type: ignore[arg-type]
    list(again.run())

    def same_rows(index: int) -> Batch:
        return Batch(*(None if x is None else x[:1].expand(4, -1).contiguous() for x in batch_of(index + 1)))  # type: ignore[arg-type]

    losses: list[float] = []
    alike = trainer_of(folder / "alike", processes, replace(PLAN, steps=1), dropping, batch_of=same_rows)
    alike.model.register_forward_hook(lambda module, given, loss: losses.append(loss.item()))
    list(alike.run())
    found["losses of equal rows"] = losses

    def poisoned(module: nn.Module, given: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * float("nan") if processes.rank == 1 and trainer.step == 4 else loss

    trainer = trainer_of(folder / "poisoned", processes)
    trainer.model.register_forward_hook(poisoned)
    found["poisoned"] = said(lambda: list(trainer.run()))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer = trainer_of(folder / "full", processes)
    write, checkpoints.write = checkpoints.write, full
    found["full"] = said(lambda: list(trainer.run()))
    checkpoints.write = write
    found["second only"] = said(lambda: second_only(processes))
    found["uneven"] = said(lambda: trainer_of(folder / "uneven", processes, replace(PLAN, batch=5)))
    return found


def second_only(processes: Processes) -> None:
    with processes.together():
        if processes.rank == 1:
            raise ValueError("mine")


def said(call: Any) -> list[str]:
    try:
        call()
    except (DivergedError, ElsewhereError, OSError, ValueError) as problem:
        return [type(problem).__name__, str(problem)]
    return []


def commands(folder: Path) -> list[list[Any]]:
    """Exit code, output and errors of the command line."""
    text = str(folder / "text.py")
    found: list[list[Any]] = []
    for out, *arguments in (["cli", text, "--batch", "4", *TINY], ["odd", text, "--batch", "5", *TINY], ["cli"]):
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = run(["train", "--out", str(folder / out), *arguments])
        found.append([code, output.getvalue(), errors.getvalue()])
    return found


def main(folder: Path) -> None:
    with joined() as processes:
        found = scenarios(folder, processes)
        found["commands"] = commands(folder)
        (folder / f"process{processes.rank}.json").write_text(json.dumps(found))

        def fails_alone(index: int) -> Batch:
            if processes.rank == 1 and index == 5:
                raise RuntimeError("only here")
            return batch_of(index)

        list(trainer_of(folder / "alone", processes, batch_of=fails_alone).run())


class Found:
    """What the two processes left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "text.py").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(100)))
        list(trainer_of(folder / "one", Processes()).run())
        stop_at(trainer_of(folder / "one to two", Processes()), 4)
        self.done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, str(folder)],
            capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip
        both = [folder / f"process{rank}.json" for rank in (0, 1)]
        assert all(path.is_file() for path in both), self.done.stderr
        self.first, self.second = (json.loads(path.read_text()) for path in both)

    def curve(self, name: str) -> torch.Tensor:
        """Loss and gradient norm, step by step."""
        return torch.tensor([(step.loss, step.grad_norm) for step in read_metrics(self.folder / name / METRICS)])

    def final(self, name: str) -> dict[str, torch.Tensor]:
        return checkpoints.read(self.folder / name / FINAL).tensors


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("sharded"))


def test_the_run_of_one_process(found: Found) -> None:
    """Uneven counts of targets, clipping and accumulation among it. Moments divide by gradients, so weights drift."""
    one, two = found.curve("one"), found.curve("two")
    assert len(one) == 5
    torch.testing.assert_close(two, one, rtol=2e-4, atol=0)
    assert one[:, 1].max() > PLAN.clip
    for name, weight in found.final("one").items():
        torch.testing.assert_close(found.final("two")[name], weight, rtol=0, atol=2e-3)


def test_each_holds_its_part(found: Found) -> None:
    """Of weights that do not divide evenly too: 13 words, 18 dims."""
    assert found.first["share"] + found.second["share"] == pytest.approx(1.0)
    assert 0.4 < found.second["share"] <= 0.5


def test_resumed_by_another_number_of_processes(found: Found) -> None:
    assert found.first["began at"] == "step-0000003.safetensors"
    torch.testing.assert_close(found.curve("one to two"), found.curve("one"), rtol=2e-4, atol=0)
    alone = trainer_of(found.folder / "two", Processes())
    path = checkpoints.path_of(found.folder / "two", 6)
    alone.resume(path)
    assert [step.loss for step in alone.run()] == pytest.approx([found.curve("one")[-1, 0].item()], rel=2e-4)


def test_resumed_bit_for_bit(found: Found) -> None:
    whole, stopped = ((found.folder / name / FINAL).read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_dropout_differs_between_processes(found: Found) -> None:
    """Where the rows are the same, only what is dropped makes the losses differ."""
    for a, b in zip(found.first["losses of equal rows"], found.second["losses of equal rows"], strict=True):
        assert abs(a - b) > 1e-4


def test_what_goes_wrong_ends_both(found: Found) -> None:
    kind, words = found.first["poisoned"]
    assert kind == "DivergedError"
    assert words.startswith("step 5: the loss is nan")
    assert "step-0000003.safetensors is the last good checkpoint" in words
    assert found.first["full"][0] == "OSError"
    for name in ("poisoned", "full"):
        assert found.second[name] == ["ElsewhereError", "process 0 failed"]
    assert found.first["second only"] == ["ElsewhereError", "process 1 failed"]
    assert found.second["second only"] == ["ValueError", "mine"]
    for each in (found.first, found.second):
        assert "batch: got 5; wants a multiple of the 2 processes" in each["uneven"][1]


def test_the_command_line_speaks_once(found: Found) -> None:
    (code, output, _), odd, again = found.first["commands"]
    assert code == OK
    assert json.loads(output)["last"]["step"] == 8
    assert odd[0] == BAD_USAGE
    assert "a multiple of the 2 processes" in odd[2]
    assert again[0] == BAD_USAGE
    assert "already holds a run" in again[2]
    assert found.second["commands"] == [[OK, "", ""], [FAILED, "", ""], [FAILED, "", ""]]


def test_a_process_that_fails_alone_ends_the_run(found: Found) -> None:
    """`torchrun` ends the other one, which waits for a gradient."""
    assert found.done.returncode != 0
    assert "RuntimeError: only here" in found.done.stderr
    assert not (found.folder / "alone" / FINAL).exists()


@pytest.mark.gpu
def test_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    text = tmp_path / "text.py"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(100)))
    training = ["-m", "tilewise.cli", "train", str(text), "--batch", "4", *TINY, "--device", "cuda"]
    curves = []
    for number in ("1", "2"):
        out = tmp_path / number
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", number, *training]
        launch += ["--dtype", "float32", "--out", str(out)]
        done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == OK, done.stderr
        curves.append(torch.tensor([(step.loss, step.grad_norm) for step in read_metrics(out / METRICS)]))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
