"""`tilewise step`: one training step of GPT-2, ours beside Transformers' attentions, by time and memory."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tilewise.cli import FAILED, OK
from tilewise.cli.output import PositiveIntegers, console, json_option, pick_device, print_json, progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 503, "dim": 64, "layers": 2, "heads": 4},
    "small": {"vocab_size": 50257, "dim": 768, "layers": 12, "heads": 12},
    "medium": {"vocab_size": 50257, "dim": 1024, "layers": 24, "heads": 16},
}
"""GPT-2's, and one for a CPU."""

OURS = "ours"
BASE = "sdpa"
"""What times and memory are compared with."""

CONTENDERS = (OURS, "tilewise", BASE, "eager")
"""The GPT of `tilewise.models`, and Transformers' GPT-2 by its attention implementations."""

WARM_UP = 2
"""Steps of every turn that do not count."""

ALIKE = 2e-3
"""Largest relative difference of the first losses: bfloat16 rounds each to 2⁻⁸, and they are means over many tokens."""


class Row(NamedTuple):
    """One contender at one length."""

    length: int
    who: str
    milliseconds: float | None = None
    """Median of all steps that count; None where they did not fit into memory."""
    least: float | None = None
    most: float | None = None
    peak_bytes: int | None = None
    """Most that was allocated on the GPU; None on a CPU."""
    loss: float | None = None
    """Of the first step, before any update."""


@click.command(short_help="One training step of GPT-2 beside Transformers.")
@click.option("--length", type=PositiveIntegers(), default="1024", show_default=True, help="Tokens of a sequence.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--size", type=click.Choice(("auto", *SIZES)), default="auto", help="[default: medium on a GPU, tiny on a CPU]"
)
@click.option("--with", "names", multiple=True, type=click.Choice(CONTENDERS), help="Only these.  [default: all]")
@click.option(
    "--saving",
    type=click.Choice(("none", "block", "selective")),
    default="none",
    help="Recompute blocks in the backward pass, in our model.",
)
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Of a turn.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of each.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto")
@json_option
@click.pass_context
def step(
    ctx: click.Context,
    length: tuple[int, ...],
    batch: int,
    size: str,
    names: tuple[str, ...],
    saving: str,
    steps: int,
    rounds: int,
    device: str,
    as_json: bool,
) -> int:
    """Time whole training steps, forward, backward and AdamW, under bfloat16 autocast, all on the same weights.

    Contenders take turns, and each is alone on the device in its turn. Exits with 1 if their losses differ.
    """
    names = names or CONTENDERS
    from importlib.util import find_spec

    if set(names) - {OURS} and find_spec("transformers") is None:
        fix = "pip install 'tilewise[hf]', or --with ours"
        raise click.UsageError(f"--with: Transformers is not installed. Fix: {fix}", ctx)
    if length[0] < 2:
        raise click.BadParameter("one token has none to predict; wants at least 2", param_hint="--length")
    where = pick_device(device)
    sizes = SIZES[size] if size != "auto" else SIZES["medium" if where.type == "cuda" else "tiny"]
    rows: list[Row] = []
    with progress("stepping") as told:
        for i, n in enumerate(length):

            def tell(label: str, share: float, i: int = i, n: int = n) -> None:
                told(f"{n} tokens, {label}", (i + share) / len(length))

            rows += _at_length(n, batch, sizes, names, saving, steps, rounds, where, tell)
    if as_json:
        print_json({"environment": _environment(where), "rows": [row._asdict() for row in rows]})
    else:
        _print(rows, batch, sizes, where)
    strange = [row for row in rows if not _agrees(row, rows)]
    for row in strange:
        click.echo(f"{row.who} at {row.length}: the first loss is {row.loss}, not that of the others", err=True)
    return FAILED if strange else OK


def _at_length(
    n: int,
    batch: int,
    sizes: dict[str, Any],
    names: tuple[str, ...],
    saving: str,
    steps: int,
    rounds: int,
    device: torch.device,
    tell: Callable[[str, float], None],
) -> list[Row]:
    import torch

    makers = _makers(n, sizes, names, saving)
    ids = torch.randint(sizes["vocab_size"], (batch, n), generator=torch.Generator().manual_seed(0)).to(device)
    found = {name: Row(n, name) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for place, name in enumerate(names):
            tell(name, (turn * len(names) + place) / (rounds * len(names)))
            if turn and not spent[name]:
                continue
            try:
                times, peak, loss = _turn(makers[name], ids, steps)
            except torch.OutOfMemoryError:
                continue
            spent[name] += times
            middle = statistics.median(spent[name])
            found[name] = Row(n, name, middle, min(spent[name]), max(spent[name]), peak, loss)
    return list(found.values())


def _makers(
    n: int, sizes: dict[str, Any], names: tuple[str, ...], saving: str
) -> dict[str, Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]]]:
    """What makes each contender, a model and its loss, from the same weights, which wait on the CPU."""
    import copy

    import torch

    from tilewise.models import GPT, GPTConfig, save_gpt2

    torch.manual_seed(0)
    own = GPT(GPTConfig(length=n, positions="learned", **sizes))
    theirs: Any = None
    if set(names) - {OURS}:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        from tilewise.integrations.transformers import register

        register()
        # It warns of token ids that a small vocabulary lacks, and of a loss that it then chooses as it should.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_gpt2(own, folder)
            theirs = GPT2LMHeadModel.from_pretrained(folder)

    def make(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        model: Any = copy.deepcopy(own if name == OURS else theirs)
        if name != OURS:
            model.set_attn_implementation(name)
            return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
        model.saving = saving
        # As Transformers' labels: each token's target is the next, and the last has none.
        return model, lambda ids: model(ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100))

    return {name: lambda name=name: make(name) for name in names}


def _turn(
    make: Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]], ids: Tensor, steps: int
) -> tuple[list[float], int | None, float]:
    """Milliseconds of each step that counts, the peak of memory and the first loss."""
    import gc

    import torch

    device = ids.device
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model, loss_of = make()
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=on_gpu)
    times: list[float] = []
    first = math.nan
    for number in range(WARM_UP + steps):
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began) * 1e3)
        if number == 0:
            first = loss.item()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return times[WARM_UP:], peak, first


def _agrees(row: Row, rows: list[Row]) -> bool:
    losses = [other.loss for other in rows if other.length == row.length and other.loss is not None]
    return row.loss is None or abs(row.loss - statistics.median(losses)) <= ALIKE * abs(statistics.median(losses))


def _environment(device: torch.device) -> dict[str, str | int]:
    from tilewise.bench.environment import environment, installed

    return environment(device) | {"transformers": installed("transformers") or "none"}


def _print(rows: list[Row], batch: int, sizes: dict[str, Any], device: torch.device) -> None:
    from rich.table import Table

    from tilewise.bench.environment import machine
    from tilewise.bench.report import units

    shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
    table = Table(title=f"{machine(device)}: one training step, batch {batch}, {shape}", title_justify="left")
    for name in (
        "N",
        "attention",
        "a step",
        "from … to",
        "tokens/s",
        "peak memory",
        f"time / {BASE}",
        "memory",
        "loss",
    ):
        table.add_column(name, justify="left" if name == "attention" else "right", no_wrap=True)
    for row in rows:
        if row.milliseconds is None or row.least is None or row.most is None or row.loss is None:
            table.add_row(f"{row.length}", row.who, "does not fit into memory")
            continue
        base = next((each for each in rows if each.who == BASE and each.length == row.length), None)
        table.add_row(
            f"{row.length}",
            row.who,
            units.duration(row.milliseconds),
            units.duration_range(row.least, row.most),
            f"{batch * row.length / row.milliseconds * 1e3:,.0f}",
            "–" if row.peak_bytes is None else units.size(row.peak_bytes),
            _ratio(row.milliseconds, base and base.milliseconds),
            _ratio(row.peak_bytes, base and base.peak_bytes),
            f"{row.loss:.4f}",
        )
    console().print(table)


def _ratio(ours: float | None, base: float | None) -> str:
    return f"{ours / base:.2f}" if ours and base else "–"
