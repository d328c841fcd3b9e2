"""The backward's selectable configurations compile for sm_90 without a GPU, and spill no more than is known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from aot import Report, compiling, resources, unset_uniform_registers
from torch import Tensor

from tilewise.backends.base import Needs, Operands
from tilewise.backends.hopper.backward import backward, backward_obstacle, plan
from tilewise.backends.triton import interpreting
from tilewise.masks import Causal
from tilewise.spec import AttentionSpec

SHARED_MEMORY = 227 << 10
"""Bytes that one block may have on sm_90 (CUDA C++ Programming Guide, technical specifications)."""

FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (1024, None)},
    "softcap": {"softcap": 30.0},
    "map": {"mask": str(Causal())},
    "packed": {"causal": True, "packed": True, "q_total": 4096, "k_total": 4096},
}
SPILLS = {
    64: {"full": 0, "causal": 144, "window": 208, "softcap": 16, "map": 80, "packed": 112},
    128: {"full": 48, "causal": 208, "window": 272, "softcap": 104, "map": 320, "packed": 216},
}
"""Bytes of stack a thread, the most of Triton 3.6.0, 3.7.1 and 3.9.0. The loop over fully visible tiles spills 8 bytes
at most; the rest is in the masked one."""


def compile_backward(dim: int, features: dict, dtype: torch.dtype = torch.bfloat16) -> list[Report]:
    """Row statistics, the main kernel and the conversion, as the launcher launches them."""
    leading, batch, heads, kv_heads, n = 1 if "packed" in features else 2, 2, 4, 2, 4096

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    name = str(dtype).removeprefix("torch.")
    spec = AttentionSpec(batch, heads, kv_heads, n, n, dim, dim, name, "sm_90", dim**-0.5, **features)
    assert backward_obstacle(spec) is None
    lengths = meta(batch + 1, dtype=torch.int32) if spec.packed else None
    q, dout, out = (meta(leading, heads, n, dim) for _ in range(3))
    k, v = (meta(leading, kv_heads, n, dim) for _ in range(2))
    operands = Operands(q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths)
    lse = meta(leading, heads, n, dtype=torch.float32)
    with compiling(90) as compiled:
        backward(dout, lse, operands, out, lse, spec, None, Needs())
    return [resources(kernel) for kernel in compiled]


@pytest.mark.parametrize("name", FEATURES, ids=lambda name: f"compile-sm_90-{name}")
@pytest.mark.parametrize("dim", [64, 128])
def test_spills_are_known(dim: int, name: str) -> None:
    if interpreting():
        pytest.skip("the interpreter replaces the compiler")
    reports = {report.kernel: report for report in compile_backward(dim, FEATURES[name])}
    assert reports.keys() == {"row_statistics", "attention_backward", "convert_dq"}
    for kernel, report in reports.items():
        allowed = SPILLS[dim][name] if kernel == "attention_backward" else 0
        assert report.spills <= allowed, report[:4]
        assert report.shared <= SHARED_MEMORY
        assert not unset_uniform_registers(report.compiled)
    assert "wgmma" in reports["attention_backward"].compiled.asm["ptx"]


def test_obstacles() -> None:
    common = {"heads": 2, "kv_heads": 2, "q_len": 64, "k_len": 64, "dtype": "bfloat16", "device": "sm_90"}

    def spec(**changes: object) -> AttentionSpec:
        sizes = {"head_dim": 64, "v_head_dim": 64} | changes
        return AttentionSpec(**({"batch": 1} | sizes), **common)  # type: ignore[arg-type]

    assert backward_obstacle(spec()) is None
    assert "128" in str(backward_obstacle(spec(head_dim=256)))
    assert "order" in str(backward_obstacle(spec(deterministic=True)))
    assert "65535" in str(backward_obstacle(spec(batch=40000)))
    assert plan(spec(head_dim=40, v_head_dim=72)).block_d == 128
