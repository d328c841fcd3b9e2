"""Shapes, strides, packed sequences and empty rows on the triton backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, ON_GPU, triton

import oracle
import tilewise
from budget import assert_within, worst
from cases import cotangents, make_case
from tilewise.backends.base import Needs, Operands
from tilewise.backends.triton import TRITON
from tilewise.spec import AttentionSpec

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 200), (200, 1), (31, 33), (64, 64), (65, 63), (127, 129), (128, 256), (113, 40)]
)
@pytest.mark.parametrize("features", [set(), {"causal"}, {"window"}])
def test_sizes(n: int, m: int, features: set[str]) -> None:
    case = make_case(features, n=n, m=m, batch=1, heads=2, dim=24)
    dout, dlse = cotangents(case)
    assert_within(triton(), case, torch.float32, dout, dlse, f"{n}×{m} {features}")


@pytest.mark.parametrize("dim", [1, 2, 17, 40, 59, 80, 96, 111, 160] + ([192, 320, 503] if ON_GPU else []))
def test_head_dims(dim: int) -> None:
    case = make_case({"causal", "dv"}, n=70, m=66, batch=1, heads=2, dim=dim)
    dout, dlse = cotangents(case)
    assert_within(triton(), case, torch.float32, dout, dlse, f"D={dim}")
    assert_within(triton(), case, torch.float16, dout, dlse, f"D={dim} half")


@pytest.mark.parametrize("window", [(0, 0), (3, 9), (200, None), (None, 0), (70, 2**31 - 1)])
@pytest.mark.parametrize("offset", [None, 0, 50, -40, "tensor"])
def test_bands(window: tuple[int | None, int | None], offset: int | str | None) -> None:
    case = make_case({"offsets"} if offset == "tensor" else set(), n=90, m=70, batch=2, heads=1)
    options = {**case.options, "window": window}
    if offset is not None and offset != "tensor":
        options["q_offset"] = offset
    dout, dlse = cotangents(case)
    assert_within(triton(), case._replace(options=options), torch.float32, dout, dlse, f"{window} {offset}")


@pytest.mark.parametrize("shape", [(2, 3, 60, 70), (1, 3, 60, 70), (2, 1, 60, 70), (1, 1, 60, 70), (2, 3, 1, 70),
                                   (2, 1, 60, 1), (1, 1, 1, 70), (1, 3, 1, 1), (1, 1, 1, 1)], ids=str)  # fmt: skip
@pytest.mark.parametrize("features", [{"causal"}, {"mask", "offsets"}] if ON_GPU else [{"offsets"}])
def test_broadcast_bias(shape: tuple[int, ...], features: set[str]) -> None:
    case = make_case(features, n=60, m=70, batch=2, heads=3, dim=8)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    case = case._replace(tensors={**case.tensors, "bias": bias})
    dout, dlse = cotangents(case)
    assert_within(triton(), case, torch.float32, dout, dlse, f"{shape}")


def test_bias_of_minus_infinity_masks() -> None:
    case = make_case({"bias"}, n=40, m=50, batch=1, heads=2)
    case.tensors["bias"].masked_fill_(torch.rand(1, 2, 40, 50) < 0.3, float("-inf"))
    case.tensors["bias"][:, :, 3] = float("-inf")
    exact, lse = oracle.attention(**case.tensors)
    out, ours = triton()(**{name: x.float() for name, x in case.tensors.items()})
    assert worst(out, exact) < 1e-5
    assert worst(ours, lse) < 1e-5


@pytest.mark.parametrize("radius", [0, 1, 5, 40, 300])
@pytest.mark.parametrize("features", [{"causal"}, {"offsets", "mask", "gqa"}])
def test_relative_radii(radius: int, features: set[str]) -> None:
    case = make_case(features, n=70, m=99, batch=2 if ON_GPU else 1, heads=2)
    values = torch.randn(2, 2 * radius + 1, generator=torch.Generator().manual_seed(radius), dtype=torch.float64)
    case = case._replace(tensors={**case.tensors, "relative": values})
    dout, dlse = cotangents(case)
    assert_within(triton(), case, torch.float32, dout, dlse, f"R={radius} {features}")


@pytest.mark.parametrize("offset", [150, -150])
def test_relative_distances_that_only_the_device_knows(offset: int) -> None:
    """Offsets in a tensor may carry rows further from the keys than the lengths say, and still inside the radius."""
    case = make_case({"relative"}, n=33, m=40, batch=1, heads=2, dim=8)
    values = torch.randn(2, 401, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {**case.options, "q_offset": torch.tensor([offset], dtype=torch.int32)}
    case = case._replace(tensors={**case.tensors, "relative": values}, options=options)
    dout, dlse = cotangents(case)
    assert_within(triton(), case, torch.float32, dout, dlse, f"offset {offset}")


@pytest.mark.parametrize("offset", [2**31 - 1, -(2**31 - 1), 2**30 - 8])
def test_positions_that_32_bits_do_not_hold_are_refused(offset: int) -> None:
    q = torch.randn(1, 1, 4, 8, device=DEVICE)
    with pytest.raises(tilewise.UnsupportedError, match="32-bit"):
        tilewise.attention(q, q, q, window=(2**31 - 1, 0), q_offset=offset, backend="triton")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-50, 4.0])
def test_scales(scale: float) -> None:
    case = make_case({"causal"}, n=50, m=60, batch=1, heads=2)
    case = case._replace(options={**case.options, "scale": scale})
    dout, dlse = cotangents(case)
    assert_within(triton(), case, torch.float32, dout, dlse, f"scale={scale}")


def test_rows_that_see_nothing() -> None:
    case = make_case({"causal"}, n=90, m=40, batch=1, heads=2)
    q, k, v = (case.tensors[name].float() for name in "qkv")
    out, lse = triton()(q=q.requires_grad_(), k=k, v=v, causal=True)
    assert (out[:, :, :50] == 0).all()
    assert (lse[:, :, :50] == float("-inf")).all()
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert (grad[:, :, :50] == 0).all()


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(n: int, m: int) -> None:
    q, k, v = (torch.randn(2, 2, size, 8, device=DEVICE, requires_grad=True) for size in (n, m, m))
    out, lse = tilewise.attention(q, k, v, backend="triton", return_lse=True)
    assert out.shape == (2, 2, n, 8)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    sink = torch.randn(2, device=DEVICE, requires_grad=True)
    out, lse = tilewise.attention(q, k, v, sink=sink, backend="triton", return_lse=True)
    (grad,) = torch.autograd.grad([out.sum() + lse.sum()], sink)
    assert torch.equal(grad, torch.full_like(sink, 2.0 * n))


def _strided(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    batch, heads, length, dim = shape
    if kind == "bshd":
        return torch.randn(batch, length, heads, dim, generator=g).transpose(1, 2)
    if kind == "sbhd":
        return torch.randn(length, batch, heads, dim, generator=g).permute(1, 2, 0, 3)
    if kind == "slice":
        return torch.randn(batch, heads, length + 3, dim + 5, generator=g)[:, :, 2:-1, 3:-2]
    if kind == "expanded":
        return torch.randn(1, 1, length, dim, generator=g).expand(shape)
    return torch.randn(batch, heads, dim, length, generator=g).transpose(2, 3)


@pytest.mark.parametrize("kind", ["bshd", "sbhd", "slice", "expanded", "transposed"])
@pytest.mark.parametrize("dim", [16, 59])
def test_strides(kind: str, dim: int) -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (_strided(kind, (2, 2, length, dim), g).to(DEVICE) for length in (40, 50, 50))
    plain = [x.contiguous() for x in (q, k, v)]
    spec = AttentionSpec(2, 2, 2, 40, 50, dim, dim, "float32", "cpu", dim**-0.5, causal=True)
    config = TRITON.configure(spec)
    dout = _strided(kind, (2, 2, 40, dim), g).to(DEVICE)
    results = []
    for q_, k_, v_, dout_ in ((q, k, v, dout), (*plain, dout.contiguous())):
        operands = Operands(q_, k_, v_)
        out, lse = TRITON.forward(operands, spec, config)
        grads = TRITON.backward(dout_, None, operands, out, lse, spec, config, Needs())
        results.append((out, lse, grads.q, grads.k, grads.v))
    for ours, same in zip(*results, strict=True):
        assert ours is not None
        assert same is not None
        assert torch.equal(ours, same)


def test_small_operands_may_be_slices_or_expanded() -> None:
    g = torch.Generator().manual_seed(3)
    q = torch.randn(3, 4, 33, 16, generator=g).to(DEVICE)
    both = torch.rand(3, 4, 2, generator=g).to(DEVICE)
    one = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    values = torch.randn(4, 9, 2, generator=g).to(DEVICE)
    given = {"alibi": both[..., 0], "sink": both[0, 0, :1].expand(4), "q_offset": one.expand(3)}
    plain = {name: x.contiguous() for name, x in given.items()}
    results = []
    for options, relative in ((given, values[..., 0]), (plain, values[..., 0].contiguous())):
        leaves = [x.detach().requires_grad_() for x in (q, options["sink"], relative)]
        out = tilewise.attention(
            leaves[0], q, q, causal=True, backend="triton", bias=tilewise.biases.Relative(leaves[2]),
            **{**options, "sink": leaves[1]},
        )  # fmt: skip
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(ours, same) for ours, same in zip(*results, strict=True))


def test_gradient_of_a_sum_has_expanded_cotangents() -> None:
    q = torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True)
    out = tilewise.attention(q, q.detach(), q.detach(), backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), q)
    (same,) = torch.autograd.grad(tilewise.attention(q, q.detach(), q.detach(), backend="standard").sum(), q)
    assert worst(grad.cpu(), same.cpu()) < 1e-5


PACKED: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (9, 4)},
    {"q_offset": 2, "causal": True},
    {"offsets": True, "causal": True, "softcap": 2.0},
    {"relative": True, "sink": True, "alibi": True},
]


@pytest.mark.parametrize("options", PACKED, ids=str)
def test_packed_sequences_one_by_one(options: dict[str, Any]) -> None:
    options = dict(options)
    lengths = [(5, 7), (0, 4), (64, 64), (3, 0), (65, 75), (1, 1), (40, 20)]
    g = torch.Generator().manual_seed(1)
    heads, kv_heads, dim = 4, 2, 24
    cu_q = torch.tensor([0, *(n for n, _ in lengths)]).cumsum(0).int()
    cu_k = torch.tensor([0, *(m for _, m in lengths)]).cumsum(0).int()
    q = torch.randn(int(cu_q[-1]), heads, dim, generator=g, requires_grad=True)
    k, v = (torch.randn(int(cu_k[-1]), kv_heads, dim, generator=g, requires_grad=True) for _ in range(2))
    shared: dict[str, Tensor] = {}
    if options.pop("relative", False):
        shared["relative"] = torch.randn(heads, 11, generator=g, requires_grad=True)
    if options.pop("sink", False):
        shared["sink"] = torch.randn(heads, generator=g, requires_grad=True)
    if options.pop("alibi", False):
        options["alibi"] = torch.rand(heads, generator=g)
    offsets = torch.arange(len(lengths), dtype=torch.int32) * 3 - 4 if options.pop("offsets", False) else None
    there = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    if "relative" in shared:
        there["bias"] = tilewise.biases.Relative(shared["relative"].to(DEVICE))
    if "sink" in shared:
        there["sink"] = shared["sink"].to(DEVICE)
    if offsets is not None:
        there["q_offset"] = offsets.to(DEVICE)
    longest = max(n for n, _ in lengths), max(m for _, m in lengths)
    out, lse = tilewise.attention_varlen(
        *(x.to(DEVICE) for x in (q, k, v, cu_q, cu_k)), *longest, return_lse=True, backend="triton", **there
    )
    dout = torch.randn(out.shape, generator=g)
    dlse = torch.randn(lse.shape, generator=g).masked_fill(lse.cpu() == float("-inf"), 0.0)
    leaves = {"q": q, "k": k, "v": v, **shared}
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    grads = torch.autograd.grad([out, finite], list(leaves.values()), [dout.to(DEVICE), dlse.to(DEVICE)])
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for s, (n, m) in enumerate(lengths):
        rows, keys = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
        own = dict(options) if offsets is None else {**options, "q_offset": int(offsets[s])}
        exact, exact_lse = oracle.attention(
            *(x[part].transpose(0, 1)[None].double() for x, part in ((q, rows), (k, keys), (v, keys))),
            **{name: x.double() for name, x in shared.items()},
            **own,
        )
        assert worst(out[rows].cpu(), exact[0].transpose(0, 1)) < 1e-5, (s, n, m)
        assert worst(lse[:, rows].cpu(), exact_lse[0]) < 1e-5, (s, n, m)
        kept = exact_lse[0].masked_fill(exact_lse[0] == float("-inf"), 0.0)
        total = total + (exact[0].transpose(0, 1) * dout[rows]).sum() + (kept * dlse[:, rows]).sum()
    exact_grads = torch.autograd.grad(total, list(leaves.values()))
    for name, ours, exact in zip(leaves, grads, exact_grads, strict=True):
        assert worst(ours, exact) < 1e-5 * max(1.0, exact.abs().max().item()), name
