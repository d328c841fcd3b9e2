from __future__ import annotations

import torch

from tilewise.bench.precompile import compile_ahead
from tilewise.bench.suites import Case


def test_everything_is_run_elsewhere_and_a_refusal_is_passed_over() -> None:
    """On a CPU there is nothing to compile, but the processes are the same."""
    told: list[tuple[int, int]] = []
    compile_ahead(
        [Case(1, 2, 2, 65, 16, "float32")],
        ["tiled", "hopper"],
        ["sdpa", "flash_attn.cute"],
        device=torch.device("cpu"),
        backward=True,
        after_each=lambda *now: told.append(now),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
