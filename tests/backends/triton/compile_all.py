"""Compile every row of the tables under every feature set, and write what the kernels need as JSON.

    python tests/backends/triton/compile_all.py OUT.json [ARCH ...]

Takes about ten seconds of one core a target. The file is keyed by a hash of the kernels' sources.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from compile_cases import Target, compile_target, every_target, faults

SOURCES = Path(__file__).parents[3] / "src/tilewise/backends/triton"


def source_hash() -> str:
    """Of everything that decides what is compiled."""
    files = sorted(SOURCES.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def one(target: Target) -> tuple[str, Any, list[str]]:
    try:
        reports = compile_target(target)
    except Exception as error:  # noqa: BLE001  (the report names every target that fails, whatever the reason)
        return str(target), None, [f"{type(error).__name__}: {error}"]
    return str(target), {r.kernel: [r.registers, r.spills, r.shared] for r in reports}, faults(target, reports)


def main(path: str, arches: list[int]) -> int:
    targets = [target for arch in arches for target in every_target(arch)]
    rows, broken = {}, {}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, kernels, wrong in pool.map(one, targets):
            rows[name] = kernels
            if wrong:
                broken[name] = wrong
    result = {"sources": source_hash(), "triton": triton.__version__, "faults": broken, "targets": rows}
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"{len(rows)} targets, {len(broken)} with faults\n")
    for name, wrong in broken.items():
        sys.stdout.write(f"  {name}: {wrong[0][:160]}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], [int(arch) for arch in sys.argv[2:]] or [90]))
