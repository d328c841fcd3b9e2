"""`tilewise mask`: draw a mask expression and say what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilewise.cli.output import MOST, SIZE, OutputFile, json_option, print_json, write_report
from tilewise.masks.draw import Picture
from tilewise.masks.expression import NAMES, parse

if TYPE_CHECKING:
    from tilewise.bench.report.page import Page


@click.command(epilog=f"Names: {', '.join(NAMES)}.")
@click.argument("expression", default="causal & (window(1024, 0) | global(0))")
@click.option("--n", "n", type=SIZE, default=4096, show_default=True, help="Query rows.")
@click.option("--m", "m", type=SIZE, default=None, help="Keys; as many as query rows unless given.")
@click.option("--heads", type=SIZE, default=None, help="Query heads, for masks drawn per head.")
@click.option(
    "--offset", type=click.IntRange(-MOST, MOST), help="Position of query row 0 among the keys; m − n unless given."
)
@click.option("--report", "--html", "report", type=OutputFile(), help="Also write a self-contained HTML page here.")
@json_option
def mask(
    expression: str, n: int, m: int | None, heads: int | None, offset: int | None, as_json: bool, report: Path | None
) -> None:
    """Draw the mask EXPRESSION and print its sparsity, tiles and bytes.

    For example: tilewise mask "causal & (window(256, 0) | global(0))" --n 4096
    """
    keys = n if m is None else m
    try:
        parsed = parse(expression)
        picture = Picture.of(parsed, n, keys, offset=offset, heads=heads)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error), click.get_current_context()) from None
    write_report(lambda command: _page(picture, command), report)
    if as_json:
        print_json(_figures(picture))
        return
    click.echo(str(picture))


def _page(picture: Picture, command: str) -> Page:
    from tilewise.bench.report.page import Chart, Page, Section

    tiles = picture.map
    return Page(
        title="mask",
        headline=f"{picture.saved:.0%} of the work saved by {picture.expression}",
        summary=f"{tiles.n:,} queries × {tiles.m:,} keys, in tiles of 128×128; {picture.cell}.",
        figures=(),
        sections=[Section("Who sees whom", charts=(Chart("Tiles", picture.svg(420)),))],
        environment={},
        command=command,
    )


def _figures(picture: Picture) -> dict[str, object]:
    tiles = picture.map
    return {
        "mask": picture.expression,
        "n": tiles.n,
        "m": tiles.m,
        "batch": tiles.batch,
        "heads": tiles.heads,
        "sparsity": tiles.sparsity,
        "work_saved": picture.saved,
        "tiles": {
            "total": tiles.total_tiles,
            "full": tiles.full_tiles,
            "partial": tiles.partial_tiles,
            "skipped": tiles.skipped_tiles,
            "distinct_partial": len(tiles.bits),
        },
        "nbytes": tiles.nbytes,
    }
