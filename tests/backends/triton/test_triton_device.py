"""What only a device can show: graphs, determinism, huge offsets, unaligned views, memory and how often kernels
compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tilewise
from budget import worst
from tilewise.backends.base import Needs, Operands
from tilewise.backends.triton import TRITON
from tilewise.spec import AttentionSpec

pytestmark = pytest.mark.gpu


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def _reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    return tilewise.attention(q.double(), k.double(), v.double(), causal=causal, backend="standard")


def test_graph_replays_what_eager_computes() -> None:
    q, k, v = (_normal(2, 4, 300, 64) for _ in range(3))
    eager = tilewise.attention(q, k, v, causal=True, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tilewise.attention(q, k, v, causal=True, backend="triton")
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    fresh = tilewise.attention(q, k, v, causal=True, backend="triton")
    assert torch.equal(captured, fresh)
    assert not torch.equal(captured, eager)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_same_bits_every_time(dim: int) -> None:
    q, k, v, bias = _normal(2, 8, 700, dim), _normal(2, 2, 700, dim), _normal(2, 2, 700, dim), _normal(1, 8, 700, 700)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    dout = _normal(2, 8, 700, dim)

    def run() -> list[Tensor]:
        out = tilewise.attention(q, k, v, bias=bias, causal=True, backend="triton", deterministic=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    first = run()
    for _ in range(49):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


@pytest.mark.parametrize("strides", [(1 << 31, 64), (64, 1 << 24)], ids=["heads", "rows"])
def test_offsets_beyond_two_to_the_31(strides: tuple[int, int]) -> None:
    n, dim = 190, 64
    between_heads, between_rows = strides
    size = between_heads + (n - 1) * between_rows + dim

    def spread() -> Tensor:
        x = torch.empty(size, device="cuda", dtype=torch.bfloat16)
        x = x.as_strided((1, 2, n, dim), (size, between_heads, between_rows, 1))
        return x.normal_()

    q, k, v, dout = (spread() for _ in range(4))
    spec = AttentionSpec(1, 2, 2, n, n, dim, dim, "bfloat16", "sm_90", dim**-0.5, causal=True)
    config = TRITON.configure(spec)
    results = []
    for tensors in ((q, k, v, dout), tuple(x.contiguous() for x in (q, k, v, dout))):
        operands = Operands(*tensors[:3])
        out, lse = TRITON.forward(operands, spec, config)
        grads = TRITON.backward(tensors[3], None, operands, out, lse, spec, config, Needs())
        results.append((out, lse, grads.q, grads.k, grads.v))
    for wide, narrow in zip(*results, strict=True):
        assert wide is not None
        assert narrow is not None
        assert worst(wide.cpu(), narrow.cpu()) <= 2e-2 * narrow.abs().max().item()


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "copy engine"])
@pytest.mark.parametrize(
    "features", [{}, {"causal": True}, {"window": (150, None)}, {"softcap": 3.0, "causal": True}], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, dim) for dim in (16, 40, 64, 96, 128, 192, 256, 512)]
    + [(torch.float16, dim) for dim in (64, 128, 256)],
    ids=str,
)
def test_every_row_of_the_tables(dtype: torch.dtype, dim: int, features: dict, tma: bool) -> None:
    n, m = 515, 777
    q, dout = _normal(2, 4, n, dim, dtype=dtype), _normal(2, 4, n, dim, dtype=dtype)
    k, v = _normal(2, 2, m, dim, dtype=dtype), _normal(2, 2, m, dim, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    spec = AttentionSpec(2, 4, 2, n, m, dim, dim, name, "sm_90", dim**-0.5, **features)
    config = TRITON.configure(spec)._replace(tma=tma)
    operands = Operands(q, k, v)
    out, lse = TRITON.forward(operands, spec, config)
    grads = TRITON.backward(dout, None, operands, out, lse, spec, config, Needs())
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = tilewise.attention(*leaves, **features, backend="standard")
    expected = torch.autograd.grad(exact, leaves, dout.double())
    for ours, reference in zip((out, grads.q, grads.k, grads.v), (exact.detach(), *expected), strict=True):
        assert ours is not None
        error = (ours.double() - reference).norm() / reference.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("shift", [1, 4, 8])
def test_unaligned_views(shift: int) -> None:
    q, k, v = (_normal(1, 2, 200, 64 + shift)[..., shift:] for _ in range(3))
    out = tilewise.attention(q, k, v, causal=True, backend="triton")
    assert worst(out.cpu(), _reference(q, k, v, causal=True).cpu()) < 2e-2


def test_new_sizes_and_new_masks_compile_nothing() -> None:
    from tilewise.backends.triton.forward import attention_forward

    def compiled() -> int:
        return sum(len(caches[0]) for caches in attention_forward.device_caches.values())

    def call(n: int, m: int, mask: tilewise.masks.Mask | None) -> None:
        q, k = _normal(1, 2, n, 64), _normal(1, 2, m, 64)
        tilewise.attention(q, k, k, mask=mask, backend="triton")

    call(256, 512, None)
    call(256, 512, tilewise.masks.Causal())
    before = compiled()
    for n, m in ((100, 300), (257, 1), (1, 999), (1024, 1040)):
        call(n, m, None)
        call(n, m, tilewise.masks.Window(70, 3) | tilewise.masks.Global([0]))
    assert compiled() == before


def test_memory_is_linear() -> None:
    shape = (1, 16, 32768, 128)
    q, k, v = (_normal(*shape).requires_grad_() for _ in range(3))
    dout = _normal(*shape)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = tilewise.attention(q, k, v, causal=True, backend="triton")
    grads = torch.autograd.grad(out, (q, k, v), dout)
    needed = sum(x.numel() * x.element_size() for x in (q, k, v, dout, out, *grads))
    peak = torch.cuda.max_memory_allocated() - before + sum(x.numel() * x.element_size() for x in (q, k, v, dout))
    assert peak <= 1.02 * needed
