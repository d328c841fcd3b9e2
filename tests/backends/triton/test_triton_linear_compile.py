"""Ahead-of-time compilation of linear attention's kernels for sm_90, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from aot import Report, compiling, resources
from compile_cases import SHARED_MEMORY
from machine_code import unset_uniform_registers
from torch import Tensor

from tilewise.backends.linear import LinearOperands
from tilewise.backends.triton.linear import TRITON_LINEAR
from tilewise.spec import LinearSpec

VARIANTS: list[dict[str, Any]] = [
    {},
    {"normalize": True, "feature_map": "elu"},
    {"decay": "token", "scale": 0.3},
    {"decay": "channel", "exclusive": True},
]


def compiled(spec: LinearSpec, **changes: Any) -> list[Report]:
    """The kernels of forward and backward, as their launchers launch them; `changes` to the launch shapes."""
    dtype = getattr(torch, spec.dtype)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    shape = (1, spec.heads, spec.q_len)
    gates = {"none": None, "token": meta(*shape, dtype=torch.float32)}.get(
        spec.decay, meta(*shape, spec.head_dim, dtype=torch.float32)
    )
    cu_seqlens = meta(spec.batch + 1, dtype=torch.int32) if spec.packed else None
    q, v = meta(*shape, spec.head_dim), meta(*shape, spec.v_head_dim)
    operands = LinearOperands(q, meta(*q.shape), v, gates, cu_seqlens=cu_seqlens)
    plan = TRITON_LINEAR.configure(spec)
    plan = plan._replace(shape=plan.shape._replace(**changes))
    with compiling(90) as kernels:
        result = TRITON_LINEAR.forward(operands, spec, plan, state=True)
        dout = meta(*v.shape)
        gated = gates is not None
        TRITON_LINEAR.backward(dout, result.s, result.z, operands, result.out, result.den, spec, plan, gated)
    return [resources(kernel) for kernel in kernels]


def check(reports: list[Report]) -> None:
    for report in reports:
        assert report.shared <= SHARED_MEMORY[90], report[:4]
        assert not unset_uniform_registers(report.compiled), report[:4]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_runs_most(variant: dict[str, Any], compiler: None) -> None:
    """Narrow rows beside wide ones made the assembler read unset registers; the tables avoid them."""
    check(compiled(LinearSpec(1, 16, 16384, 16384, 128, 128, "bfloat16", "sm_90", **variant)))


@pytest.mark.parametrize(
    ("dim", "v_dim", "dtype", "variant"),
    [
        (64, 24, "bfloat16", {"decay": "token", "packed": True}),
        (40, 64, "float16", {"normalize": True}),
        (256, 256, "float16", {"normalize": True, "feature_map": "elu"}),
    ],
    ids=str,
)
def test_others(dim: int, v_dim: int, dtype: str, variant: dict[str, Any], compiler: None) -> None:
    check(compiled(LinearSpec(2, 4, 4096, 4096, dim, v_dim, dtype, "sm_90", **variant)))


def test_whole_chunks(compiler: None) -> None:
    spec = LinearSpec(1, 16, 16384, 16384, 128, 128, "bfloat16", "sm_90", decay="channel", exclusive=True)
    reports = compiled(spec, whole=True, inner_warps=8)
    check(reports)
    assert all(report.spills == 0 for report in reports if report.kernel.startswith("inner"))


def test_a_few_tokens_need_one_kernel(compiler: None) -> None:
    reports = compiled(LinearSpec(1, 16, 1, 1, 128, 128, "bfloat16", "sm_90", normalize=True, feature_map="elu"))
    assert reports[0].kernel == "recur"
    assert reports[0].spills == 0
