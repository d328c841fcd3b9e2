"""`tilewise mask`: draw a mask expression and say what it costs."""

from __future__ import annotations

from html import escape
from pathlib import Path

import click

from tilewise.cli.output import json_option, print_json
from tilewise.masks.draw import Picture
from tilewise.masks.expression import NAMES, parse

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font-family:system-ui,sans-serif;margin:2rem;max-width:90rem}}
svg{{max-width:100%;height:auto}}</style></head>
<body><h1>{title}</h1>{svg}</body></html>
"""


@click.command(epilog=f"Names: {', '.join(NAMES)}.")
@click.argument("expression", default="causal & (window(1024, 0) | global(0))")
@click.option("--n", "n", type=click.IntRange(min=1), default=4096, show_default=True, help="Query rows.")
@click.option("--m", "m", type=click.IntRange(min=1), default=None, help="Keys; as many as query rows unless given.")
@click.option("--heads", type=click.IntRange(min=1), default=None, help="Query heads, for masks drawn per head.")
@click.option("--offset", type=int, default=None, help="Position of query row 0 among the keys; m − n unless given.")
@json_option
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with the picture.")
def mask(
    expression: str, n: int, m: int | None, heads: int | None, offset: int | None, as_json: bool, html: Path | None
) -> None:
    """Draw the mask EXPRESSION and print its sparsity, tiles and bytes.

    For example: tilewise mask "causal & (window(256, 0) | global(0))" --n 4096
    """
    keys = n if m is None else m
    try:
        parsed = parse(expression)
        picture = Picture.of(parsed, n, keys, offset=offset, heads=heads)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from None
    if html is not None:
        html.write_text(_PAGE.format(title=escape(f"Mask {parsed}"), svg=picture.svg()), encoding="utf-8")
    if as_json:
        print_json(_figures(picture))
        return
    click.echo(str(picture))
    if html is not None:
        click.echo(f"written to {html}")


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
