from __future__ import annotations

import math

import pytest
import torch

import oracle
from tilewise.bench.exactness import exact_and_budget, largest_error, unit_in_last_place
from tilewise.bench.inputs import Inputs


def problem(n: int, m: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(n)
    shapes = ((2, 3, n, 40), (2, 3, m, 40), (2, 3, m, 40))
    return Inputs(*(torch.randn(shape, generator=generator).to(dtype) for shape in shapes))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 65), (113, 113)])
def test_exact_output_is_that_of_the_oracle(n: int, m: int, causal: bool) -> None:
    inputs = problem(n, m, torch.float32)
    exact, _ = exact_and_budget(inputs, causal)
    wanted, _ = oracle.attention(*(t.double() for t in inputs), causal=causal)
    torch.testing.assert_close(exact, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_admits_rounding_and_nothing_else(dtype: torch.dtype) -> None:
    inputs = problem(113, 200, dtype)
    exact, budget = exact_and_budget(inputs, causal=False)
    q, k, v = inputs
    plain = torch.softmax(q @ k.mT * 40**-0.5, dim=-1) @ v
    assert 0 < largest_error(plain, exact) <= budget
    assert budget < 20 * torch.finfo(dtype).eps * exact.abs().max()
    slightly_wrong_scale = torch.softmax(q.double() @ k.double().mT * 40**-0.5 * 1.1, dim=-1) @ v.double()
    assert largest_error(slightly_wrong_scale, exact) > budget


def test_largest_error_is_infinite_for_nan() -> None:
    assert largest_error(torch.tensor([0.0, math.nan]), torch.zeros(2, dtype=torch.float64)) == math.inf
    assert largest_error(torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0], dtype=torch.float64)) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.75, 1.0, 1.5, 100.0])
def test_unit_in_last_place_is_the_gap_to_the_next_number(value: float, dtype: torch.dtype) -> None:
    start = torch.tensor(value, dtype=dtype)
    gap = torch.nextafter(start, torch.tensor(math.inf, dtype=dtype)).double() - start.double()
    assert unit_in_last_place(value, dtype) == gap.item()


def test_unit_in_last_place_of_zero() -> None:
    assert unit_in_last_place(0.0, torch.float32) == 0.0
