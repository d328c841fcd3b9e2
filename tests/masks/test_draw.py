"""Pictures: what their cells say is what the tile map holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from tilewise.cli.mask import mask as command
from tilewise.masks import Causal, Documents, Global, Mask, PerHead, Prefix, Random, Tree, Window

MASKS = [Causal(), Causal() & (Window(256, 0) | Global(0)), ~Prefix(300), Documents(np.arange(1500) // 400)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_cells_are_tiles(mask: Mask) -> None:
    n = m = 1500
    picture = mask.show(n, m)
    dense = mask.to_dense(n, m)
    header, *lines = str(picture).split("\n")
    assert header.startswith(f"{mask}   1500 queries × 1500 keys, a cell is one tile")
    for t in range(12):
        for c in range(12):
            tile = dense[t * 128 : t * 128 + 128, c * 128 : c * 128 + 128]
            # The last column tile is partial even where it lacks only the keys beyond m.
            full = tile.all() and c < 11
            want = " ·" if not tile.any() else "██" if full else ("░░", "▒▒", "▓▓")[min(2, int(tile.mean() * 3))]
            assert lines[t][2 * c : 2 * c + 2] == want, (t, c)
    tiles = picture.map
    assert f"144 tiles of 128×128: {tiles.full_tiles} full, {tiles.partial_tiles} partial" in str(picture)
    assert f"{tiles.skipped_tiles / 144:.1%} of the work saved" in str(picture)
    assert f"{1 - dense.mean():.2%} of the pairs masked" in str(picture)


def test_small_problems_show_pairs() -> None:
    assert str(Tree([-1, 0, 0]).show(3, 5)).split("\n")[:4] == [
        "tree($0)   3 queries × 5 keys, a cell is one pair",
        "██████ · ·",
        "████████ ·",
        "██████ ·██",
    ]
    assert "may attend" in str(Causal().show(1, 1))


def test_large_problems_show_squares_of_tiles() -> None:
    picture = Causal().show(1 << 20, 1 << 20)
    lines = str(picture).split("\n")
    assert "a cell is 205×205 tiles" in lines[0]
    assert lines[1] == "▒▒" + " ·" * 39
    assert lines[40] == "██" * 39 + "▒▒"
    odd = (Window(3000, 3000) | Prefix(10)).show(10_001, 7_003)
    cells = odd.planes[0]
    seen = (cells.seen * np.outer([256] * 39 + [10_001 - 39 * 256], [256] * 27 + [7_003 - 27 * 256])).sum()
    assert round(seen) == odd.map.visible
    assert cells.full.sum() == odd.map.full_tiles
    assert (cells.used - cells.full).sum() == odd.map.partial_tiles


def test_heads_and_sequences() -> None:
    picture = str(PerHead([Causal(), Prefix(128)]).show(256, 256))
    assert "head 0\n▒▒ ·\n██▒▒\nhead 1\n██ ·\n██ ·\n" in picture
    many = str((Causal([0, 1, 2]) & Random(1)).show(256, 256, heads=2))
    assert "sequence 1, head 1" in many
    assert "… and 2 more" in many


@pytest.mark.parametrize("mask", [*MASKS, PerHead([Causal(), Prefix(2)]), Tree([-1, 0])], ids=str)
def test_svg(mask: Mask) -> None:
    small = isinstance(mask, Tree)
    picture = mask.show(*((4, 9) if small else (1500, 1500)))
    root = ElementTree.fromstring(picture.svg())  # noqa: S314 - it is our own text
    assert str(mask) in "".join(root.itertext())
    for plane, group in zip(picture.planes, root.iter("{http://www.w3.org/2000/svg}g"), strict=True):
        area = {"tw-full": 0, "tw-partial": 0}
        for shape in list(group)[1:]:
            area[shape.attrib["class"]] += int(shape.attrib["width"])
        assert area["tw-full"] == (plane.kind == 1).sum()
        assert area["tw-partial"] == (plane.kind == 2).sum()
    assert not re.search(r"script|href|url\(", picture.svg())


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, arguments)
    return result.exit_code, result.output if result.exit_code else result.stdout


def test_command_draws() -> None:
    code, output = run("causal & (window(256,0) | global(0))", "--n", "4096")
    assert code == 0
    assert output.startswith("causal() & (window(256, 0) | global([0]))   4096 queries × 4096 keys")
    assert "1,024 tiles of 128×128: 31 full, 91 partial (4 distinct), 902 skipped: 88.1% of the work saved" in output
    assert run()[0] == 0


def test_command_json_and_html(tmp_path: Path) -> None:
    page = tmp_path / "mask.html"
    code, output = run("random(2)", "--n", "300", "--m", "1000", "--heads", "3", "--json", "--html", str(page))
    figures = json.loads(output)
    assert code == 0
    assert (figures["n"], figures["m"], figures["heads"], figures["tiles"]["total"]) == (300, 1000, 3, 3 * 3 * 8)
    assert figures["sparsity"] == pytest.approx(Random(2).sparsity(300, 1000, heads=3))
    assert "<svg" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("causal & windw(3)",), "\n           ^"),
        (("global(5000)",), "token 5000 with 4096 keys"),
        (("documents($0)",), "$0 with 0 arrays"),
        (("causal", "--n", "0"), "--n"),
    ],
)
def test_command_refuses(arguments: tuple[str, ...], shown: str) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert shown in output
    assert "Traceback" not in output
