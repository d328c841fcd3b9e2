"""Compile every row of the tables under every feature set, and keep what the kernels need in `compiled/`.

    python tests/backends/triton/compile_all.py [ARCH ...]

About ten seconds of one core a target, some 200 targets an architecture (sm_90 alone unless others are named). The
result stands in the repository, one file for each version of Triton, keyed by a hash of the kernels' sources: a test
fails when that is stale. A run that was cut off goes on where it was.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import triton
from compile_cases import compile_target, every_target, faults

RESULTS = Path(__file__).parent / "compiled"
SOURCES = Path(__file__).parents[3] / "src/tilewise/backends/triton"
KERNELS = ("forward", "backward", "dkdv", "dq", "bias_gradient", "relative_gradient", "score_gradient", "features",
           "configs", "launch")  # fmt: skip


def source_hash(folder: Path = SOURCES, kernels: Sequence[str] = KERNELS) -> str:
    """Of everything that decides what is compiled: the sources without comments and docstrings."""
    digest = hashlib.sha256()
    for name in kernels:
        tree = ast.parse((folder / f"{name}.py").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_text(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def one(compile_one: Callable[..., Any], faults_of: Callable[..., Any], target: Any) -> tuple[str, Any, list[str]]:
    try:
        reports = compile_one(target)
    except Exception as error:  # noqa: BLE001  (the report names every target that fails, whatever the reason)
        return str(target), None, [f"{type(error).__name__}: {error}"]
    return str(target), {r.kernel: [r.registers, r.spills, r.shared] for r in reports}, faults_of(target, reports)


def compile_matrix(
    results: Path,
    sources: str,
    targets: Sequence[Any],
    compile_one: Callable[..., Any],
    faults_of: Callable[..., Any],
) -> int:
    """Compile `targets` and keep what they need in a file of `results`; 1 if one has a fault, else 0.

    `compile_one(target)` gives the reports of its kernels, `faults_of(target, reports)` what is wrong with them.
    """
    results.mkdir(exist_ok=True)
    path = results / f"triton-{triton.__version__}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known.get("sources") != sources:
        known = {"faults": {}, "targets": {}}
    names = [str(target) for target in targets]
    rows = {name: known["targets"][name] for name in names if name in known["targets"] and name not in known["faults"]}
    broken: dict[str, list[str]] = {}
    open_targets = [target for target in targets if str(target) not in rows]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, kernels, wrong in pool.map(partial(one, compile_one, faults_of), open_targets):
            rows[name] = kernels
            if wrong:
                broken[name] = wrong
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in names if name in rows)
            head = json.dumps({"sources": sources, "faults": broken})[:-1]
            unfinished = path.with_suffix(".part")
            unfinished.write_text(f'{head}, "targets": {{\n{lines}\n}}}}\n')
            unfinished.replace(path)
            sys.stdout.write(f"\r{len(rows)} of {len(targets)} targets, {len(broken)} with faults")
            sys.stdout.flush()
    for name, wrong in broken.items():
        sys.stdout.write(f"\n  {name}: {wrong[0][:160]}")
    sys.stdout.write("\n")
    return 1 if broken else 0


def check_results(results: Path, sources: str, names: set[str]) -> None:
    """Whether every file of `results` holds all of `names`, without faults, compiled from these `sources`."""
    files = sorted(results.glob("*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text())
        assert result["sources"] == sources, f"{path.name} is stale: make compile-all"
        assert not result["faults"]
        assert names <= result["targets"].keys()


if __name__ == "__main__":
    arches = [int(arch) for arch in sys.argv[1:]] or [90]
    every = [target for arch in arches for target in every_target(arch)]
    sys.exit(compile_matrix(RESULTS, source_hash(), every, compile_target, faults))
