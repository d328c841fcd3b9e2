"""`tilewise generate`: continue a text with what `tilewise train` made."""

from __future__ import annotations

import codecs
from pathlib import Path

import click

from tilewise.cli import OK
from tilewise.cli.output import json_option, pick_device, print_json


@click.command(short_help="Continue a text with a model of `tilewise train`.")
@click.argument("run", type=click.Path(path_type=Path), default="tilewise-run")
@click.option("--prompt", default="def ", show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="Most tokens given.")
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(1), default=None, help="Draw from the k likeliest.")
@click.option("--top-p", type=float, default=None, help="Draw from the fewest that have this probability together.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto")
@json_option
@click.pass_context
def generate(
    ctx: click.Context,
    run: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str,
    as_json: bool,
) -> int:
    """Continue --prompt with the model in RUN, the folder of a training run or one of its checkpoints.

    Tokens are written as they are drawn.
    """
    place = pick_device(device)

    from tilewise.models import GPT, GPTConfig
    from tilewise.models import generate as drawn
    from tilewise.train import latest, read
    from tilewise.train.loop import FINAL
    from tilewise.train.tokenizers import load

    path = run
    if run.is_dir():
        path = run / FINAL if (run / FINAL).is_file() else (latest(run) or run / FINAL)
    try:
        found = read(path)
        if "model" not in found.described:
            raise click.UsageError(f"{path} holds no model of `tilewise train`", ctx)
        model = GPT(GPTConfig(**found.described["model"])).to(place)
        # A checkpoint for resuming has the optimiser's tensors beside the model's.
        named = {name.removeprefix("model."): x for name, x in found.tensors.items() if "." in name}
        model.load_state_dict({name: x for name, x in named.items() if name in model.state_dict()})
        tokenizer = load(found.described["tokenizer"])
        text = tokenizer.encode(prompt).tolist() or [tokenizer.end]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        stream = drawn(model, text, tokens, seed=seed, end=tokenizer.end, **options)
    except (ValueError, TypeError) as problem:
        raise click.UsageError(str(problem), ctx) from problem
    except RuntimeError as problem:
        raise click.ClickException(f"{path}: {problem}") from problem
    if as_json:
        numbers = list(stream)
        written = tokenizer.decode(numbers).decode(errors="replace")
        print_json({"prompt": prompt, "text": written, "tokens": len(numbers)})
        return OK
    # A token may be a part of a character: what is whole is written.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    click.echo(prompt, nl=False)
    for token in stream:
        click.echo(decoder.decode(tokenizer.decode([token])), nl=False)
    click.echo(decoder.decode(b"", final=True))
    return OK
