"""Compile every forward kernel that the Hopper backend can choose; write registers, spills and shared memory as JSON.

    python tests/backends/hopper/compile_hopper.py OUT.json

A few seconds of one core a target; some 200 targets.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "triton"))

import triton
from hopper_targets import NAMES, ForwardTarget, chosen, compile_forward, every_target, faults


def one(target: ForwardTarget) -> tuple[str, Any, list[str]]:
    try:
        report = compile_forward(target)
    except Exception as error:  # noqa: BLE001  (the report names every target that fails, whatever the reason)
        return str(target), None, [f"{type(error).__name__}: {error}"]
    return str(target), [NAMES[chosen(target)], report.registers, report.spills, report.shared], faults(target, report)


def main(path: str) -> int:
    rows, broken = {}, {}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, row, wrong in pool.map(one, every_target()):
            rows[name] = row
            if wrong:
                broken[name] = wrong
    result = {"triton": triton.__version__, "faults": broken, "targets": rows}
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{len(rows)} targets, {len(broken)} with faults\n")
    for name, wrong in broken.items():
        sys.stdout.write(f"  {name}: {wrong[0][:160]}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
