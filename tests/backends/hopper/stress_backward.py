"""Random shapes and features through the Hopper backward for minutes, looking for hangs, races and wrong results.

    python tests/backends/hopper/stress_backward.py [SECONDS]

Every problem runs eight times; dK and dV (at D = 256 dQ too) must be equal bit by bit, and all gradients within
rounding of float64. Run it under a timeout: a hang is a failure that cannot report itself. The line before it names the
problem.
"""

from __future__ import annotations

import random
import sys
import time

import torch
from backward_problems import ROUNDING, exact, make, ours, with_exact_delta, worst_error


def draw(r: random.Random) -> dict[str, object]:
    """One problem's options: odd sizes, few features each, so that few kernels are compiled."""
    options: dict[str, object] = {"dim": r.choice([64, 128, 256]), "batch": r.choice([1, 2, 3])}
    kv_heads = r.choice([1, 2, 4])
    options |= {"kv_heads": kv_heads, "heads": kv_heads * r.choice([1, 2, 3]), "seed": r.randrange(1 << 30)}
    sizes = (1, 2, 63, 64, 65, 113, 127, 128, 129, 500, 1000, 2100)
    if r.random() < 0.3:
        options["lengths"] = [(r.choice(sizes), r.choice((0, *sizes))) for _ in range(r.randrange(1, 6))]
    else:
        options |= {"n": r.choice(sizes), "m": r.choice(sizes)}
    kind = r.choice(["full", "causal", "window"])
    if kind == "causal":
        options["causal"] = True
    if kind == "window":
        options["window"] = (r.randrange(300), r.randrange(300))
    options["dlse"] = r.random() < 0.5
    return options


def main(seconds: float) -> None:
    r = random.Random(0)
    start = time.monotonic()
    count = 0
    while time.monotonic() - start < seconds:
        options = draw(r)
        print(count, options, flush=True)  # noqa: T201
        problem = make(**options)  # type: ignore[arg-type]
        out, lse, grads = exact(problem)
        problem = with_exact_delta(problem, out, lse)
        first = ours(problem, out, lse)
        repeatable = 0 if options["dim"] == 256 else 1
        differ = torch.zeros((), dtype=torch.bool, device="cuda")
        for _ in range(7):
            again = ours(problem, out, lse)
            for x, y in zip(first[repeatable:], again[repeatable:], strict=True):
                differ |= (x != y).any()
        error, same = worst_error(first, grads), not differ.item()
        if error >= ROUNDING["bfloat16"] or not same:
            sys.exit(f"wrong: error {error}, same bits every time: {same}")
        count += 1
    print(f"{count} problems, none wrong")  # noqa: T201


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0)
