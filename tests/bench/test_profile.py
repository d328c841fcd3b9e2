"""What the profiler's operators and kernels are counted as, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilewise.bench.profile import hardware_command, op_cost, profile_call
from tilewise.cost.counts import backward_flops, forward_flops, ideal_traffic, self_attention
from tilewise.cost.hardware import DEVICES

SPEC = self_attention(113, 64, batch=2, heads=3, dtype="bfloat16")


def test_products_by_their_shapes() -> None:
    assert op_cost("aten::bmm", [[6, 10, 20], [6, 20, 30]], SPEC) == (2 * 6 * 10 * 20 * 30, 2 * 6 * (200 + 600 + 300))
    assert op_cost("aten::mm", [[10, 20], [20, 30]], SPEC) == (2 * 10 * 20 * 30, 2 * (200 + 600 + 300))
    assert op_cost("aten::addmm", [[30], [10, 20], [20, 30]], SPEC)[0] == 2 * 10 * 20 * 30


def test_elementwise_operators_move_what_they_touch() -> None:
    assert op_cost("aten::exp_", [[4, 5]], SPEC) == (0, 2 * (20 + 20))
    assert op_cost("aten::mul", [[4, 5], [5]], SPEC) == (0, 2 * (20 + 5 + 20))
    for view in ("aten::transpose", "aten::empty", "aten::as_strided", "aten::view", "aten::matmul", "aten::softmax"):
        assert op_cost(view, [[4, 5]], SPEC) == (0, 0)
    assert op_cost("void vectorized_kernel", [], SPEC) == (0, 0)


def test_fused_kernels_by_the_problem() -> None:
    ideal = ideal_traffic(SPEC).bytes
    for name in ("attention_forward", "aten::_flash_attention_forward", "pytorch_flash::flash_fwd_kernel<x>"):
        assert op_cost(name, [[1]], SPEC) == (forward_flops(SPEC).matmul, ideal)
    for name in ("attention_backward", "aten::_scaled_dot_product_flash_attention_for_cpu_backward"):
        assert op_cost(name, [[1]], SPEC) == (backward_flops(SPEC).matmul, 2 * ideal)


def test_the_two_backward_kernels_recompute_two_products() -> None:
    """Seven products instead of five: QKᵀ and dO·Vᵀ are done in both."""
    uneven = replace(SPEC, v_head_dim=32)
    both = sum(op_cost(name, [], uneven)[0] for name in ("keys_gradient", "queries_gradient"))
    scores = 2 * 3 * 113 * 113
    assert both == backward_flops(uneven).matmul + 2 * scores * (64 + 32)


def test_a_profile_without_a_roof_places_nothing() -> None:
    x = torch.randn(1, 2, 33, 8)
    found = profile_call(lambda: x @ x.mT, self_attention(33, 8, dtype="float32"), torch.device("cpu"))
    assert any(kernel.flops for kernel in found.kernels)
    assert all(kernel.reached is None for kernel in found.kernels)
    assert [kernel.milliseconds for kernel in found.kernels] == sorted(
        (kernel.milliseconds for kernel in found.kernels), reverse=True
    )


def test_a_dtype_the_roof_does_not_know_is_not_placed() -> None:
    x = torch.randn(1, 2, 33, 8)
    spec = self_attention(33, 8, dtype="bfloat16")
    found = profile_call(lambda: x @ x.mT, spec, torch.device("cpu"), DEVICES["T4"])
    assert all(kernel.reached is None for kernel in found.kernels)


def test_the_hardware_profilers_command() -> None:
    gpu = hardware_command(torch.device("cuda"), ["attention_forward", "x"], "tilewise profile --seq 8")
    assert gpu == "ncu --set full --launch-count 1 --kernel-name attention_forward tilewise profile --seq 8"
    assert hardware_command(torch.device("cpu"), [], "tilewise profile").startswith("perf stat -e ")


def test_a_trace_that_cannot_be_written_is_an_oserror() -> None:
    from pathlib import Path

    x = torch.randn(2, 2)
    with pytest.raises(OSError, match="No such file"):
        profile_call(lambda: x @ x, SPEC, torch.device("cpu"), trace=Path("/no/such/folder/t.json"))
