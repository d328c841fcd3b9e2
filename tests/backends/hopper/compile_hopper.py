"""Compile every configuration that the Hopper backend can choose, forward and backward, for sm_90 under every geometry,
and keep what the kernels need in `compiled/`, as the Triton backend's compile_all.py does for its own.

    python tests/backends/hopper/compile_hopper.py

Two or three seconds of one core a target, some 100 targets.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "triton"))

from compile_all import compile_matrix, source_hash
from hopper_targets import compile_target, demanding_targets, faults

RESULTS = Path(__file__).parent / "compiled"
SOURCES = Path(__file__).parents[3] / "src/tilewise/backends/hopper"
KERNELS = ("forward", "walk", "sequences", "primitives", "configs", "launch", "backward", "backward_kernel",
           "backward_parts", "wide_dkdv", "wide_dq", "preprocess", "conversion")  # fmt: skip


def hopper_hash() -> str:
    return source_hash(SOURCES, KERNELS)


if __name__ == "__main__":
    sys.exit(compile_matrix(RESULTS, hopper_hash(), demanding_targets(), compile_target, faults))
