"""The backward's two small kernels, which Triton's interpreter can run: row statistics and the conversion of dQ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tilewise.backends.hopper.conversion import convert_dq
from tilewise.backends.hopper.preprocess import row_statistics
from tilewise.backends.triton import interpreting

DEVICE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreting(), reason="kernels run on a GPU or under TRITON_INTERPRET=1"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.float16)


def dlse_of(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -math.inf, 0.25) * 0.5


def statistics_of(
    out: Tensor, dout: Tensor, lse: Tensor, sink: Tensor | None, lengths: Tensor | None, n: int, block_d: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(LSE·log2 e, then Δ: [2, B·H, head_rows]), the accumulator, and dsink in parts."""
    heads = out.shape[1]
    batch = out.shape[0] if lengths is None else len(lengths) - 1
    pairs = -(-n // 128)
    head_rows = pairs * 128 if lengths is None else -(-(out.shape[2] + 128 * batch) // 128) * 128
    total = out.shape[0] * heads * head_rows
    found = torch.full((total * 2,), math.nan, device=DEVICE)
    accumulator = torch.full((total * block_d,), math.nan, device=DEVICE)
    block = 64 if block_d == 128 else 128
    tiles = pairs * (128 // block)
    parts = torch.full((batch, heads, tiles), math.nan, device=DEVICE) if sink is not None else None
    row_statistics[(tiles, batch * heads)](
        out, dout, lse, dlse_of(lse) if sink is not None else None, sink, lengths, found, accumulator, parts,
        *out.stride()[:3], *dout.stride()[:3], heads, n, out.shape[2], head_rows,
        out.shape[3], block_d, block, lengths is not None, sink is not None, sink is not None,
    )  # fmt: skip
    return found.view(-1, 2, 64).transpose(0, 1).reshape(2, -1, head_rows), accumulator, parts


@pytest.mark.parametrize(("dim", "block_d"), [(40, 64), (64, 64), (96, 128)])
@pytest.mark.parametrize("with_sink", [False, True])
def test_statistics(dim: int, block_d: int, with_sink: bool) -> None:
    out, dout = normal(2, 3, 113, dim), normal(2, 3, 113, dim, seed=1)
    lse = normal(2, 3, 113, seed=2).float()
    lse[:, :, 5] = -math.inf
    sink = normal(3, seed=3).float() if with_sink else None
    found, accumulator, parts = statistics_of(out, dout, lse, sink, None, 113, block_d)
    delta = (out.double() * dout.double()).sum(-1) - (dlse_of(lse).double() if with_sink else 0.0)
    seen = lse > -math.inf
    lse2, found_delta = (x.view(2, 3, -1)[:, :, :113] for x in found)
    assert torch.allclose(lse2[seen], lse[seen] / math.log(2.0), rtol=1e-6, atol=1e-6)
    assert (lse2[~seen] == math.inf).all()
    assert (found[0][:, 113:] == math.inf).all()
    assert torch.allclose(found_delta.double()[seen], delta[seen], rtol=1e-5, atol=1e-5)
    assert (accumulator == 0.0).all()
    if parts is not None and sink is not None:
        share = (sink.double()[None, :, None] - lse.double()).exp().masked_fill(~seen, 0.0) * delta
        assert torch.allclose(parts.double().sum((0, 2)), -share.sum((0, 2)), rtol=1e-5, atol=1e-4)


def test_statistics_of_packed_sequences() -> None:
    sizes = [70, 0, 130, 1]
    lengths = torch.tensor([0, 70, 70, 200, 201], dtype=torch.int32, device=DEVICE)
    out, dout, lse = normal(1, 2, 201, 64), normal(1, 2, 201, 64, seed=1), normal(1, 2, 201, seed=2).float()
    found, accumulator, _ = statistics_of(out, dout, lse, None, lengths, 130, 64)
    delta = (out.double() * dout.double()).sum(-1)[0]
    for b, size in enumerate(sizes):
        first = int(lengths[b])
        padded = (first + 128 * b) // 128 * 128
        end = padded + -(-size // 128) * 128
        rows = slice(padded, padded + size)
        assert torch.allclose(found[0][:, rows], lse[0, :, first : first + size] / math.log(2.0), rtol=1e-6, atol=1e-6)
        assert torch.allclose(found[1][:, rows].double(), delta[:, first : first + size], rtol=1e-5, atol=1e-5)
        assert (found[0][:, padded + size : end] == math.inf).all()
        assert (accumulator.view(2, -1, 64)[:, padded:end] == 0.0).all()


def wgmma_order(tile: Tensor) -> Tensor:
    """A [64, 64] tile as the main kernel stores it, by PTX's description of the accumulator fragment of wgmma.

    Thread t of warp w holds rows 16w + t/4 and 8 below, columns 8i + 2(t mod 4) and its right neighbour; each 16 bytes
    are those four elements, a warp's 512 bytes lie in a row, then the warps, then i.
    """
    flat = []
    for i in range(8):
        for warp in range(4):
            for t in range(32):
                row, column = 16 * warp + t // 4, 8 * i + 2 * (t % 4)
                flat += [tile[row, column], tile[row, column + 1], tile[row + 8, column], tile[row + 8, column + 1]]
    return torch.stack(flat)


@pytest.mark.parametrize(("dim", "block_d"), [(64, 64), (40, 64), (128, 128)])
def test_conversion(dim: int, block_d: int) -> None:
    heads, n, head_rows = 2, 113, 128
    exact = torch.randn(1, heads, head_rows, block_d, generator=torch.Generator().manual_seed(0))
    tiles = [
        wgmma_order(exact[0, h, 64 * block : 64 * block + 64, 64 * half : 64 * half + 64])
        for h in range(heads)
        for block in range(head_rows // 64)
        for half in range(block_d // 64)
    ]
    dq = torch.full((1, heads, n, dim), math.nan, device=DEVICE, dtype=torch.float16)
    convert_dq[(head_rows // 64 * (block_d // 64), heads)](
        torch.cat(tiles).to(DEVICE), dq, None, *dq.stride()[:3], heads, n, head_rows, 0.5, dim, block_d, False
    )
    assert torch.equal(dq.cpu(), (exact[:, :, :n, :dim] * 0.5).half())
