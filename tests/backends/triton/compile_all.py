"""Compile every row of the tables under every feature set, and keep what the kernels need in `compiled/`.

    python tests/backends/triton/compile_all.py [ARCH ...]

About ten seconds of one core a target, some 200 targets an architecture (sm_90 alone unless others are named). The
result stands in the repository, one file for each version of Triton, keyed by a hash of the kernels' sources: a test
fails when that is stale.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from compile_cases import Target, compile_target, every_target, faults

RESULTS = Path(__file__).parent / "compiled"
SOURCES = Path(__file__).parents[3] / "src/tilewise/backends/triton"
KERNELS = ("forward", "backward", "dkdv", "dq", "bias_gradient", "relative_gradient", "score_gradient", "features",
           "configs", "launch")  # fmt: skip


def source_hash() -> str:
    """Of everything that decides what is compiled: the sources without comments and docstrings."""
    digest = hashlib.sha256()
    for name in KERNELS:
        tree = ast.parse((SOURCES / f"{name}.py").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_text(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def one(target: Target) -> tuple[str, Any, list[str]]:
    try:
        reports = compile_target(target)
    except Exception as error:  # noqa: BLE001  (the report names every target that fails, whatever the reason)
        return str(target), None, [f"{type(error).__name__}: {error}"]
    return str(target), {r.kernel: [r.registers, r.spills, r.shared] for r in reports}, faults(target, reports)


def main(arches: list[int]) -> int:
    targets = [target for arch in arches for target in every_target(arch)]
    rows, broken = {}, {}
    sources = source_hash()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, (name, kernels, wrong) in enumerate(pool.map(one, targets), start=1):
            rows[name] = kernels
            if wrong:
                broken[name] = wrong
            sys.stdout.write(f"\r{done} of {len(targets)} targets, {len(broken)} with faults")
            sys.stdout.flush()
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(kernels)}" for name, kernels in rows.items())
    head = json.dumps({"sources": sources, "faults": broken})[:-1]
    (RESULTS / f"triton-{triton.__version__}.json").write_text(f'{head}, "targets": {{\n{lines}\n}}}}\n')
    for name, wrong in broken.items():
        sys.stdout.write(f"\n  {name}: {wrong[0][:160]}")
    sys.stdout.write("\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main([int(arch) for arch in sys.argv[1:]] or [90]))
