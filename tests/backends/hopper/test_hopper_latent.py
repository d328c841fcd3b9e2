"""The Hopper kernel for latent caches: emulated, compiled ahead of time, and on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

import emulator
from aot import compiling, resources
from hopper_cases import DEVICE
from hopper_targets import NEWER_SPILLS, OLD_ASSEMBLER, SHARED_MEMORY
from latent_problems import CASES, COLUMNS, WIDTH, Latent, assert_right, make
from machine_code import unset_uniform_registers

from tilewise.backends.decoding import DecodeOperands
from tilewise.backends.hopper import decoding
from tilewise.backends.hopper.decoding import HOPPER_DECODE, fits_copy_engine
from tilewise.backends.triton import interpreting
from tilewise.spec import DecodeSpec

emulated = pytest.mark.skipif(DEVICE == "cuda" or interpreting(), reason="the kernel runs itself there")
on_device = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90"
)
SPEC = DecodeSpec(
    64, 128, 1, 1, 8192, WIDTH, COLUMNS, 8192, "bfloat16", "sm_90", WIDTH**-0.5, latent=True
)  # fmt: skip


@emulated
@pytest.mark.parametrize("name", CASES)
def test_emulated(name: str) -> None:
    with emulator.emulating(seed=len(name)):
        assert_right(make(**CASES[name]))


@emulated
def test_a_page_outside_the_pool_counts_as_absent() -> None:
    with emulator.emulating():
        assert_right(make(lengths=[300, 100], page=64, lost=(0, 2)))
        assert_right(make(lengths=[300, 100], page=128, lost=(1, 0), tokens=2))


@pytest.mark.gpu
@on_device
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_on_the_device(name: str, dtype: str) -> None:
    assert_right(make(**CASES[name], dtype=dtype))


@pytest.mark.gpu
@on_device
def test_long_caches_and_lost_pages_on_the_device() -> None:
    assert_right(make(lengths=[5000, 17, 3000], heads=128, dtype="bfloat16"))
    assert_right(make(lengths=[5000, 17, 3000], heads=128, page=256, lost=(0, 3), tokens=2, dtype="bfloat16"))


@pytest.mark.gpu
@on_device
def test_the_same_bits_250_times_on_the_device() -> None:
    problem = make(lengths=[900, 333], heads=128, dtype="bfloat16", splits=2)
    plan = decoding.plan(problem.spec, 132)
    first = decoding.forward(problem.operands, plan, problem.spec)
    for _ in range(249):
        again = decoding.forward(problem.operands, plan, problem.spec)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _compile(problem: DecodeSpec) -> list[Any]:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, pages = problem.batch, problem.page_size
    pool = (batch, 1, problem.capacity) if pages is None else (batch * problem.capacity // pages, 1, pages)
    tokens = problem.q_total if problem.packed else problem.q_len
    operands = DecodeOperands(
        meta(1 if problem.packed else batch, problem.heads, tokens, WIDTH),
        meta(*pool, WIDTH),
        None,
        meta(batch, dtype=torch.int32),
        page_table=None if pages is None else meta(batch, problem.capacity // pages, dtype=torch.int32),
        cu_seqlens_q=meta(batch + 1, dtype=torch.int32) if problem.packed else None,
    )
    with compiling(90) as compiled:
        decoding.forward(operands, decoding.plan(problem, 132), problem)
    return [resources(kernel) for kernel in compiled]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_len": 2, "page_size": 64, "num_splits": 4},
        {"q_len": 3, "packed": True, "q_total": 100, "page_size": 128},
    ],
    ids=str,
)
def test_it_spills_no_more_than_is_known(change: dict[str, Any], compiler: None) -> None:
    report = _compile(replace(SPEC, **change))[0]
    assert report.kernel == "latent_decode"
    assert report.spills <= (0 if OLD_ASSEMBLER else NEWER_SPILLS["latent_decode"])
    assert report.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in report.compiled.asm["ptx"]
    assert not unset_uniform_registers(report.compiled)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "sm_100"}, "wgmma"),
        ({"latent": False}, "latent"),
        ({"head_dim": 544}, "rotary"),
        ({"dtype": "float32"}, "float32"),
        ({"page_size": 17}, "pages of 17"),
        ({"kv_heads": 2}, "one latent vector"),
        ({"causal": False, "window": (None, 3), "q_len": 2}, "a window"),
        ({"window": (100, None), "sink": True}, "a window and sinks"),
        ({"scale": -1.0}, "above zero"),
    ],
    ids=str,
)
def test_it_says_what_it_cannot_do(change: dict[str, Any], words: str) -> None:
    assert words in str(HOPPER_DECODE.why_not(replace(SPEC, **change)))


def test_what_the_copy_engine_takes() -> None:
    pool = torch.zeros(4, 1, 64, WIDTH, dtype=torch.bfloat16)
    assert fits_copy_engine(pool)
    assert fits_copy_engine(pool[:, :, :30])
    assert not fits_copy_engine(pool[..., 1:])
    assert not fits_copy_engine(torch.zeros(4, 1, 64, WIDTH + 4, dtype=torch.bfloat16)[..., :WIDTH])
    assert not fits_copy_engine(torch.zeros(4 * 64 * WIDTH + 64, dtype=torch.bfloat16).as_strided(
        (4, 1, 60, WIDTH), (60 * WIDTH + 8, 0, WIDTH, 1)
    ))  # fmt: skip


def test_the_plan_fills_the_device() -> None:
    assert decoding.plan(SPEC, 132).splits == 1
    assert decoding.plan(replace(SPEC, batch=1), 132).splits > 8
    assert "two consumers" in str(decoding.plan(SPEC, 132))


def test_a_problem_is_what_it_says() -> None:
    """The float64 side against a plain formula."""
    problem: Latent = make(lengths=[9], tokens=2, heads=2)
    q, k = problem.operands.q[0].double().cpu(), problem.operands.k[0, 0, :9].double().cpu()
    s = q @ k.mT * problem.spec.scale
    s[:, 0, 8] = -torch.inf
    torch.testing.assert_close(problem.out[0], torch.softmax(s, -1) @ k[:, :COLUMNS])
