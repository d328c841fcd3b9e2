"""The training loop: AdamW under a cosine, with accumulation, clipping, autocast and checkpoints.

Everything a step depends on is in the checkpoint, weights and moments, or a pure function of (seed, step): the batch
and what dropout draws. So a run that was killed ends with the bits it would have had.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tilewise.errors import bad_value
from tilewise.train import checkpoints, files
from tilewise.train.processes import Processes
from tilewise.train.shards import Batch

FINAL = "model.safetensors"
METRICS = "metrics.jsonl"
ALONE = Processes()


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything about a run that changes its weights."""

    steps: int = 400
    batch: int = 8
    """Sequences of one pass, of all processes together; `accumulate` passes make a step."""
    length: int = 256
    """Tokens of a sequence."""
    accumulate: int = 1
    lr: float = 3e-3
    """At the top of the schedule: linear warm-up, then a cosine down to a tenth (Loshchilov and Hutter, 2017)."""
    warmup: int = 40
    weight_decay: float = 0.1
    """Of matrices; biases and norms have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    autocast: Literal["none", "bfloat16"] = "none"
    documents: bool = False
    """Tokens see those of their own document only."""
    checkpoint_every: int = 100
    """Steps."""
    log_every: int = 10
    """Steps; the loss is looked at only then."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            least = 0 if each.name in ("warmup", "seed", "weight_decay", "beta1", "beta2") else 1
            if each.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise bad_value(each.name, value, f"an integer of at least {least}")
            if each.type == "float" and not (math.isfinite(value) and value >= 0 and (least == 0 or value > 0)):
                raise bad_value(each.name, value, "a positive number")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * share)))


class Step(NamedTuple):
    """What was measured over the last `log_every` steps."""

    step: int
    """Steps done."""
    loss: float
    """Mean, nats a token."""
    grad_norm: float
    """Mean, before clipping."""
    lr: float
    tokens: int
    """Seen since the beginning."""
    tokens_per_second: float
    flops: float
    """FLOP/s of the model's products, recomputation not counted."""
    memory: int
    """Bytes: most that was allocated on the process's GPU, or the process's largest size on a CPU."""


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer a number."""


class Trainer:
    """Trains `model` and writes checkpoints, metrics and the final weights into `folder`.

    Args:
        model: called as `model(ids, targets, documents=...)`, returns the mean loss of the targets that are not −100.
        batch_of: the batch of a pass, counted from 0 over the whole run.
        config: of the run.
        folder: where everything is written.
        described: JSON-ready facts that a reader of the weights needs (the model's config, its tokenizer).
        keep: checkpoints that are kept.
        flops_per_token: of a forward and backward pass, for the metrics; by default 6 times the weights.
        processes: that train together, `model` having been sharded over them; `batch_of` is the same in all, and each
            takes its part. All call every method; the first writes, into a folder that all can read.

    Raises:
        ValueError: a batch that the processes cannot share out evenly.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_of: Callable[[int], Batch],
        config: TrainConfig,
        folder: Path,
        *,
        described: dict[str, Any],
        keep: int = 3,
        flops_per_token: float | None = None,
        processes: Processes = ALONE,
    ) -> None:
        if config.batch % processes.size:
            raise bad_value("batch", config.batch, f"a multiple of the {processes.size} processes")
        self.model, self.batch_of, self.config, self.folder = model, batch_of, config, folder
        self.described, self.keep, self.processes = described | {"train": asdict(config)}, keep, processes
        self.device = next(model.parameters()).device
        self.step = 0
        self.named = dict(model.named_parameters())
        weights = sum(p.numel() for p in self.named.values())
        self.flops_per_token = 6.0 * weights if flops_per_token is None else flops_per_token
        groups = [
            {"params": [p for p in self.named.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.named.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas, fused = (config.beta1, config.beta2), self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=fused)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of this run, which any number of processes wrote.

        Raises:
            ValueError: a checkpoint of other settings, of another model, or of another text; or a damaged one.
        """
        found = checkpoints.read(path)
        checkpoints.check_same("training", found.described.get("train", {}), self.config)
        for name, value in json.loads(json.dumps(self.described)).items():
            if found.described.get(name) != value and name != "train":
                wants = f"{value!r}" if len(repr(value)) < 200 else "that of this run"
                raise bad_value("resume", f"{path} with another {name}", wants, "the same settings, or another folder")
        own = self.model.state_dict()
        state = {name.removeprefix("model."): x for name, x in found.tensors.items() if name.startswith("model.")}
        try:
            self.model.load_state_dict({name: self.processes.placed(x, own.get(name, x)) for name, x in state.items()})
            done = torch.tensor(float(found.described["step"]), device=self.device if self._fused else "cpu")
            for name, parameter in self.named.items():
                moments = (found.tensors[f"{kind}.{name}"] for kind in ("first", "second"))
                first, second = (self.processes.placed(x, parameter) for x in moments)
                self.optimizer.state[parameter] = {"step": done.clone(), "exp_avg": first, "exp_avg_sq": second}
        except (RuntimeError, KeyError) as problem:
            raise bad_value("resume", f"{path}: {problem}", "the weights of this model") from problem
        self.step = found.described["step"]

    @property
    def _fused(self) -> bool:
        return bool(self.optimizer.defaults["fused"])

    def run(self) -> Iterator[Step]:
        """Train from where it stands to the end, giving measurements on the way; then write the final weights.

        Raises:
            DivergedError: a loss or gradient that is not finite; the last good checkpoint stays.
            OSError: something cannot be written; the last checkpoint stays.
            ElsewhereError: one of these, in another process.
        """
        config = self.config
        with self.processes.together():
            if self.processes.first:
                self._forget_later_metrics()
        self.model.train()
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        began = time.perf_counter()
        while self.step < config.steps:
            loss, norm = self._one_step()
            losses.append(loss)
            norms.append(norm)
            self.step += 1
            saving = self.step % config.checkpoint_every == 0 and self.step < config.steps
            if saving or self.step % config.log_every == 0 or self.step == config.steps:
                with self.processes.together():
                    measured = self._measure(losses, norms, began)
                    self._tell(measured)
                losses, norms = [], []
                if saving:
                    self.save()
                yield measured
                began = time.perf_counter()
        weights = self.processes.gathered(self.model.state_dict())
        with self.processes.together():
            if self.processes.first:
                checkpoints.write(self.folder / FINAL, weights, self.described | {"step": self.step})

    def save(self) -> Path:
        """Write a checkpoint of the current step; older ones beyond `keep` are deleted only then.

        Raises:
            OSError: it cannot be written; older ones stay.
        """
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        for name, parameter in self.named.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"]}
        path = checkpoints.path_of(self.folder, self.step)
        whole = self.processes.gathered(tensors)
        with self.processes.together():
            if self.processes.first:
                checkpoints.write(path, whole, self.described | {"step": self.step})
                checkpoints.prune(self.folder, self.keep)
        return path

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.autocast != "none" else nullcontext()

    def _one_step(self) -> tuple[Tensor, Tensor]:
        """The mean loss, of this process's part of the batch, and the gradient's norm; neither waited for."""
        config, processes = self.config, self.processes
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Processes that drew the same would drop the same places of different rows.
            drawn = np.random.SeedSequence((config.seed, self.step, processes.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(drawn[0]))
            for number in range(config.accumulate):
                batch, share = processes.part(self.batch_of(self.step * config.accumulate + number))
                ids, targets, documents = (None if x is None else x.to(self.device, non_blocking=True) for x in batch)
                with self.autocast():
                    loss = self.model(ids, targets, documents=documents) * (share / config.accumulate)
                # Gradients are averaged over the processes, and each has its share of the mean already.
                (loss * processes.size).backward()
                total += loss.detach()
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        norm = processes.whole(nn.utils.get_total_norm(grads))
        nn.utils.clip_grads_with_norm_(self.named.values(), config.clip, norm)
        self.optimizer.step()
        return total, norm

    def _measure(self, losses: list[Tensor], norms: list[Tensor], began: float) -> Step:
        summed = self.processes.total(torch.stack(losses).float())
        both = torch.stack([summed, torch.stack(norms).float()]).cpu()
        seconds = time.perf_counter() - began
        for i, (loss, norm) in enumerate(both.t().tolist()):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                at = self.step - len(losses) + i + 1
                kept = checkpoints.latest(self.folder)
                last = f"{kept} is the last good checkpoint" if kept else "there is no checkpoint from before"
                raise DivergedError(
                    f"step {at}: the loss is {loss} and the gradient's norm {norm}; {last}. Fix: a smaller --lr "
                    f"(now {self.config.lr}), a longer --warmup"
                )
        tokens = self.config.batch * self.config.accumulate * self.config.length
        rate = tokens * len(losses) / seconds
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        loss, norm = both.mean(1).tolist()
        lr = self.config.rate(self.step - 1)
        return Step(self.step, loss, norm, lr, self.step * tokens, rate, rate * self.flops_per_token, memory)

    def _tell(self, measured: Step) -> None:
        if self.processes.first:
            path = self.folder / METRICS
            try:
                with path.open("a", encoding="utf-8") as metrics:
                    metrics.write(json.dumps(measured._asdict()) + "\n")
            except OSError as problem:
                raise OSError(f"{path}: could not be written ({problem.strerror})") from problem

    def _forget_later_metrics(self) -> None:
        """Keep the measurements up to the current step: a killed run may have written more, and half a line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        files.write_lines(path, [step for step in read_metrics(path) if step.step <= self.step])


def read_metrics(path: Path) -> list[Step]:
    """The measurements in a metrics file, as far as its lines are whole."""
    return files.read_lines(path, Step)
