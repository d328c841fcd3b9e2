"""The expression language: what it reads, that it reads back what masks write, and where it points when it cannot."""

from __future__ import annotations

import random

import mask_oracle
import pytest

from tilewise.masks import (
    Causal,
    Dilated,
    Documents,
    Global,
    Mask,
    PerHead,
    Prefix,
    Random,
    RandomTokens,
    Strided,
    Tree,
    Window,
)
from tilewise.masks.expression import ExpressionError, parse

READS: list[tuple[str, Mask]] = [
    ("causal", Causal()),
    (" causal( ) ", Causal()),
    ("causal(-3)", Causal(-3)),
    ("causal(offset=4)", Causal(4)),
    ("causal & (window(256,0) | global(0))", Causal() & (Window(256, 0) | Global([0]))),
    ("causal & window(1, 2) | prefix(3)", (Causal() & Window(1, 2)) | Prefix(3)),
    ("prefix(3) | causal & window(1, 2)", Prefix(3) | (Causal() & Window(1, 2))),
    ("~causal & prefix(1)", ~Causal() & Prefix(1)),
    ("~(causal & prefix(1))", ~(Causal() & Prefix(1))),
    ("~~causal", Causal()),
    ("window(none, 3)", Window(None, 3)),
    ("window(left=1, right=None)", Window(1, None)),
    ("global([0, 5])", Global([0, 5])),
    ("global([9, 0:4,])", Global([0, 1, 2, 3, 9])),
    ("dilated(64, 8) | strided(7)", Dilated(64, 8) | Strided(7)),
    ("random(2, seed=3, block=32)", Random(2, 32, 3)),
    ("random(2, per_head=false)", Random(2, per_head=False)),
    ("random_tokens(4, seed=-1)", RandomTokens(4, -1)),
    ("documents([0,0,1])", Documents([0, 0, 1])),
    ("tree([-1, 0, 0])", Tree([-1, 0, 0])),
    ("longformer(8, [0])", Window(4, 4) | Global([0])),
    ("bigbird(64, 3, 2, 3, seed=1)", Window(96, 96) | Global(range(128)) | Random(3, 64, 1)),
    ("per_head(causal, window(1,1) & causal)", PerHead([Causal(), Window(1, 1) & Causal()])),
    ("documents($0) & causal($1)", Documents([1, 1, 2]) & Causal([3, 4])),
]


@pytest.mark.parametrize(("text", "mask"), READS)
def test_reads(text: str, mask: Mask) -> None:
    assert parse(text, ([1, 1, 2], [3, 4])) == mask


def test_writes_what_it_reads() -> None:
    assert str(Causal() & (Window(256, 0) | Global(0))) == "causal() & (window(256, 0) | global([0]))"
    assert str(Global([7, 1, 2, 3, 0])) == "global([0:4, 7])"
    assert str(~Causal(2)) == "~causal(2)"
    ids = Documents([0, 1])
    both = ids & Causal([1]) & ids
    assert str(both) == "documents($0) & causal($1)"
    assert len(both.arrays) == 2
    assert repr(Strided(3)) == "<mask strided(3)>"


@pytest.mark.parametrize("seed", range(10))
def test_round_trip(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        problem = mask_oracle.problem_of(rng)
        mask = mask_oracle.expression(rng, problem, depth=4).mask
        again = parse(str(mask), mask.arrays)
        assert again == mask
        assert str(again) == str(mask)
        assert hash(again) == hash(mask)


# The caret must stand under the place that the second text marks.
FAILS = [
    ("causal &", "        ^", "expected a mask"),
    ("causal & windw(3)", "         ^", "did you mean `window`"),
    ("nothing_like_it", "^", "known: causal"),
    ("window(-1, 0)", "^", "left: got -1"),
    ("prefix(2) | window(3)", "            ^", "missing a required argument: 'right'"),
    ("causal ^ 2", "       ^", r"unexpected '\^'"),
    ("causal; import", "      ^", "unexpected ';'"),
    ("(causal", "       ^", r"expected `\)`, the text ends here"),
    ("causal)", "      ^", "expected `&`, `|` or the end"),
    ("causal window(1, 2)", "       ^", "expected `&`"),
    ("window(1, 2", "           ^", r"expected `\)`"),
    ("window(1, two)", "          ^", "unknown mask `two`"),
    ("window(1, causal)", "^", "right: got Causal"),
    ("global([1, x])", "           ^", "expected a number"),
    ("global([0:99999999])", "          ^", "a range of more than"),
    ("causal(offset=1, offset=2)", "                 ^", "given twice"),
    ("random(seed=1, 3)", "               ^", "after the first of them"),
    ("strided(step=0)", "^", "step: got 0"),
    ("causal(depth=1)", "^", "unexpected keyword argument 'depth'"),
    ("dense($0)", "      ^", r"\$0 with 0 arrays"),
    ("per_head(causal, causal) & per_head(causal, causal, causal)", "^", "2 and 3 heads"),
    ("", "^", "expected a mask"),
    ("(" * 200 + "causal" + ")" * 200, " " * 101 + "^", "more than 100 levels"),
]


@pytest.mark.parametrize(("text", "caret", "problem"), FAILS)
def test_points_at_the_place(text: str, caret: str, problem: str) -> None:
    with pytest.raises(ExpressionError, match=problem) as raised:
        parse(text)
    *_, shown, marked = str(raised.value).split("\n")
    assert shown == f"  {text}"
    assert marked == f"  {caret}"
    assert raised.value.position == len(caret) - 1
    assert isinstance(raised.value, ValueError)


def test_never_evaluates() -> None:
    for text in ("__import__('os')", "causal().__class__", "lambda: 1", "[causal]", "causal if 1 else prefix(1)"):
        with pytest.raises(ExpressionError):
            parse(text)
