"""The `tilewise` command: finds the verb, runs it, and turns what went wrong into one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import click

import tilewise
from tilewise.cli import BAD_USAGE, FAILED, INTERRUPTED, OK

VERBS = {
    "bench": "tilewise beside its peers: right first, then speed and memory in the same rounds.",
    "compare": "Exact attention by every method this machine can run: error, time, memory.",
    "advise": "Which mechanism and backend for a workload, why, and when not to bother.",
    "cost": "FLOPs, bytes and memory of attention, and every table that is quoted of it.",
    "roofline": "Is it bound by memory or by arithmetic, and how near to the bound is it?",
    "predict": "Time and memory of each backend before it runs, from a short calibration.",
    "profile": "One call under the profiler: kernels, bytes and FLOPs against the roof.",
    "train": "Train a small GPT on real text, with any mechanism.",
    "step": "One training step of GPT-2, ours beside Transformers: time and memory.",
    "generate": "Continue a text with a model of `tilewise train`.",
    "lab": "The lessons: list, run, notebooks, one HTML book.",
    "doctor": "What works here and what does not, with the reason and the fix.",
    "explain": "Which backend a problem gets, and why not each other one.",
    "mask": "Draw a mask: its tiles and the work they save.",
}
"""A verb's module in this package holds a click command of the same name; help comes from here without importing it."""


class _LazyGroup(click.Group):
    """Imports a verb when it is used, so that `tilewise --help` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return getattr(import_module(f"tilewise.cli.{cmd_name}"), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(tilewise.__version__, prog_name="tilewise")
def cli() -> None:
    """Exact and sub-quadratic attention: compare it, explain it, check it.

    Every command has --json. Exit codes: 0 done, 1 a check failed, 2 bad usage.
    """


def dispatch(arguments: list[str]) -> int:
    """Runs one command line; returns its exit code. A verb finds the arguments in its context as `obj`."""
    _prepare_streams()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # PyTorch's profiler tells its own developers when it starts
    try:
        return cli.main(args=list(arguments), prog_name="tilewise", standalone_mode=False, obj=arguments) or OK
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return BAD_USAGE
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "tilewise"
        click.echo(f"{where}: {error.format_message()}", err=True)
        return BAD_USAGE
    except click.ClickException as error:
        click.echo(f"tilewise: {error.format_message()}", err=True)
        return FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("tilewise: interrupted", err=True)
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # that is a reader (`| head`) that has left
            click.echo(f"tilewise: {error}", err=True)
        # Python would complain once more when it flushes a broken stdout at exit.
        with suppress(io.UnsupportedOperation):  # a caller from Python may have put something else there
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not _too_large(error):
            raise
        click.echo(f"tilewise: too large for this machine: {str(error).strip().splitlines()[0]}", err=True)
        return BAD_USAGE


def _prepare_streams() -> None:
    """Stands in for streams that the caller closed, and lets none fail on a character that it cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stand_in = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
            setattr(sys, name, stand_in)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _too_large(error: Exception) -> bool:
    """Whether sizes were asked for that no memory holds; PyTorch says so in RuntimeErrors of several wordings."""
    said = str(error).lower()
    return not isinstance(error, RuntimeError) or any(
        words in said for words in ("allocate memory", "out of memory", "not enough memory", "overflow")
    )
