"""`tilewise train`: a small GPT on real text, with any mechanism."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilewise.cli import FAILED, OK
from tilewise.cli.output import console, json_option, pick_device, print_json

if TYPE_CHECKING:
    import torch

    from tilewise.models import GPT
    from tilewise.train import Processes, Shards, Step
    from tilewise.train.shards import Batch

RUN = "run.json"
"""The settings of a run, written before anything else, so that it can be resumed from its first moment on."""

TOKENS = "tokens"


@click.command(short_help="Train a small GPT on real text, with any mechanism.")
@click.argument("text", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="tilewise-run", show_default=True)
@click.option(
    "--resume", is_flag=True, help="Go on where the run in --out was stopped, with its settings, bit for bit."
)
@click.option("--mechanism", default="mha", show_default=True, help="mha, mqa, gqa, mla, window, linear, gla, …")
@click.option("--positions", type=click.Choice(("auto", "rotary", "learned", "none")), default="auto")
@click.option("--dim", type=click.IntRange(1), default=128, show_default=True)
@click.option("--layers", type=click.IntRange(1), default=5, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=4, show_default=True)
@click.option("--kv-heads", type=click.IntRange(1), default=None, help="Key/value heads.")
@click.option("--window", type=click.IntRange(1), default=256, show_default=True, help="Of the sparse mechanisms.")
@click.option("--dropout", type=float, default=0.0, show_default=True)
@click.option("--length", type=click.IntRange(1), default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Sequences of a pass.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Passes of a step.")
@click.option("--steps", type=click.IntRange(1), default=400, show_default=True)
@click.option("--lr", type=float, default=3e-3, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=40, show_default=True, help="Steps.")
@click.option("--weight-decay", type=float, default=0.1, show_default=True)
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest norm of the gradient.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(("auto", "float32", "bfloat16")), default="auto", help="Of the arithmetic.")
@click.option(
    "--saving",
    type=click.Choice(("none", "block", "selective")),
    default="none",
    help="Recompute blocks in the backward pass; selective keeps what attention returned.",
)
@click.option("--documents", is_flag=True, help="Let tokens see those of their own document only.")
@click.option("--tokens", type=click.Choice(("bytes", "bpe")), default="bytes", show_default=True)
@click.option("--vocab-size", type=click.IntRange(257, 65536), default=4096, show_default=True, help="Of bpe.")
@click.option("--characters", type=click.IntRange(1), default=8_000_000, show_default=True, help="Most text taken.")
@click.option("--checkpoint-every", type=click.IntRange(1), default=100, show_default=True, help="Steps.")
@click.option("--keep", type=click.IntRange(1), default=3, show_default=True, help="Checkpoints kept.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto")
@json_option
@click.pass_context
def train(ctx: click.Context, out: Path, resume: bool, keep: int, as_json: bool, **given: Any) -> int:
    """Train a small GPT on TEXT: files and folders; by default the library that came with Python.

    Writes the tokens, checkpoints, metrics.jsonl, metrics.svg and at the end model.safetensors into --out.
    `tilewise generate` then continues a text. On N GPUs: torchrun --nproc-per-node N -m tilewise.cli train …
    """
    import torch

    from tilewise.errors import UnsupportedError
    from tilewise.train import joined, latest
    from tilewise.train.loop import DivergedError
    from tilewise.train.processes import ElsewhereError

    again = f"`tilewise train --out {out} --resume` goes on from"
    try:
        with joined() as processes, ExitStack() as held:
            return _train(ctx, processes, held, out, resume, keep, as_json, given)
    except ElsewhereError:
        return FAILED
    except (ValueError, TypeError, UnsupportedError) as problem:
        raise click.UsageError(str(problem), ctx) from problem
    except DivergedError as problem:
        raise click.ClickException(str(problem)) from problem
    except OSError as problem:
        raise click.ClickException(f"{problem}. Once that is mended, {again} {latest(out) or 'the start'}") from problem
    except torch.OutOfMemoryError as problem:
        fix = "a smaller --batch with --accumulate, or --saving block"
        raise click.ClickException(f"{str(problem).splitlines()[0]} Fix: {fix}") from problem
    except KeyboardInterrupt:
        click.echo(f"{again} {latest(out) or 'the start'}", err=True)
        raise


def _train(
    ctx: click.Context,
    processes: Processes,
    held: ExitStack,
    out: Path,
    resume: bool,
    keep: int,
    as_json: bool,
    given: dict[str, Any],
) -> int:
    """What each process does; `held` keeps others out of the folder."""
    from dataclasses import asdict

    import torch

    from tilewise.models import GPT, GPTConfig
    from tilewise.train import Shards, TrainConfig, Trainer, latest
    from tilewise.train.loop import METRICS, read_metrics
    from tilewise.train.plot import plot
    from tilewise.train.shards import INDEX

    with processes.together():
        settings = _settings(ctx, out, resume, given, write=processes.first)
        if processes.first:
            held.enter_context(_claimed(out))
    with _forgotten_if_mistaken(out / RUN, processes.first and not resume):
        with processes.together():
            device = processes.own(pick_device(settings["device"]))
            if processes.first and not (resume and (out / TOKENS / INDEX).is_file()):
                _prepare(settings, out / TOKENS)
        with processes.together():
            shards = Shards(out / TOKENS)
            sizes = ("length", "dim", "layers", "heads", "mechanism", "positions", "kv_heads", "window", "dropout")
            config = GPTConfig(shards.tokenizer.vocab_size, **{name: settings[name] for name in sizes})
            dtype = settings["dtype"]
            if dtype == "auto":
                dtype = "bfloat16" if device.type == "cuda" else "float32"
            numbers = ("steps", "batch", "length", "accumulate", "lr", "warmup", "weight_decay", "clip", "seed")
            plan = TrainConfig(
                **{name: settings[name] for name in (*numbers, "documents", "checkpoint_every")},
                autocast="bfloat16" if dtype == "bfloat16" else "none",
            )
            torch.manual_seed(settings["seed"])
            model = GPT(config).to(device)
            model.saving = settings["saving"]
            weights = sum(p.numel() for p in model.parameters())
            processes.shard(model, model.blocks)

            def batch_of(index: int) -> Batch:
                return shards.batch(plan.seed, index, plan.batch, plan.length, documents=plan.documents)

            ids, _, documents = batch_of(0)
            model.check(ids, documents)
            trainer = Trainer(
                model,
                batch_of,
                plan,
                out,
                described={"model": asdict(config), "tokenizer": shards.tokenizer.save(), "text": shards.fingerprint},
                keep=keep,
                flops_per_token=6.0 * weights + 6.0 * config.layers * config.dim * plan.length,
                processes=processes,
            )
            checkpoint = latest(out) if resume else None
            if checkpoint is not None:
                trainer.resume(checkpoint)
            roof = processes.size * _products(device, getattr(torch, dtype))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _bar(plan.steps, trainer.step, roof, quiet=as_json or not processes.first) as show:
        for step in trainer.run():
            show(step)
    loss = _held_out(model, shards, plan.length, device, trainer.autocast)
    if processes.first:
        steps = read_metrics(out / METRICS)
        plot(steps, out / "metrics.svg", unigram=shards.unigram_entropy)
        _report(out, steps, loss, shards, as_json)
    return OK if math.isfinite(loss) else FAILED


def _settings(ctx: click.Context, out: Path, resume: bool, given: dict[str, Any], *, write: bool) -> dict[str, Any]:
    """What the run is, from the command line or from the run that is resumed. `given` has no option that a resumed run
    may have anew."""
    wanted = given | {"text": [str(path.absolute()) for path in given["text"]]}
    path = out / RUN
    if not resume:
        if write:
            _begin(ctx, path, wanted)
        return wanted
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise click.UsageError(f"--resume: {out} holds no run", ctx) from None
    except (OSError, ValueError) as problem:
        raise click.UsageError(f"--resume: {path} cannot be read ({problem})", ctx) from problem
    for name, value in wanted.items():
        source = ctx.get_parameter_source(name)
        explicit = source is not None and source.name == "COMMANDLINE"
        if explicit and kept.get(name) != value:
            was = kept.get(name)
            raise click.UsageError(f"--resume: the run in {out} has {name} = {was!r}, not {value!r}", ctx)
    return kept


def _begin(ctx: click.Context, path: Path, settings: dict[str, Any]) -> None:
    if path.exists():
        fix = "--resume goes on with it; or another --out"
        raise click.UsageError(f"--out: {path.parent} already holds a run. {fix}", ctx)
    from tilewise.train import files

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(settings, indent=2))
    except OSError as problem:
        raise click.UsageError(f"--out: {problem.strerror or problem}", ctx) from problem


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Nobody else trains in the folder; the lock goes with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as taken:
        raise click.UsageError(f"--out: another process is training in {folder}") from taken
    finally:
        os.close(handle)


@contextmanager
def _forgotten_if_mistaken(run: Path, begun: bool) -> Iterator[None]:
    """A run that could not begin as it was asked for leaves its folder free for the next attempt. What a disk does is
    no mistake: that run can be resumed."""
    try:
        yield
    except OSError:
        raise
    except Exception:
        if begun:
            run.unlink(missing_ok=True)
        raise


def _prepare(settings: dict[str, Any], folder: Path) -> None:
    """Make the run's tokens."""
    from tilewise.train import prepare
    from tilewise.train.text import default_folder, documents, find
    from tilewise.train.tokenizers import BytePairs, Bytes

    files = find(settings["text"] or [default_folder()])

    def texts() -> Iterator[str]:
        return documents(files, most=settings["characters"])

    pairs = settings["tokens"] == "bpe"
    prepare(texts(), BytePairs.learn(texts(), settings["vocab_size"]) if pairs else Bytes(), folder)


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, the best of those that fit into 0.3 seconds."""
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a = torch.rand(n, n, device=device).to(dtype)
    best = math.inf
    deadline = time.perf_counter() + 0.3
    while best == math.inf or time.perf_counter() < deadline:
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def _held_out(model: GPT, shards: Shards, length: int, device: torch.device, autocast: Callable[[], Any]) -> float:
    """Mean loss on text that was never trained on; every process computes all of it."""
    import torch

    model.eval()
    batch = shards.held_out(16, length)
    with torch.no_grad(), autocast():
        return float(model(batch.ids.to(device), batch.targets.to(device)))


@contextmanager
def _bar(steps: int, done: int, roof: float, *, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A progress bar on a terminal; a line now and then elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    target = console(stderr=True)
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    lines = not target.is_terminal and not quiet
    last = 0
    with Progress(*columns, console=target, auto_refresh=False, disable=not target.is_terminal or quiet) as bar:
        task = bar.add_task("", total=steps, completed=done)

        def show(step: Step) -> None:
            nonlocal last
            words = (
                f"loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s  "
                f"{100 * step.flops / roof:.0f} % of roof  {step.memory / 2**20:,.0f} MiB"
            )
            bar.update(task, completed=step.step, description=words, refresh=True)
            if lines and (step.step - last >= steps / 20 or step.step == steps):
                last = step.step
                click.echo(f"{step.step}/{steps}  {words}", err=True)

        yield show


def _report(out: Path, steps: list[Step], loss: float, shards: Shards, as_json: bool) -> None:
    entropy = shards.unigram_entropy
    if as_json:
        last = steps[-1]._asdict() if steps else None
        print_json({"held_out_loss": loss, "unigram_entropy": entropy, "tokens": shards.tokens, "last": last})
        return
    click.echo(f"loss on held-out text: {loss:.3f} nats a token (unigram entropy {entropy:.3f})")
    click.echo(f"weights, metrics and curves: {out}")
