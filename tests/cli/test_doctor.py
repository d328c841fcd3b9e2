from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tilewise.backends.base import BACKEND_NAMES
from tilewise.cli import FAILED, OK, run
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
