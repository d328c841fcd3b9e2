"""Random shapes and features through the Hopper forward for a minute, looking for hangs, races and wrong results.

    python tests/backends/hopper/stress_forward.py [SECONDS]

Every problem runs 21 times; out and LSE must be equal bit by bit and within budget. Run it under a timeout: a hang
is a failure that cannot report itself. The line before it names the problem.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import torch
from hopper_cases import NAMED, assert_right, problem

from tilewise.backends.hopper.launch import forward, plan
from tilewise.masks import BigBird, Causal, Random, Window

SIZES = (1, 2, 63, 64, 65, 113, 127, 128, 129, 500, 1000, 2100, 3000)


def draw(r: random.Random) -> tuple[str, dict[str, Any]]:
    """A configuration's name and one problem's options: odd sizes, few features each, so that few kernels compile."""
    name = r.choice(sorted(NAMED))
    kv_heads = r.choice([1, 2, 4])
    options: dict[str, Any] = {"kv_heads": kv_heads, "heads": kv_heads * r.choice([1, 2, 5]), "batch": r.choice([1, 3])}
    options["seed"] = r.randrange(1 << 30)
    kind = r.choice(["full", "causal", "window", "packed", "map"])
    if kind == "map" and NAMED[name].warpgroups != 2:
        kind = "causal"
    if kind == "packed":
        count = r.randrange(1, 40)
        options["lengths"] = (
            [r.choice(SIZES[:-2]) for _ in range(count)],
            [r.choice((0, *SIZES[:-2])) for _ in range(count)],
        )
        options["causal"] = r.random() < 0.5
    else:
        options |= {"n": r.choice(SIZES), "m": r.choice(SIZES)}
    if kind == "causal":
        options["causal"] = True
    if kind == "window":
        options["window"] = (r.randrange(300), r.randrange(300))
    if kind == "map":
        # The last one has 64 global tokens.
        masks = [Causal(), Window(r.randrange(300), 9), Random(2), BigBird(64, 3, 1, 2)]
        options["mask"] = r.choice(masks if min(options["n"], options["m"]) >= 64 else masks[:3])
    return name, options


def main(seconds: float) -> None:
    r = random.Random(0)
    start = time.monotonic()
    count = 0
    while time.monotonic() - start < seconds:
        name, options = draw(r)
        print(count, name, options, flush=True)  # noqa: T201
        assert_right(NAMED[name], **options)
        operands, spec = problem(NAMED[name], **options)
        prepared = plan(spec, NAMED[name])
        first = forward(operands, spec, prepared)
        differ = torch.zeros((), dtype=torch.bool, device="cuda")
        for _ in range(20):
            again = forward(operands, spec, prepared)
            for x, y in zip(first, again, strict=True):
                differ |= (x != y).any()
        if differ.item():
            sys.exit("wrong: not the same bits every time")
        count += 1
    print(f"{count} problems, none wrong")  # noqa: T201


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
