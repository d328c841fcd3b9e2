"""tilewise as a citizen of torch: compile, opcheck, gradcheck, autocast, checkpointing, double backward, layouts."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import tilewise
from tilewise.ops.arguments import build
from tilewise.ops.library import attention_backward_op, attention_op

BACKENDS = ("standard", "tiled", "tiles")


def qkv(
    n: int = 20, m: int = 27, dtype: torch.dtype = torch.float32, grad: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    shapes = (2, 4, n, 8), (2, 2, m, 8), (2, 2, m, 8)
    q, k, v = (torch.randn(shape, generator=g, dtype=dtype).requires_grad_(grad) for shape in shapes)
    return q, k, v


def options_of(name: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window": (5, 2)},
        "mask": {"mask": torch.rand(20, 27, generator=g) < 0.7},
        "everything": {
            "causal": True,
            "softcap": 2.0,
            "sink": torch.randn(4, generator=g).requires_grad_(),
            "bias": torch.randn(1, 4, 20, 27, generator=g).requires_grad_(),
            "alibi": torch.rand(4, generator=g),
            "dropout": 0.2,
        },
        "relative": {"bias": tilewise.biases.Relative(torch.randn(4, 9, generator=g).requires_grad_())},
    }[name]


NAMES = ("plain", "causal", "window", "mask", "everything", "relative")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, backend: str) -> None:
    arguments = build(*qkv(), backend=backend, **options_of(name)).seeded()
    if arguments.bias is not None:
        arguments = arguments._replace(bias=arguments.bias.detach().requires_grad_())
    opcheck(attention_op, tuple(arguments))


@pytest.mark.parametrize("name", ["plain", "everything", "relative"])
def test_opcheck_backward(name: str) -> None:
    arguments = build(*qkv(grad=False), **options_of(name)).seeded()
    arguments = arguments._replace(
        bias=None if arguments.bias is None else arguments.bias.detach(),
        relative=None if arguments.relative is None else arguments.relative.detach(),
        sink=None if arguments.sink is None else arguments.sink.detach(),
    )
    out, lse = attention_op(*arguments)
    needs = [True] * 3 + [x is not None for x in (arguments.bias, arguments.relative, arguments.sink)]
    args = (torch.randn_like(out), torch.randn_like(lse), out, lse, needs, *arguments)
    opcheck(attention_backward_op, args)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, backend: str) -> None:
    q, k, v = qkv(5, 6, torch.float64)
    g = torch.Generator().manual_seed(5)
    extra: list[Tensor] = []
    options = options_of(name)
    options.pop("mask", None)
    if name == "everything":
        extra = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in ((4,), (1, 4, 5, 6))]
    if name == "relative":
        extra = [torch.randn(4, 9, generator=g, dtype=torch.float64).requires_grad_()]

    def call(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        given = dict(options)
        if name == "everything":
            given["sink"], given["bias"] = extra
        if name == "relative":
            given["bias"] = tilewise.biases.Relative(extra[0])
        return tilewise.attention(q, k, v, **given, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(call, (q, k, v, *extra))


def test_compile_in_a_fresh_process() -> None:
    """fullgraph, static and dynamic shapes, gradients, dropout and a mask: the same numbers as eager."""
    script = textwrap.dedent(
        """
        import torch, tilewise as tw
        def f(q, k, v, sink, mask, layout):
            out, lse = tw.attention(q, k, v, mask=mask, causal=True, window=(9, None), sink=sink, softcap=3.0,
                                    dropout=0.1, layout=layout, return_lse=True)
            return out.sin().sum() + lse.sum()
        for dynamic in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
            for n in (16, 24, 33):
                for layout in ("bhsd", "bshd"):
                    q = torch.randn(2, 4, n, 8); k = torch.randn(2, 2, n, 8); v = torch.randn(2, 2, n, 8)
                    if layout == "bshd":
                        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
                    sink = torch.randn(4); mask = torch.rand(n, n) < 0.9
                    leaves = [x.requires_grad_() for x in (q, k, v, sink)]
                    torch.manual_seed(n); b = compiled(*leaves, mask, layout); gb = torch.autograd.grad(b, leaves)
                    torch.manual_seed(n); a = f(*leaves, mask, layout); ga = torch.autograd.grad(a, leaves)
                    torch.testing.assert_close(a, b)
                    for x, y in zip(ga, gb):
                        torch.testing.assert_close(x, y)
        def g(q):
            return tw.attention(q, q, q, tw.masks.Causal() & tw.masks.Window(4, 0))
        q = torch.randn(1, 2, 150, 8)
        torch.testing.assert_close(torch.compile(g, fullgraph=True, backend="aot_eager")(q), g(q))
        with torch.autocast("cpu", torch.bfloat16):
            def h(q): return tw.attention(q, q, q)
            assert torch.compile(h, fullgraph=True, backend="aot_eager")(q).dtype == torch.bfloat16
        print("compiled and equal")
        """
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "compiled and equal" in run.stdout


def test_double_backward_is_refused() -> None:
    q, k, v = qkv()
    (dq,) = torch.autograd.grad(tilewise.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward: tilewise attention has first derivatives only"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa", "auto"], indirect=True)
def test_autocast(backend: str) -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = tilewise.attention(q, k, v, return_lse=True, backend=backend)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert tilewise.attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_checkpointing_repeats_the_dropout_mask(backend: str) -> None:
    q, k, v = qkv()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tilewise.attention(q, k, v, dropout=0.5, backend=backend)

    torch.manual_seed(3)
    plain = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(3)
    recomputed = torch.autograd.grad(checkpoint(call, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_dropout_follows_manual_seed_and_backends_agree() -> None:
    q, k, v = qkv(grad=False)
    outs = []
    for backend in ("standard", "tiled", "tiled"):
        torch.manual_seed(8)
        outs.append(tilewise.attention(q, k, v, dropout=0.4, backend=backend))
    torch.testing.assert_close(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[2], tilewise.attention(q, k, v, dropout=0.4))


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"], indirect=True)
def test_strides(backend: str) -> None:
    """Views, expanded heads, a batch of stride 0, a last dim that is not contiguous: as for contiguous tensors."""
    base = torch.randn(2, 30, 3, 4, 24)
    q, k, v = (base[:, :, i, :, 5:21].transpose(1, 2) for i in range(3))
    expected = tilewise.attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    torch.testing.assert_close(tilewise.attention(q, k, v, backend=backend), expected)
    across = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(tilewise.attention(across, k, v, backend=backend), expected)
    shared = k[:1, :1].expand(2, 4, 30, 16)
    expected = tilewise.attention(q, shared.contiguous(), shared.contiguous(), backend=backend)
    torch.testing.assert_close(tilewise.attention(q, shared, shared, backend=backend), expected)


def test_autocast_unites_mixed_dtypes() -> None:
    q, k, v = qkv(grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert tilewise.attention(q, k.bfloat16(), v).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"], indirect=True)
@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_scales_that_are_not_positive(scale: float, backend: str) -> None:
    q, k, v = (x.repeat_interleave((x.shape[1] == 2 and 2) or 1, 1) for x in qkv(20, 20))
    out = tilewise.attention(q, k, v, causal=True, scale=scale, backend=backend)
    s = (q @ k.mT * scale).masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(out, s.softmax(-1) @ v)


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"], indirect=True)
def test_rows_that_see_nothing_pass_nothing_on(backend: str) -> None:
    q, k, v = qkv(20, 20)
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    out, lse = tilewise.attention(q, k, v, mask, return_lse=True, backend=backend)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    dout[:, :, 3], dlse[:, :, 3] = float("nan"), float("nan")
    for grad in torch.autograd.grad([out, lse], [q, k, v], [dout, dlse]):
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize("backend", [*BACKENDS, "sdpa"], indirect=True)
def test_a_float32_bias_is_not_rounded_to_half_precision(backend: str) -> None:
    q, k, v = (x.half() for x in qkv(grad=False))
    bias = torch.full((20, 27), -1e9)
    _, lse = tilewise.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    assert lse.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_output_keeps_the_memory_order_of_its_layout(backend: str) -> None:
    q = torch.randn(2, 30, 4, 16)
    assert tilewise.attention(q, q, q, layout="bshd", softcap=1.0, backend=backend).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys(n: int, m: int, backend: str) -> None:
    q, k, v = qkv(n, m)
    sink = torch.randn(4, requires_grad=True)
    out, lse = tilewise.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == float("-inf")).all()
    out, lse = tilewise.attention(q, k, v, sink=sink, return_lse=True, backend=backend)
    assert torch.equal(lse, sink[:, None].expand_as(lse))
    assert not out.any()
    grads = torch.autograd.grad([out, lse], [q, k, v, sink], [torch.ones_like(out), torch.ones_like(lse)])
    assert not any(grad.isnan().any() for grad in grads)
    assert torch.equal(grads[3], torch.full((4,), 2.0 * n))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_deterministic(backend: str) -> None:
    q, k, v = qkv(140, 130)
    runs = []
    for _ in range(3):
        out = tilewise.attention(q, k, v, window=(30, 30), deterministic=True, backend=backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
