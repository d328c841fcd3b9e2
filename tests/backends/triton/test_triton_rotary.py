"""The rotary kernel against the PyTorch path: interpreted on a CPU, at full size on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from aot import compiling, resources

from tilewise.backends import rotary as eager
from tilewise.backends.rotary import Place, as_turns
from tilewise.backends.triton.rotary import rotate
from tilewise.ops.rotary import rotary
from tilewise.ops.rotary_scaling import YaRN, plain_frequencies

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [
    ((1, 1, 1), (64, 64)),
    ((2, 3, 63), (40, 24)),
    ((3, 2, 65), (59, 58)),
    ((1, 5, 113), (128, 96)),
    ((2, 1, 2), (2, 2)),
]
"""(B, H, N) with (D, rotated columns)."""


def places(batch: int, n: int) -> dict[str, Place]:
    g = torch.Generator().manual_seed(n)
    high = 1 << 20
    return {
        "offset": Place(None, None, 12345),
        "offsets": Place(None, torch.randint(high, (batch,), generator=g, dtype=torch.int32).to(DEVICE), 0),
        "shared": Place(torch.randint(high, (1, n), generator=g).to(DEVICE), None, 0),
        "positions": Place(torch.randint(-high, high, (batch, n), generator=g, dtype=torch.int32).to(DEVICE), None, 0),
    }


def tolerance(x: Tensor, factor: float) -> float:
    """Angles to 2⁻³² turns, sines and cosines to 1.5 float32 roundings, and the rounding of two products and a sum."""
    eps = 2.0**-23
    return factor * (3.5 * eps + torch.finfo(x.dtype).eps) * x.float().abs().max().item() * 2**0.5


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sizes", "dims"), SIZES, ids=str)
def test_kernel_turns_as_pytorch_does(
    sizes: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype, interleaved: bool, kernels: None
) -> None:
    (batch, heads, n), (head_dim, dim) = sizes, dims
    x = torch.randn(batch, n, heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
    turns = as_turns(plain_frequencies(dim, 10000.0), x.device)
    factor = 1.25
    for inverse, place in zip((False, True) * 2, places(batch, n).values(), strict=True):
        out, exact = torch.full_like(x, float("nan")), torch.empty_like(x, dtype=torch.float64)
        rotate(x, out, place, turns, factor, interleaved=interleaved, inverse=inverse)
        eager.rotate(x.double(), exact, place, turns, factor, interleaved=interleaved, inverse=inverse)
        assert (out.double() - exact).abs().max().item() <= tolerance(x, factor)
        assert torch.equal(out[..., dim:], x[..., dim:])
        rotate(x_copy := x.clone(), x_copy, place, turns, factor, interleaved=interleaved, inverse=inverse)
        assert torch.equal(x_copy, out)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_operator_and_its_gradient(interleaved: bool) -> None:
    x = torch.randn(3, 1000, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    offsets = torch.tensor([0, 7, 1_000_000], device="cuda", dtype=torch.int32)
    options = {"offset": offsets, "dim": 96, "interleaved": interleaved, "scaling": YaRN(8.0, 4096)}
    out, dout = rotary(x, **options), torch.randn(3, 8, 1000, 128, device="cuda", dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(out, x, dout)
    exact = rotary(x.detach().cpu().double(), **{**options, "offset": offsets.cpu()})
    exact_dx = rotary(dout.cpu().double(), **{**options, "offset": offsets.cpu()}, inverse=True)
    assert (out.cpu().double() - exact).abs().max().item() <= tolerance(x, 1.3)
    assert (dx.cpu().double() - exact_dx).abs().max().item() <= tolerance(dout, 1.3)


@pytest.mark.gpu
def test_in_place_and_launched_again() -> None:
    """A second launch takes what the first remembered, for other tokens, heads and positions too."""
    for heads, n in ((8, 100), (8, 100), (4, 100), (8, 33)):
        for indices in (torch.int32, torch.int64, torch.int32):
            x = torch.randn(2, n, heads, 64, device="cuda", dtype=torch.float16).transpose(1, 2)
            offset = torch.randint(1000, (2,), device="cuda", dtype=indices)
            exact = rotary(x.cpu().double(), offset=offset.cpu())
            assert (rotary(x, offset=offset).cpu().double() - exact).abs().max().item() <= tolerance(x, 1.0)
            version = x._version
            rotary(x, offset=offset, inplace=True)
            assert x._version > version
            assert (x.cpu().double() - exact).abs().max().item() <= tolerance(x, 1.0)


@pytest.mark.gpu
def test_more_sequences_than_a_grid_has_rows() -> None:
    x = torch.randn(70_000, 1, 1, 8, device="cuda")
    offsets = torch.arange(70_000, device="cuda", dtype=torch.int32)
    exact = rotary(x.cpu().double(), offset=offsets.cpu())
    assert (rotary(x, offset=offsets).cpu().double() - exact).abs().max().item() <= tolerance(x, 1.0)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    base = torch.empty((1 << 31) + 4096, device="cuda", dtype=torch.bfloat16)
    x = base.as_strided((1, 2, 5, 64), (0, 1 << 31, 64, 1))
    x.normal_()
    exact = rotary(x.cpu().double(), offset=3)
    assert (rotary(x, offset=3).cpu().double() - exact).abs().max().item() <= tolerance(x, 1.0)


@pytest.mark.gpu
def test_captured_call_follows_its_lengths() -> None:
    x = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.bfloat16)
    offset = torch.tensor([3, 9], device="cuda", dtype=torch.int32)
    rotary(x, offset=offset)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rotary(x, offset=offset)
    offset.add_(100)
    graph.replay()
    assert torch.equal(out, rotary(x, offset=offset))


@pytest.mark.parametrize("arch", [80, 90, 120], ids=lambda arch: f"compile-sm_{arch}")
@pytest.mark.parametrize("interleaved", [False, True])
def test_compile_spills_nothing(arch: int, interleaved: bool, compiler: None) -> None:
    for n, dtype in ((1, torch.bfloat16), (4096, torch.bfloat16), (4096, torch.float32)):
        x = torch.empty(2, 8, n, 128, dtype=dtype, device="meta")
        turns = torch.empty(64, dtype=torch.int64, device="meta")
        with compiling(arch) as compiled:
            rotate(x, torch.empty_like(x), Place(None, None, 0), turns, 1.0, interleaved=interleaved, inverse=False)
        report = resources(compiled[0])
        assert report.spills == 0, report[:4]
        assert report.registers <= 128, report[:4]
