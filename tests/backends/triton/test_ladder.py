"""The rungs below the fused kernel: six kernels, and FlashAttention-1's loop order."""

from __future__ import annotations

import pytest
from triton_cases import DEVICE, DTYPES

from budget import Case, budgets, worst
from cases import cotangents, make_case

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("rung", ["six_kernels", "v1_order"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 16), (70, 90, 40), (129, 65, 64), (64, 192, 8)])
def test_rung(rung: str, causal: bool, n: int, m: int, dim: int) -> None:
    from tilewise.backends.triton.six_kernels import six_kernels
    from tilewise.backends.triton.v1_order import v1_order

    run = {"six_kernels": six_kernels, "v1_order": v1_order}[rung]
    case = make_case({"causal", "dv"} if causal else {"dv"}, n=n, m=m, dim=dim)
    dout, _ = cotangents(case)
    for dtype in DTYPES:
        tensors = {name: x.to(dtype) for name, x in case.tensors.items()}
        exact, allowed = budgets(Case(tensors, case.options), dtype, dout.to(dtype))
        out = run(*(tensors[name].to(DEVICE) for name in "qkv"), causal=causal)
        assert worst(out.cpu(), exact.out) <= allowed["out"], dtype
