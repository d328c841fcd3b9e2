"""Rotary embeddings against complex numbers in float64, and as torch operators."""

from __future__ import annotations

import cmath
import math
import subprocess
import sys
import textwrap
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tilewise.ops.rotary import rotary
from tilewise.ops.rotary_scaling import NTK, DynamicNTK, LinearScaling, Llama3, YaRN

SCALINGS = {
    "none": None,
    "linear": LinearScaling(4.0),
    "ntk": NTK(2.5),
    "yarn": YaRN(8.0, 512),
    "yarn-deepseek": YaRN(40.0, 64, mscale=0.8, mscale_all_dim=0.5),
    "llama3": Llama3(8.0, 256),
}


def expected(
    x: Tensor, positions: Tensor, *, dim: int, frequencies: list[float], interleaved: bool, factor: float = 1.0
) -> Tensor:
    """x [B, H, N, D] turned as complex numbers; positions [B, N]."""
    angle = positions.double()[:, None, :, None] * torch.tensor(frequencies, dtype=torch.float64)
    turn = torch.polar(torch.full_like(angle, factor), angle)
    part = x[..., :dim].double()
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, x[..., dim:].double()], dim=-1)


def plain(dim: int, base: float = 10000.0) -> list[float]:
    return [math.exp(-2 * i / dim * math.log(base)) for i in range(dim // 2)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "dim"), [(2, 2), (8, 8), (64, 64), (40, 24), (59, 58), (128, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_turns_pairs(head_dim: int, dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 65, head_dim, dtype=torch.float64).to(dtype)
    positions = torch.arange(65).expand(2, -1)
    exact = expected(x, positions, dim=dim, frequencies=plain(dim), interleaved=interleaved)
    out = rotary(x, dim=dim, interleaved=interleaved)
    # The rotation's own rounding, and angles up to 64 with a frequency e^(−y), y ≤ ln 10000, rounded on either side.
    eps = torch.finfo(dtype).eps + 2 * 64 * math.log(10000.0) * torch.finfo(torch.float64).eps
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 4 * eps * x.double().abs().max()


def test_positions_of_every_kind_agree() -> None:
    x = torch.randn(3, 2, 7, 8, dtype=torch.float64)
    offsets = torch.tensor([0, 5, 1000])
    rows = offsets[:, None] + torch.arange(7)
    exact = expected(x, rows, dim=8, frequencies=plain(8), interleaved=False)
    for out in (
        rotary(x, rows),
        rotary(x, rows.int()),
        rotary(x, offset=offsets),
        rotary(x, offset=offsets.int()),
        torch.stack([rotary(x[b : b + 1], rows[b])[0] for b in range(3)]),
        torch.stack([rotary(x[b : b + 1], offset=int(offsets[b]))[0] for b in range(3)]),
        rotary(x.transpose(1, 2).contiguous(), rows, layout="bshd").transpose(1, 2),
    ):
        torch.testing.assert_close(out, exact, atol=1e-12, rtol=0)


def test_packed_sequences_count_from_their_own_start() -> None:
    lengths = [5, 0, 1, 9]
    cu_seqlens = torch.tensor([0, 5, 5, 6, 15], dtype=torch.int32)
    x = torch.randn(15, 2, 8, dtype=torch.float64)
    offsets = torch.tensor([3, 0, 7, 100], dtype=torch.int32)
    rows = torch.cat([torch.arange(length) for length in lengths])
    starts = torch.cat([torch.full((length,), int(o)) for length, o in zip(lengths, offsets, strict=True)])
    alone = x.transpose(0, 1)[None]
    for offset, positions in ((0, rows), (4, rows + 4), (offsets, rows + starts)):
        exact = expected(alone, positions[None], dim=8, frequencies=plain(8), interleaved=False)
        out = rotary(x, cu_seqlens=cu_seqlens, offset=offset)
        torch.testing.assert_close(out, exact[0].transpose(0, 1), atol=1e-13, rtol=0)
        again = rotary(x, positions, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(again, out, atol=1e-13, rtol=0)


@pytest.mark.parametrize("position", [10**6, 2**31 - 1, 10**12, -5])
def test_any_position_is_exact(position: int) -> None:
    """Against rational arithmetic: the angle modulo one turn from a 60-digit π."""
    pi = Fraction(314159265358979323846264338327950288419716939937510582097494, 10**59)
    x = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 4)
    out = rotary(x, torch.tensor([position]), interleaved=True, base=10000.0)
    single = rotary(x.float(), torch.tensor([position]), interleaved=True, base=10000.0)
    for pair, frequency in enumerate((Fraction(1), Fraction(1, 100))):
        turns = frequency * position / (2 * pi)
        exact = cmath.exp(2j * math.pi * float(turns - math.floor(turns)))
        allowed = abs(position) * float(frequency) * 4e-16 + 1e-15
        got, got32 = (complex(*o[0, 0, 0, 2 * pair : 2 * pair + 2].tolist()) for o in (out, single))
        assert abs(got - exact) <= allowed
        assert abs(got32 - exact) <= allowed + 1.2e-7


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_scalings_reach_the_operator(name: str, interleaved: bool) -> None:
    scaling = SCALINGS[name]
    x = torch.randn(1, 2, 33, 16, dtype=torch.float64)
    frequencies = plain(16, 500.0) if scaling is None else scaling.frequencies(16, 500.0)
    factor = 1.0 if scaling is None else scaling.attention_factor
    rows = torch.arange(9, 42)[None]
    exact = expected(x, rows, dim=16, frequencies=frequencies, interleaved=interleaved, factor=factor)
    out = rotary(x, offset=9, base=500.0, interleaved=interleaved, scaling=scaling)
    torch.testing.assert_close(out, exact, atol=1e-12, rtol=0)
    back = rotary(out, offset=9, base=500.0, interleaved=interleaved, scaling=scaling, inverse=True)
    torch.testing.assert_close(back, x * factor**2, atol=1e-12, rtol=0)


def test_scalings_say_what_their_papers_say() -> None:
    dim, base = 64, 10000.0
    usual = plain(dim, base)
    assert LinearScaling(4.0).frequencies(dim, base) == pytest.approx([f / 4 for f in usual])
    stretched = NTK(8.0).frequencies(dim, base)
    assert stretched[0] == 1.0
    assert stretched[-1] == pytest.approx(usual[-1] / 8.0)
    assert DynamicNTK(8.0, 2048).at(2048).frequencies(dim, base) == pytest.approx(usual)
    assert DynamicNTK(8.0, 2048).at(100).frequencies(dim, base) == pytest.approx(usual)
    assert DynamicNTK(2.0, 2048).at(4096) == NTK(3.0)
    llama = Llama3(8.0, 8192, 1.0, 4.0)
    for f, scaled in zip(usual, llama.frequencies(dim, base), strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            assert scaled == pytest.approx(f)
        elif wavelength > 8192:
            assert scaled == pytest.approx(f / 8)
        else:
            assert f / 8 < scaled < f
    yarn = YaRN(16.0, 4096)
    for f, scaled in zip(usual, yarn.frequencies(dim, base), strict=True):
        turns = 4096 * f / (2 * math.pi)
        assert f / 16 <= scaled * 1.0000001
        assert scaled <= f * 1.0000001
        if turns > 64:
            assert scaled == pytest.approx(f)
        if turns < 0.5:
            assert scaled == pytest.approx(f / 16)
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(16) + 1)
    deepseek = YaRN(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    assert deepseek.attention_factor == 1.0
    assert deepseek.softmax_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert YaRN(40.0, 4096, factor_of_attention=1.5).attention_factor == 1.5


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 5, 16, dtype=torch.float64), torch.randn(1, 1, 5, 16, dtype=torch.float64)
    near = rotary(q, offset=3) @ rotary(k, offset=1).mT
    far = rotary(q, offset=1_000_003) @ rotary(k, offset=1_000_001).mT
    torch.testing.assert_close(near, far, atol=1e-8, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place(interleaved: bool) -> None:
    x = torch.randn(2, 9, 3, 20)
    q = x.transpose(1, 2)[:, :, ::2]
    exact = rotary(q, dim=12, interleaved=interleaved, offset=2)
    version = q._version
    returned = rotary(q, dim=12, interleaved=interleaved, offset=2, inplace=True)
    assert returned is q
    assert q._version > version
    assert torch.equal(q, exact)


def test_output_keeps_the_order_in_memory() -> None:
    x = torch.randn(2, 9, 3, 20).transpose(1, 2)
    out = rotary(x)
    assert out.stride() == x.stride()
    spread = torch.randn(2, 3, 9, 40)[..., ::2]
    assert torch.equal(rotary(spread), rotary(spread.contiguous()))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    x = torch.randn(2, 2, 5, 10, dtype=torch.float64, requires_grad=True)

    def turned(x: Tensor) -> Tensor:
        scaling = YaRN(4.0, 16)
        return rotary(x, dim=8, interleaved=interleaved, scaling=scaling, offset=torch.tensor([0, 7]))

    assert torch.autograd.gradcheck(turned, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(turned, (x,))


def test_vmap() -> None:
    x, offsets = torch.randn(4, 2, 3, 5, 8, dtype=torch.float64), torch.arange(8).reshape(4, 2)
    each = torch.stack([rotary(x[i], offset=offsets[i]) for i in range(4)])
    assert torch.equal(torch.func.vmap(lambda x, offset: rotary(x, offset=offset))(x, offsets), each)
    mapped = torch.func.vmap(torch.func.grad(lambda x: rotary(x, offset=3).pow(3).sum()))(x)
    exact = torch.func.grad(lambda x: rotary(x.flatten(0, 1), offset=3).pow(3).sum())(x)
    torch.testing.assert_close(mapped, exact)


OPERATOR_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "plain": (None, None, None, 3, 12, 1e4, "", [], 1.0, False, False),
    "offsets": (None, torch.tensor([1, 2]), None, 0, 12, 1e4, "linear", [2.0], 1.0, True, False),
    "positions": (torch.arange(7)[None], None, None, 0, 16, 1e4, "llama3", [8.0, 64.0, 1.0, 4.0], 1.1, False, False),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATOR_ARGUMENTS)
def test_opcheck(name: str) -> None:
    arguments = OPERATOR_ARGUMENTS[name]
    x = torch.randn(2, 7, 3, 16).transpose(1, 2)
    opcheck(torch.ops.tilewise.rotary.default, (x.clone().requires_grad_(), *arguments))
    opcheck(torch.ops.tilewise.rotary_.default, (x.clone(), *arguments))


def test_compiles_whole_in_a_fresh_process() -> None:
    code = """
    import torch
    from tilewise.ops.rotary import rotary
    from tilewise.ops.rotary_scaling import Llama3

    def f(x, offset):
        y = rotary(x * 1.0, offset=offset, scaling=Llama3(), interleaved=True)
        return rotary(y, inplace=True) if not x.requires_grad else y

    for grad in (False, True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for n in (5, 7, 8):
            x = torch.randn(2, 3, n, 8).requires_grad_(grad)
            offset = torch.tensor([4, n])
            torch.testing.assert_close(compiled(x, offset), f(x, offset))
            if grad:
                (a,), (b,) = (torch.autograd.grad(g(x, offset).sin().sum(), x) for g in (compiled, f))
                torch.testing.assert_close(a, b)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


X = torch.randn(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X,), {"dim": 3}, "dim: got 3; wants an even number of columns from 2 to D = 8"),
        ((X,), {"dim": 10}, "dim: got 10"),
        ((X,), {"dim": 4.0}, "dim: got float"),
        ((X.int(),), {}, "x: got dtype torch.int32"),
        ((X[0],), {}, "x: got shape"),
        ((X, torch.arange(4)), {}, "positions: got shape"),
        ((X, torch.arange(2)), {}, "offset=positions"),
        ((X, torch.arange(5.0)), {}, "positions: got dtype torch.float32"),
        ((X, torch.arange(5)), {"offset": 3}, "offset: got a value beside positions"),
        ((X,), {"offset": torch.arange(3)}, "offset: got shape"),
        ((X,), {"offset": 1.5}, "offset: got float"),
        ((X,), {"offset": 2**40}, "offset: got 1099511627776"),
        ((X,), {"base": 1.0}, "base: got 1.0"),
        ((X,), {"base": float("nan")}, "base: got nan"),
        ((X,), {"scaling": DynamicNTK(2.0, 64)}, "scaling.at"),
        ((X,), {"scaling": 2.0}, "scaling: got float"),
        ((X,), {"layout": "sbhd"}, "layout"),
        ((X.clone().requires_grad_(),), {"inplace": True}, "inplace: got True"),
        ((X[..., ::2],), {"inplace": True}, "contiguous last dim"),
        ((X[0],), {"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens: got dtype torch.int64"),
        ((X[0],), {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}, "number of tokens"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        rotary(*arguments, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearScaling(0.0),
        lambda: NTK(-1.0),
        lambda: YaRN(float("inf"), 64),
        lambda: YaRN(2.0, 64, beta_fast=0.0),
        lambda: Llama3(low=4.0, high=4.0),
        lambda: DynamicNTK(2.0, 0),
    ],
)
def test_bad_scalings(make: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        make()


def test_nothing_to_turn() -> None:
    assert rotary(torch.empty(2, 3, 0, 8)).shape == (2, 3, 0, 8)
    assert rotary(torch.empty(0, 3, 5, 8)).shape == (0, 3, 5, 8)
    for places in (torch.empty(0, dtype=torch.int32), torch.empty(2, 0, dtype=torch.int64)):
        assert rotary(torch.empty(2, 3, 0, 8), places).shape == (2, 3, 0, 8)
