from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilewise.backends.base import BACKEND_NAMES
from tilewise.cli import FAILED, OK, doctor, run
from tilewise.cli.doctor import ABSENT, BROKEN, GOOD


def findings(capsys: pytest.CaptureFixture[str], expected: int = OK) -> dict[str, dict[str, str]]:
    assert run(["doctor", "--json"]) == expected
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is (expected == OK)
    return {finding["subject"]: finding for finding in said["findings"]}


def test_everything_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    assert {"Python", "PyTorch", "CUDA", "driver", "GPU", "NumPy", "Triton"} <= set(found)
    assert found["PyTorch"]["detail"].startswith(str(torch.__version__))
    for name in BACKEND_NAMES:
        backend = found[f"backend {name}"]
        assert backend["status"] in (GOOD, ABSENT)
        if backend["status"] == GOOD:
            assert "self-test on cpu: error " in backend["detail"]
        else:
            assert backend["detail"]
            assert backend["fix"]
    assert all(found[f"backend {name}"]["status"] == GOOD for name in ("standard", "tiled", "sdpa"))


def test_a_wrong_backend_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import tilewise

    real = tilewise.attention

    def wrong(*args: object, backend: str, **options: object) -> torch.Tensor:
        return real(*args, backend=backend, **options) * (1.001 if backend == "tiled" else 1.0)

    monkeypatch.setattr(tilewise, "attention", wrong)
    found = findings(capsys, FAILED)
    assert found["backend tiled"]["status"] == BROKEN
    assert "wrong on cpu: error" in found["backend tiled"]["detail"]
    assert found["backend standard"]["status"] == GOOD


def test_a_wrong_gradient_is_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import tilewise

    real = tilewise.attention

    def detached_v(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        return real(q, k, v.detach() + 0.999 * (v - v.detach()), **options)

    monkeypatch.setattr(tilewise, "attention", detached_v)
    assert findings(capsys, FAILED)["backend standard"]["status"] == BROKEN


def test_a_probe_that_raises_is_a_finding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise OSError("libcuda.so.1: cannot open shared object file\nand a second line")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    found = findings(capsys, FAILED)
    assert found["GPU"]["detail"] == "OSError: libcuda.so.1: cannot open shared object file"
    assert found["NumPy"]["status"] == GOOD


@pytest.mark.parametrize("missing", ["torch", "numpy", "triton"])
def test_it_survives_a_missing_library(missing: str) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None"
    code = f"{hide}; from tilewise.cli import run; sys.exit(run(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    said = json.loads(done.stdout)
    assert done.returncode == (OK if said["ok"] else FAILED)
    if missing == "torch":
        assert done.returncode == FAILED


def test_the_text_form_names_reason_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == OK
    shown = capsys.readouterr().out
    assert "backend hopper" in shown
    assert "fix: " in shown


BROKEN_LIBRARIES = [
    ("numpy", "ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')", "NumPy", "pip install numpy"),
    ("torch", "OSError('libgomp.so.1: cannot open\\nmore')", "PyTorch", "reinstall it, or report this line"),
    ("triton", "RuntimeError('undefined symbol')", "Triton", "reinstall it, or report this line"),
]


@pytest.mark.parametrize(("name", "problem", "subject", "fix"), BROKEN_LIBRARIES, ids=lambda value: str(value)[:6])
def test_a_library_that_breaks_when_imported_is_named(
    name: str, problem: str, subject: str, fix: str, tmp_path: Path
) -> None:
    """Installed, so that its version can be read, and yet not to be imported; what needs it is not blamed first."""
    (tmp_path / f"{name}.py").write_text(f"raise {problem}", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    code = "import sys; from tilewise.cli import run; sys.exit(run(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr
    assert done.returncode == FAILED
    broken = [finding for finding in json.loads(done.stdout)["findings"] if finding["status"] == BROKEN]
    assert (broken[0]["subject"], broken[0]["fix"]) == (subject, fix)
    assert "\n" not in broken[0]["detail"]
    if name == "torch":
        assert [finding["subject"] for finding in broken] == ["PyTorch", "backends"]


def test_an_extra_that_is_installed_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    found = doctor._probe("extra cli", lambda: doctor._extra("cli", ["rich"]))
    assert found.status == BROKEN
