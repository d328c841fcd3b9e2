"""What importing costs and needs: core dependencies alone, no torch where DESIGN.md promises none, little time."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND_LINE = {"click", "rich", "jinja2"}
EXTRAS = COMMAND_LINE | {"matplotlib", "transformers", "safetensors", "tokenizers", "starlette", "uvicorn", "jupytext"}
TOOLS = {"sphinx", "myst_parser", "furo", "pytest", "hypothesis", "jaxtyping", "beartype"}

BLOCK = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""

IMPORT_ALL = """
import tilewise
for module in pkgutil.walk_packages(tilewise.__path__, "tilewise."):
    if not module.name.startswith({skipped!r}):
        importlib.import_module(module.name)
        print(module.name)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_every_module_imports_with_core_dependencies_alone() -> None:
    done = python(BLOCK.format(names=EXTRAS | TOOLS) + IMPORT_ALL.format(skipped="tilewise.cli."))
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert "tilewise.ops.dense" in imported
    assert "tilewise.bench.report.page" in imported


@pytest.mark.parametrize("room", ["errors", "spec", "masks", "cost"])
def test_specs_masks_and_costs_need_no_torch(room: str) -> None:
    code = BLOCK.format(names={"torch", "triton"}) + f"import tilewise.{room}\nassert 'torch' not in sys.modules"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_import_tilewise_loads_neither_torch_nor_numpy() -> None:
    done = python("import sys, tilewise; print([name for name in ('torch', 'numpy', 'click') if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_importing_the_whole_public_face_costs_little_beyond_torch() -> None:
    code = """
import time, torch
start = time.process_time()  # not the wall's: other work on the machine is not ours
import tilewise
for name in tilewise.__all__:
    getattr(tilewise, name)
print(time.process_time() - start)
"""
    seconds = min(float(python(code).stdout) for _ in range(3))
    assert seconds < 0.3
