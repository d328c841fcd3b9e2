"""Quality against cost: every mechanism at equal size and budget, on recall and on real text.

`python -m tilewise.train.quality --out quality` trains them one after another, writes a line of JSON for each as it is
measured, and prints the table. Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tilewise.errors import bad_value
from tilewise.models import GPT, GPTConfig
from tilewise.models.gpt import MECHANISMS
from tilewise.models.passes import step_flops, step_ms
from tilewise.train import checkpoints, files
from tilewise.train.loop import FINAL, DivergedError, Step, TrainConfig, Trainer
from tilewise.train.shards import INDEX, Batch, Shards, prepare
from tilewise.train.tasks import accuracy, recall
from tilewise.train.text import default_folder, documents, find
from tilewise.train.tokenizers import Bytes

Task = Literal["recall", "text"]
TASKS: tuple[Task, ...] = ("recall", "text")
Told = Callable[[str, Task, Step], object]

ROWS = "rows.jsonl"
PLAN = "plan.json"


class Stage(NamedTuple):
    """A part of the curriculum of recall: what its sequences are, and how many steps it lasts."""

    length: int
    pairs: int
    asks: int
    steps: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What every mechanism gets. The same tokens in the same order, the same schedule, the same seed."""

    stages: tuple[Stage, ...]
    """Of recall. The last one's length and pairs are what is tested, with each key asked once."""
    text_steps: int
    dim: int = 64
    layers: int = 2
    heads: int = 2
    window: int = 64
    """Of the sparse mechanisms."""
    vocab: int = 64
    """Of recall."""
    tokens: int = 4096
    """Of a step."""
    length: int = 1024
    """Of the text's sequences."""
    lr: float = 2e-3
    characters: int = 8_000_000
    """Of Python's own library."""
    tested: int = 32
    """Sequences."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise bad_value("stages", "none", "at least one stage of recall")
        longest = max(self.length, *(stage.length for stage in self.stages))
        if self.tokens < longest:
            raise bad_value("tokens", self.tokens, f"at least one sequence of {longest}")


SMALL = Plan(
    (Stage(32, 4, 3, 180), Stage(64, 8, 3, 20), Stage(256, 16, 4, 40), Stage(1024, 16, 4, 120)), text_steps=250
)
"""For a CPU: recall over 1K."""

LONG = Plan(
    (*SMALL.stages, Stage(2048, 16, 4, 100), Stage(4096, 16, 4, 150), Stage(8192, 16, 4, 900)),
    text_steps=250, tokens=8192, length=8192,
)  # fmt: skip
"""For a CPU with patience: the same models over 8K, by curriculum."""

LARGE = Plan(
    (
        *(Stage(length, length // 8, 3, 400) for length in (32, 64, 128, 256)),
        *(Stage(length, 64, 4, 150) for length in (512, 1024, 2048, 4096, 8192)),
    ),
    text_steps=1000, dim=256, layers=4, heads=4, vocab=256, tokens=65536, length=8192, lr=1e-3,
)  # fmt: skip
"""For a GPU: larger models, recall and text over 8K."""

PLANS = {"small": SMALL, "long": LONG, "large": LARGE}


class Row(NamedTuple):
    """One mechanism on one task."""

    mechanism: str
    task: Task
    score: float
    """Of recall, the share answered rightly; of text, the loss in bits a byte on text that was never trained on."""
    weights: int
    steps: int
    tokens: int
    """Trained on."""
    step_ms: float
    """Forward and backward of one step at the longest length; processor time on a CPU, else time."""
    step_flops: float
    """Of its products, by count."""
    cache_bytes: int | None
    """What generation keeps of that length, all layers; None where every token takes a whole pass."""


def measure(
    plan: Plan,
    folder: Path,
    *,
    mechanisms: Sequence[str] = tuple(MECHANISMS),
    tasks: Sequence[Task] = TASKS,
    device: torch.device | str = "cpu",
    told: Told = lambda mechanism, task, step: None,
) -> Iterator[Row]:
    """Train and measure, a row at a time; rows that `folder` already holds are given without training.

    Args:
        plan: sizes and budget, the same for all.
        folder: where rows, tokens and checkpoints are kept.
        mechanisms: by name, in this order.
        tasks: all mechanisms on the first, then on the next.
        device: where to train.
        told: called with what was measured while training.

    Raises:
        ValueError: a mechanism that is not known, or a folder that was measured with another plan.
        DivergedError, OSError: as `Trainer.run`; another call goes on.
    """
    for argument, given, all_of in (("mechanisms", mechanisms, MECHANISMS), ("tasks", tasks, TASKS)):
        for name in given:
            if name not in all_of:
                raise bad_value(argument, repr(name), f"some of {', '.join(all_of)}")
    _same_plan(plan, folder)
    rows = read_rows(folder)
    known = {(row.mechanism, row.task): row for row in rows}
    for task in tasks:
        for name in mechanisms:
            row = known.get((name, task))
            if row is None:
                row = _measured(name, task, plan, folder, torch.device(device), told)
                rows.append(row)
                files.write_lines(folder / ROWS, rows)
                place = _place(folder, task, name)
                for path in (*checkpoints.numbered(place), place / FINAL):
                    path.unlink(missing_ok=True)
            yield row


def read_rows(folder: Path) -> list[Row]:
    """The rows that a folder holds, as far as its lines are whole."""
    return files.read_lines(folder / ROWS, Row)


def table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown, best recall first; a dash for what was not measured."""
    by = {(row.mechanism, row.task): row for row in rows}
    names = list(dict.fromkeys(row.mechanism for row in rows))
    names.sort(key=lambda name: -by[name, "recall"].score if (name, "recall") in by else 1.0)
    lines = ["| mechanism | weights | recall | text, bits a byte | ms a step | GFLOP a step | cache, KiB |"]
    lines.append("|---|" + "--:|" * 6)
    for name in names:
        asked, read = by.get((name, "recall")), by.get((name, "text"))
        row = read or asked
        assert row is not None
        answered = f"{asked.score:.1%}" if asked else "–"
        loss = f"{read.score:.3f}" if read else "–"
        kept = "–" if row.cache_bytes is None else f"{row.cache_bytes / 1024:,.1f}"
        lines.append(
            f"| {name} | {row.weights:,} | {answered} | {loss} | {row.step_ms:,.0f} | {row.step_flops / 1e9:,.1f} "
            f"| {kept} |"
        )
    return "\n".join(lines)


def _measured(name: str, task: Task, plan: Plan, folder: Path, device: torch.device, told: Told) -> Row:
    """Trained, tested, and its cost taken."""
    shards = _text(plan, folder) if task == "text" else None
    goal = plan.stages[-1]
    length = plan.length if shards else goal.length
    torch.manual_seed(plan.seed)
    model = GPT(
        GPTConfig(
            shards.tokenizer.vocab_size if shards else plan.vocab, length, plan.dim, plan.layers, plan.heads, name,
            window=plan.window,
        )
    ).to(device)  # fmt: skip
    order = [stage for stage in plan.stages for _ in range(stage.steps)]
    config = TrainConfig(
        steps=plan.text_steps if shards else len(order), batch=plan.tokens // length, length=length, lr=plan.lr,
        warmup=20, seed=plan.seed, autocast="bfloat16" if device.type == "cuda" else "none", checkpoint_every=50,
    )  # fmt: skip

    def batch_of(step: int) -> Batch:
        if shards:
            return shards.batch(plan.seed, step, config.batch, length)
        n, pairs, asks, _ = order[step]
        return recall(plan.seed, step, plan.tokens // n, n, plan.vocab, pairs, asks=asks)

    place = _place(folder, task, name)
    trainer = Trainer(model, batch_of, config, place, described={"model": asdict(model.config)}, keep=1)
    last = checkpoints.latest(place)
    if last is not None:
        trainer.resume(last)
    for step in trainer.run():
        told(name, task, step)
    model.eval()
    with torch.no_grad(), trainer.autocast():
        score = _bits(model, shards, plan) if shards else _answered(model, plan)
    ids, targets, _ = batch_of(config.steps - 1)
    with trainer.autocast():
        milliseconds = step_ms(model, ids.to(device), targets.to(device))
    caches = model.make_caches(1, length)
    return Row(
        name, task, score, sum(p.numel() for p in model.parameters()), config.steps, config.steps * plan.tokens,
        milliseconds, step_flops(model, config.batch, length),
        None if caches is None else sum(cache.nbytes for cache in caches),
    )  # fmt: skip


def _place(folder: Path, task: Task, name: str) -> Path:
    """Of a run's checkpoints and metrics."""
    return folder / f"{task}-{name}"


def _answered(model: GPT, plan: Plan) -> float:
    goal = plan.stages[-1]
    batches = [recall(plan.seed + 1, i, 1, goal.length, plan.vocab, goal.pairs) for i in range(plan.tested)]
    return sum(accuracy(model, batch) for batch in batches) / len(batches)


def _bits(model: GPT, shards: Shards, plan: Plan) -> float:
    held = shards.held_out(plan.tested, plan.length)
    device = model.wte.weight.device
    rows = zip(held.ids.to(device).split(1), held.targets.to(device).split(1), strict=True)
    return sum(float(model(ids, targets)) for ids, targets in rows) / len(held.ids) / math.log(2.0)


def _text(plan: Plan, folder: Path) -> Shards:
    """Bytes of Python's own library; made once."""
    place = folder / "tokens"
    if (place / INDEX).is_file():
        return Shards(place)
    return prepare(documents(find([default_folder()]), most=plan.characters), Bytes(), place)


def _same_plan(plan: Plan, folder: Path) -> None:
    path = folder / PLAN
    wanted: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept != wanted:
            other = ", ".join(name for name in wanted if kept.get(name) != wanted[name])
            raise bad_value("folder", f"{folder}, measured with another {other}", "the same plan", "another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(wanted))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, 1 where training failed, 2 for bad input, or 130 where it was interrupted."""
    words = argparse.ArgumentParser("python -m tilewise.train.quality", description=__doc__)
    words.add_argument("--out", type=Path, default=Path("quality"), help="folder of rows and checkpoints")
    words.add_argument("--plan", choices=PLANS, default="large" if torch.cuda.is_available() else "small")
    words.add_argument("--mechanisms", default=",".join(MECHANISMS), help="some of %(default)s")
    words.add_argument("--tasks", default=",".join(TASKS), help="some of %(default)s")
    words.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = words.parse_args(arguments)

    def told(name: str, task: Task, step: Step) -> None:
        _say(f"{name} {task} step {step.step} loss {step.loss:.3f}")

    rows: list[Row] = []
    try:
        for row in measure(
            PLANS[given.plan], given.out, mechanisms=given.mechanisms.split(","), tasks=given.tasks.split(","),
            device=given.device, told=told,
        ):  # fmt: skip
            _say(f"{row.mechanism} {row.task}: {row.score:.4f}")
            rows.append(row)
    except ValueError as problem:
        _say(str(problem))
        return 2
    except (DivergedError, OSError) as problem:
        _say(str(problem))
        return 1
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on")
        return 130
    sys.stdout.write(table(rows) + "\n")
    return 0


def _say(words: str) -> None:
    sys.stderr.write(words + "\n")


if __name__ == "__main__":
    sys.exit(main())
