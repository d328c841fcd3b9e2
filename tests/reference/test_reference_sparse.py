"""Gather + batched matmul equals masked dense attention exactly where they see the same keys, in O(N·w) memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import budget
import oracle
from tilewise.reference.sparse import block_sparse_attention, window_attention


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(n: int, m: int, heads: int = 4, kv_heads: int = 2, d: int = 16, dv: int = 12) -> dict[str, Tensor]:
    shapes = {"q": (2, heads, n, d), "k": (2, kv_heads, m, d), "v": (2, kv_heads, m, dv)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def pattern(n: int, m: int, block: int, heads: int | None) -> tuple[Tensor, Tensor]:
    """A random block pattern: the index, shuffled and filled up with −1, and the dense mask [heads or 1, n, m]."""
    rows, cols = math.ceil(n / block), math.ceil(m / block)
    chosen = torch.rand(heads or 1, rows, cols) < 0.5
    chosen[:, 0] = False
    index = torch.full((heads or 1, rows, int(chosen.sum(-1).max()) + 1), -1)
    for h in range(index.shape[0]):
        for i in range(rows):
            seen = chosen[h, i].nonzero()[:, 0]
            index[h, i, : len(seen)] = seen[torch.randperm(len(seen))]
    mask = chosen.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :n, :m]
    return (index if heads else index[0]), mask


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 113), (113, 2), (64, 64), (65, 97)])
@pytest.mark.parametrize("window", [(0, 0), (5, 0), (0, 7), (30, 11), (300, 300)])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_window_equals_the_oracle(n: int, m: int, window: tuple[int, int], block: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return window_attention(q, k, v, *window, block=block)

    case = budget.Case(dict(inputs(n, m)), {"window": window})
    budget.assert_within(attention, case, torch.float32, torch.randn(2, 4, n, 12), torch.randn(2, 4, n))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 113), (113, 2), (64, 64), (65, 97)])
@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_equal_the_oracle(n: int, m: int, block: int, per_head: bool, causal: bool) -> None:
    index, mask = pattern(n, m, block, 4 if per_head else None)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(q, k, v, index, block, causal=causal)

    case = budget.Case({**inputs(n, m), "mask": mask}, {"causal": causal})
    budget.assert_within(attention, case, torch.float32, torch.randn(2, 4, n, 12), torch.randn(2, 4, n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
        return window_attention(q, k, v, *window, scale=scale, block=16)

    case = budget.Case(dict(inputs(65, 97)), {"window": (20, 3), "scale": 0.3})
    budget.assert_within(attention, case, dtype, torch.randn(2, 4, 65, 12), torch.randn(2, 4, 65))


def test_gradcheck() -> None:
    q, k, v = (x.double().requires_grad_() for x in inputs(5, 7, 2, 1, 4, 3).values())
    index = torch.tensor([[1, 0], [2, -1], [-1, 3]])
    assert torch.autograd.gradcheck(lambda q, k, v: window_attention(q, k, v, 2, 1, block=2), (q, k, v))
    for causal in (False, True):

        def blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
            return block_sparse_attention(q, k, v, index, 2, causal=causal).out

        assert torch.autograd.gradcheck(blocks, (q, k, v))


def test_rows_that_see_nothing() -> None:
    tensors = [x.requires_grad_() for x in inputs(40, 10).values()]
    # Row i stands at i − 30 and sees one key to its left and one to its right.
    out, lse = window_attention(*tensors, 1, 1, block=16)
    assert out[:, :, :29].eq(0).all()
    assert lse[:, :, :29].eq(-float("inf")).all()
    assert lse[:, :, 29:].isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum() + lse[:, :, 29:].sum(), tensors))
    nothing = torch.full((3, 1), -1)
    out, lse = block_sparse_attention(*tensors, nothing, 16)
    assert out.eq(0).all()
    assert lse.eq(-float("inf")).all()


def test_no_rows_or_no_keys() -> None:
    q, k, v = inputs(0, 5).values()
    assert window_attention(q, k, v, 1, 1).out.shape == (2, 4, 0, 12)
    assert block_sparse_attention(q, k, v, torch.zeros(0, 1, dtype=torch.int64), 4).lse.shape == (2, 4, 0)
    q, k, v = inputs(5, 0).values()
    assert window_attention(q, k, v, 1, 1).lse.eq(-float("inf")).all()
    assert block_sparse_attention(q, k, v, torch.full((2, 1), -1), 4).out.eq(0).all()


class Largest(TorchDispatchMode):
    """The largest storage that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("n", [2048, 4096])
def test_memory_is_linear_in_n(n: int) -> None:
    """Nothing larger than the scores of the gathered keys, or the gathered K of N/block chunks of `width` keys."""
    tensors = [x.requires_grad_() for x in inputs(n, n, 1, 1).values()]
    block, left, right = 32, 40, 8
    width = block + left + right
    with Largest() as window:
        window_attention(*tensors, left, right, block=block).out.sum().backward()
    per_row = 4 * max(2 * width, 2 * width * 16 // block)
    assert window.bytes <= n * per_row
    index = torch.stack([torch.arange(n // block), (torch.arange(n // block) + 5) % (n // block)], dim=-1)
    with Largest() as blocks:
        block_sparse_attention(*tensors, index, block).out.sum().backward()
    assert blocks.bytes <= n * 4 * 2 * max(2 * block, 2 * 16)
    assert n * per_row < n * n * 4


def test_bad_windows_and_indices_are_refused() -> None:
    q, k, v = inputs(40, 40).values()
    with pytest.raises(ValueError, match="left: got -1; wants at least 0"):
        window_attention(q, k, v, -1, 0)
    with pytest.raises(ValueError, match="block: got 0; wants at least 1"):
        window_attention(q, k, v, 1, 0, block=0)
    with pytest.raises(TypeError, match=r"block_index: got torch\.float32; wants an integer tensor"):
        block_sparse_attention(q, k, v, torch.zeros(3, 1), 16)
    for index, message in {
        (2, 1): r"block_index: got \[2, 1\]; wants \[3, n\] or \[4, 3, n\]",
        (3, 3, 1): r"block_index: got \[3, 3, 1\]; wants \[3, n\] or \[4, 3, n\]",
        (3,): r"block_index: got \[3\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, torch.zeros(index, dtype=torch.int64), 16)
    with pytest.raises(ValueError, match="block_index: got 0 to 3; wants -1 to 2"):
        block_sparse_attention(q, k, v, torch.tensor([[0], [1], [3]]), 16)
    with pytest.raises(ValueError, match="a block twice in one row"):
        block_sparse_attention(q, k, v, torch.tensor([[0, 1], [2, 2], [-1, -1]]), 16)


def test_the_oracle_sees_the_same_window() -> None:
    """The two spellings of a window: as distances, and as a band of the dense mask."""
    i, j = torch.arange(7)[:, None] + 2, torch.arange(9)
    band = (j >= i - 3) & (j <= i + 1)
    assert torch.equal(oracle.allowed(7, 9, 1, window=(3, 1))[0, 0], band)


def test_everything_stays_on_the_device_of_its_inputs() -> None:
    """On the meta device, where a tensor made elsewhere raises; the index may be anywhere."""
    q, k, v = (x.to("meta") for x in inputs(40, 30).values())
    assert window_attention(q, k, v, 3, 1).out.device.type == "meta"
    index = torch.tensor([[0], [1], [-1]])
    assert block_sparse_attention(q, k, v, index, 16, causal=True).out.device.type == "meta"
