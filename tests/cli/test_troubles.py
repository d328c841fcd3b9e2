"""Every trouble of the list is a check with its fix, told from facts that this machine need not have."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.cli import FAILED, OK, troubles
from tilewise.cli.findings import ABSENT, BROKEN, GOOD, Finding
from tilewise.cost.calibration import Calibration, versions
from tilewise.cost.hardware import measured


@pytest.mark.parametrize(
    ("built", "driver", "toolkit", "status", "says"),
    [
        (None, "12.8", None, ABSENT, "uses no CUDA"),
        ("12.6", None, None, ABSENT, "no driver answers"),
        ("12.6", "12.8", None, GOOD, "none is needed"),
        ("12.6", "13.0", "12.1", GOOD, "driver up to 13.0"),
        ("13.0", "12.8", None, BROKEN, "too old for this PyTorch"),
        ("12.6", "12.8", "11.8", GOOD, "matters only to what you compile with nvcc"),
    ],
)
def test_cuda_of_driver_torch_and_toolkit(
    built: str | None, driver: str | None, toolkit: str | None, status: str, says: str
) -> None:
    found = troubles.versions(built, driver, toolkit)
    assert found.status == status
    assert says in found.detail
    assert found.fix or status != BROKEN


ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "compute_90")


@pytest.mark.parametrize(
    ("capability", "status", "says"),
    [
        (None, ABSENT, "no GPU"),
        ((7, 0), BROKEN, "this PyTorch starts at sm_75"),
        ((7, 5), ABSENT, "not to be confused with a CUDA version"),
        ((8, 0), GOOD, "compute capability 8.0"),
        ((9, 0), GOOD, "hopper: 9.0"),
    ],
)
def test_a_gpu_that_is_too_old(capability: tuple[int, int] | None, status: str, says: str) -> None:
    found = troubles.gpu_age(capability, "a card", ARCHITECTURES)
    assert found.status == status
    assert says in found.detail
    assert found.fix or status == GOOD or capability is None


def test_nothing_is_built() -> None:
    plain = troubles.building({}, "/usr/bin/gcc", "linux")
    assert plain.status == GOOD
    assert "MAX_JOBS=4 has no effect" in troubles.building({"MAX_JOBS": "4"}, "/usr/bin/gcc", "linux").detail
    without = troubles.building({}, None, "linux")
    assert without.status == ABSENT
    assert "gcc" in without.fix
    assert troubles.building({}, None, "darwin").status == GOOD


def test_an_interpreter_left_on() -> None:
    assert troubles.interpreter({}, "2.4.0").status == GOOD
    assert troubles.interpreter({"TRITON_INTERPRET": "0"}, "2.4.0").status == GOOD
    assert troubles.interpreter({"TRITON_INTERPRET": "1"}, "2.3.5").status == ABSENT
    broken = troubles.interpreter({"TRITON_INTERPRET": "1"}, "2.4.0")
    assert broken.status == BROKEN
    assert "numpy<2.4" in broken.fix


def test_a_transposed_layout_is_recognised() -> None:
    message = troubles._layout_message()
    assert message is not None
    found = troubles.layout(message)
    assert found.status == GOOD
    assert "layout='bshd'" in found.detail
    assert troubles.layout(None).status == BROKEN
    assert troubles.layout("some other complaint").status == BROKEN


def test_differences_that_are_normal() -> None:
    assert troubles.differences({"float32": 3e-7, "float16": 5e-4}).status == GOOD
    assert "another order" in troubles.differences({"float32": 3e-7}).detail
    assert troubles.differences({"float32": 3e-5}).status == BROKEN
    assert troubles.differences({"float16": float("nan")}).status == BROKEN
    assert set(troubles._differences()) == {"float32", "float16", "bfloat16"}


def test_still_out_of_memory() -> None:
    low = troubles.memory(2**30, 80 * 2**30, 60 * 2**30, "the GPU")
    assert low.status == ABSENT
    assert "1.0 of 80.0 GiB free, 60.0 GiB kept by this process" in low.detail
    assert "tilewise cost --model" in low.fix
    assert troubles.memory(70 * 2**30, 80 * 2**30, 0, "the GPU").fix == ""
    assert troubles.memory(30 * 2**30, 80 * 2**30, 0, "the GPU").fix
    assert troubles.memory(None, 8 * 2**30, 0, "the CPU").status == GOOD


def test_every_check_runs_here() -> None:
    for subject, check in troubles.found_here():
        found = check()
        assert isinstance(found, Finding)
        assert found.subject == subject
        assert found.status in (GOOD, ABSENT), found


def test_driver_and_toolkit_answers() -> None:
    for found in (troubles.driver_cuda(), troubles.toolkit_cuda()):
        assert found is None or found.count(".") == 1


@pytest.mark.parametrize(
    "breakage",
    [
        "import torch; torch.cuda.is_available = lambda: 1 / 0",
        "import os; os.sysconf = lambda name: 1 / 0",
        "import torch, ctypes; ctypes.CDLL = lambda name: 1 / 0; torch.version.cuda = '12.6'",
        "import tilewise; tilewise.attention = lambda *a, **o: 1 / 0",
    ],
)
def test_doctor_survives_whatever_is_broken(breakage: str) -> None:
    code = f"{breakage}\nimport sys\nfrom tilewise.cli import run; sys.exit(run(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    said = json.loads(done.stdout)
    assert done.returncode == (OK if said["ok"] else FAILED)
    assert len(said["findings"]) > 8


def test_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = measured("a box", arch="cpu", matmul={"float32": 1e11}, bandwidth=1e10, memory=2**34, how="by hand")
    fresh = Calibration(device, versions(), "2026-01-31", 30.0)
    file = tmp_path / "machine.json"
    none = troubles.calibration(None, file, None)
    assert (none.status, none.fix) == (ABSENT, "tilewise roofline --measure")
    assert "could not be kept: the reason" in troubles.calibration(None, file, "the reason").detail
    found = troubles.calibration(fresh, file, None)
    assert (found.status, found.detail) == (GOOD, "measured 2026-01-31: float32")
    old = troubles.calibration(replace(fresh, versions={"torch": "1.0"}), file, None)
    assert old.status == ABSENT
    assert "torch was 1.0" in old.detail
    file.write_text("{", encoding="utf-8")
    assert "holds no calibration" in troubles.calibration(None, file, None).detail
