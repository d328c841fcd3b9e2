"""Linear attention's kernels: in the interpreter on small problems, and every selectable shape on a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, ON_GPU

import linear_oracle
from linear_oracle import KINDS, Judged, cancellation, case, leaves_of
from tilewise.backends.linear import TILED_LINEAR, LinearOperands
from tilewise.backends.triton.linear import TRITON_LINEAR, LinearPlan
from tilewise.ops.linear import explain_linear, linear_attention
from tilewise.reference.linear import LinearState
from tilewise.spec import LinearSpec

pytestmark = pytest.mark.usefixtures("kernels")


FUSED_KINDS = [kind for kind in KINDS if kind != "taylor" and not kind.endswith("delta")]
INTERPRETED = [
    kind for kind in FUSED_KINDS if kind not in ("relu+full", "none+retention", "none+near1", "relu+retention")
]
"""Enough to reach every branch; the interpreter is slow."""
BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Norm of the error over norm of what is exact. Float32: sums of decays up to 32·60 have an ulp of 1e-4, seen in few
weights; half precision: a few roundings of the operands of a product (ε is 1e-3 and 8e-3)."""


def assert_within(found: dict[str, float], problem: Judged, dtype: torch.dtype) -> None:
    for name, error in found.items():
        allowed = BOUNDS[dtype]
        if name == "ddecay":
            allowed = max(allowed, 1.5 * torch.finfo(dtype).eps * problem.cancellation)
        assert error < allowed, (name, allowed, found)


@lru_cache(maxsize=60)
def judged(kind: str, n: int, state: bool, dtype: torch.dtype) -> Judged:
    given = case(kind, n, state=state, batch=1, heads=2 if ON_GPU else 1, dim=24 if n % 2 else 16, seed=n)
    rounded = {
        name: x.to(dtype if name in ("q", "k", "v") else torch.float32).double() if isinstance(x, Tensor) else x
        for name, x in given.items()
    }
    return Judged(rounded)


def errors(problem: Judged, dtype: torch.dtype, **options: Any) -> dict[str, float]:
    leaves = {
        name: x.detach().to(dtype if name in ("q", "k", "v") else torch.float32).to(DEVICE).requires_grad_()
        for name, x in leaves_of(problem.given).items()
    }
    given = dict(leaves)
    state = LinearState(given.pop("s"), given.pop("z")) if "s" in given else None
    out, last = linear_attention(
        **given, **problem.options, state=state, return_state=True, backend="triton", **options
    )
    outputs = [out, last.s, *([] if last.z is None else [last.z])]
    cotangents = [c.to(x.dtype).to(DEVICE) for c, x in zip(problem.cotangents, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, materialize_grads=True)
    return problem.errors(outputs, dict(zip(leaves, grads, strict=True)))


@pytest.mark.parametrize("kind", FUSED_KINDS if ON_GPU else INTERPRETED)
def test_kernels(kind: str) -> None:
    """One token (recurrent), one ragged chunk, and several segments with a state before them."""
    for n, state in ((1, True), (67, True)):
        problem = judged(kind, n, state, torch.float32)
        assert_within(errors(problem, torch.float32), problem, torch.float32)


@pytest.mark.parametrize("kind", ["elu", "none+scalar", "none+gla"])
def test_half_precision(kind: str) -> None:
    problem = judged(kind, 35, True, torch.float16)
    assert_within(errors(problem, torch.float16), problem, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_half_precision_of_everything(kind: str, dtype: torch.dtype) -> None:
    problem = judged(kind, 301, True, dtype)
    assert_within(errors(problem, dtype), problem, dtype)


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [("elu", (1, 66, 0, 3)), ("none+rwkv", (1, 66, 0, 3)), ("none+scalar", (2, 1, 70)), ("elu", (2, 1))],
    ids=str,
)
def test_packed(kind: str, lengths: tuple[int, ...]) -> None:
    parts = [case(kind, n, batch=1, seed=i) for i, n in enumerate(lengths)]
    names = [name for name in ("q", "k", "v", "decay") if isinstance(parts[0].get(name), Tensor)]
    packed = {name: torch.cat([part[name] for part in parts], 2).float().to(DEVICE).requires_grad_() for name in names}
    options = {
        name: x.float().to(DEVICE) if isinstance(x, Tensor) else x for name, x in parts[0].items() if name not in names
    }
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int().to(DEVICE)
    g = torch.Generator().manual_seed(0)
    s = torch.randn(len(lengths), 2, 8, 12, generator=g).to(DEVICE).requires_grad_()
    z = torch.rand(len(lengths), 2, 8, generator=g).to(DEVICE).requires_grad_()
    leaves = [*packed.values(), s, z]
    results = []
    for backend in ("triton", "tiled"):
        out, last = linear_attention(
            **packed, **options, state=LinearState(s, z), return_state=True, cu_seqlens=cu_seqlens, backend=backend
        )
        g.manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=g).to(DEVICE) for x in (out, last.s)]
        grads = torch.autograd.grad([out, last.s], leaves, cotangents, materialize_grads=True)
        results.append([out.detach(), last.s.detach(), *grads])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2e-5 * exact.norm()


def test_layouts_and_odd_strides() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 50, 2, 17, generator=g).to(DEVICE)[..., 1:] for _ in range(3))
    out = linear_attention(q, k, v, causal=True, layout="bshd", backend="triton")
    assert out.is_contiguous()
    exact = linear_attention(q, k, v, causal=True, layout="bshd", backend="tiled")
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)


def test_cross_attention_without_causal_order() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 40, 16, generator=g).to(DEVICE).requires_grad_()
    k, v = (torch.randn(1, 2, 300, 16, generator=g).to(DEVICE).requires_grad_() for _ in range(2))
    results = []
    for backend in ("triton", "tiled"):
        out = linear_attention(q, k, v, causal=False, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() <= 2e-5 * exact.norm()


def test_what_it_cannot_do() -> None:
    x = torch.zeros(1, 1, 4, 8, device=DEVICE)
    wide = torch.zeros(1, 1, 4, 257, device=DEVICE)
    assert "256" in (TRITON_LINEAR.why_not(explain_linear(wide, wide, wide, causal=True, backend="tiled").spec) or "")  # type: ignore[arg-type]
    assert "float64" in explain_linear(x.double(), x.double(), x.double(), causal=True).rejected["triton"]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"normalize": True, "feature_map": "elu"},
    {"normalize": True, "feature_map": "relu", "causal": False},
    {"decay": "token", "scale": 0.3},
    {"decay": "channel"},
    {"decay": "channel", "exclusive": True},
    {"decay": "channel", "normalize": True, "feature_map": "elu"},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_selectable_shape(variant: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
    """Against float64 on the device; several segments, ragged. Compilers have miscompiled such kernels on Hopper."""
    check_on_device(variant, dim, dtype, 2, 1100)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("causal", True)], ids=str)
def test_every_shape_packed_and_recurrent(variant: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
    check_on_device(variant, dim, dtype, 1, 700, lengths=(1, 66, 0, 300, 333))
    check_on_device(variant, dim, dtype, 2, 13)


CHANNEL = [variant for variant in VARIANTS if variant.get("decay") == "channel"]


@pytest.mark.parametrize("strong", [0.0, 0.005], ids=["gentle", "strong"])
@pytest.mark.parametrize("variant", CHANNEL, ids=str)
def test_whole_chunks(variant: dict[str, Any], strong: float) -> None:
    """Chunks that decay little are one product, others go through their subchunks."""
    check_on_device(variant, 24, torch.float32, 1, 101, heads=1, whole=True, strong=strong)
    check_on_device(variant, 24, torch.float16, 1, 130, heads=1, whole=True, strong=strong)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("q_size", "k_size", "gate"), [(1.0, 100.0, -0.12), (1e-3, 1.0, -0.12), (1.0, 100.0, -0.49)])
def test_float16_of_any_size(whole: bool, q_size: float, k_size: float, gate: float) -> None:
    """Exponents split half way: neither factor leaves float16's range, nor loses its digits below it."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 1, 64, 16, generator=g) for _ in range(4))
    tensors = [x.to(DEVICE, torch.float16) for x in (q * q_size, k.sign() * k_size, v, dout)]
    decay = torch.full((1, 1, 64, 16), gate, device=DEVICE)
    spec = LinearSpec(1, 1, 64, 64, 16, 16, "float16", "sm_90", decay="channel")
    plan = TRITON_LINEAR.configure(spec)
    plan = plan._replace(shape=plan.shape._replace(whole=whole))
    compare(LinearOperands(*tensors[:3], decay), tensors[3], spec, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("variant", CHANNEL, ids=str)
def test_every_shape_in_whole_chunks(variant: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
    for warps in (4, 8):
        check_on_device(variant, dim, dtype, 2, 1100, whole=True, strong=0.0, warps=warps)
        check_on_device(variant, dim, dtype, 1, 700, (1, 66, 0, 300, 333), whole=True, strong=1e-4, warps=warps)


def check_on_device(
    variant: dict[str, Any],
    dim: int,
    dtype: torch.dtype,
    batch: int,
    n: int,
    lengths: tuple[int, ...] = (),
    *,
    heads: int = 3,
    whole: bool = False,
    strong: float = 0.02,
    warps: int = 4,
) -> None:
    """Forward and backward of [batch, heads, n, dim], or of sequences of `lengths`, against float64."""
    g = torch.Generator(DEVICE).manual_seed(dim)
    q, k, v, dout = (torch.randn(batch, heads, n, dim, generator=g, device=DEVICE).to(dtype) for _ in range(4))
    cu_seqlens = torch.tensor((0, *lengths), device=DEVICE).cumsum(0).int() if lengths else None
    decay = None
    if "decay" in variant:
        shape = (batch, heads, n, dim) if variant["decay"] == "channel" else (batch, heads, n)
        decay = torch.nn.functional.logsigmoid(torch.randn(shape, generator=g, device=DEVICE) + (2 if strong else 4))
        decay = torch.where(torch.rand(shape, generator=g, device=DEVICE) < strong, -30.0, decay)
    spec = LinearSpec(
        len(lengths) or batch, heads, n, n, dim, dim, str(dtype).removeprefix("torch."), "sm_90",
        packed=bool(lengths), **variant,
    )  # fmt: skip
    shape = TRITON_LINEAR.configure(spec).shape._replace(whole=whole, inner_warps=warps)
    plan = TRITON_LINEAR.configure(spec)._replace(shape=shape, length=4 * shape.chunk)
    compare(LinearOperands(q, k, v, decay, cu_seqlens=cu_seqlens), dout, spec, plan, lengths)


def compare(
    operands: LinearOperands, dout: Tensor, spec: LinearSpec, plan: LinearPlan, lengths: tuple[int, ...] = ()
) -> None:
    """Forward and backward against `tiled` in float64: norms of errors over norms of what is exact."""
    gated = operands.decay is not None
    result = TRITON_LINEAR.forward(operands, spec, plan, state=True)
    grads = TRITON_LINEAR.backward(dout, None, None, operands, result.out, result.den, spec, plan, gated)
    exact_operands = operands._replace(
        q=operands.q.double(),
        k=operands.k.double(),
        v=operands.v.double(),
        decay=None if operands.decay is None else operands.decay.double(),
    )
    tiled = TILED_LINEAR.configure(spec)
    exact = TILED_LINEAR.forward(exact_operands, spec, tiled, state=True)
    exact_grads = TILED_LINEAR.backward(
        dout.double(), None, None, exact_operands, exact.out, exact.den, spec, tiled, gated
    )
    bounds = dict.fromkeys(("out", "s", "dq", "dk", "dv", "ddecay"), BOUNDS[operands.q.dtype])
    if exact_grads.decay is not None:
        size = cancellation(
            *(exact_operands.q, exact_operands.k, exact_grads.q, exact_grads.k, exact_grads.decay),
            spec.feature_map, lengths,
        )  # fmt: skip
        bounds["ddecay"] = max(bounds["ddecay"], 1.5 * torch.finfo(operands.q.dtype).eps * size)
    found, expected = (result.out, result.s, *grads[:4]), (exact.out, exact.s, *exact_grads[:4])
    for (name, bound), ours, reference in zip(bounds.items(), found, expected, strict=True):
        if ours is not None and reference is not None:
            assert (ours.double() - reference).norm() / reference.norm() < bound, name


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "dim_v"), [(128, 128), (40, 3)])
def test_repeats_are_equal(dim: int, dim_v: int) -> None:
    """A tile that several warps hold was once stored by one before the others had loaded what it replaced."""
    g = torch.Generator(device="cuda").manual_seed(0)
    q, k = (torch.randn(2, 3, 1100, dim, generator=g, device="cuda").requires_grad_() for _ in "qk")
    v = torch.randn(2, 3, 1100, dim_v, generator=g, device="cuda", requires_grad=True)
    decay = torch.nn.functional.logsigmoid(torch.randn(q.shape, generator=g, device="cuda") + 2).requires_grad_()
    runs: list[tuple[Tensor, ...]] = []
    for _ in range(50):
        out = linear_attention(q, k, v, causal=True, decay=decay, normalize=True, backend="triton")
        runs.append((out, *torch.autograd.grad(out, (q, k, v, decay), torch.ones_like(out))))
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


@pytest.mark.gpu
def test_a_step_costs_the_same_however_long_the_past() -> None:
    """The state is all there is of it: the same tensors, the same kernel, and a graph that replays."""
    q, k, v = (torch.randn(1, 16, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    _, state = linear_attention(q, k, v, causal=True, return_state=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, after = linear_attention(q, k, v, causal=True, state=state, return_state=True)
    graph.replay()
    expected, expected_after = linear_attention(q, k, v, causal=True, state=state, return_state=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after.s, expected_after.s)
    assert after.s.shape == state.s.shape


@pytest.mark.gpu
def test_memory_of_a_million_tokens() -> None:
    shape = (1, 8, 1 << 20, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    dout = torch.randn_like(q)
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(linear_attention(q, k, v, causal=True), (q, k, v), dout)
    needed = sum(x.nbytes for x in (q, k, v, dout, *grads))
    assert torch.cuda.max_memory_allocated() < 3 * needed


def test_the_oracle_sees_a_wrong_decay() -> None:
    """A check of the check: a gate of another token is far over the bound."""
    given = case("none+scalar", 20, batch=1)
    shifted = {**given, "decay": given["decay"].roll(1, 2)}
    a, b = (linear_oracle.linear_attention(**x)[0] for x in (given, shifted))
    assert (a - b).norm() > 1e-2 * a.norm()
