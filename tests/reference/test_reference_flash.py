"""FlashAttention v1, v2 and the backward as tile loops: equal to the oracle for any sizes and tile shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import budget
import oracle
from tilewise.reference import flash_backward, flash_v1, flash_v2
from tilewise.reference.counters import Chip

SIZES = [(1, 1), (2, 63), (63, 2), (65, 64), (113, 97)]
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(n: int, m: int, heads: int = 4, kv_heads: int = 2, d: int = 40, dv: int = 24) -> dict[str, Tensor]:
    shapes = {"q": (2, heads, n, d), "k": (2, kv_heads, m, d), "v": (2, kv_heads, m, dv)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class Flash(torch.autograd.Function):
    """Either forward, with the shared backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        loop = flash_v1 if options["version"] == 1 else flash_v2
        blocks = {"block_m": options["block_m"], "block_n": options["block_n"]}
        ctx.common = {name: options[name] for name in ("causal", "allowed", "scale")}
        (out, lse), _ = loop(q, k, v, **ctx.common, **blocks)
        ctx.save_for_backward(q, k, v, out, lse)
        # Other tiles than the forward's: nothing may depend on them being the same.
        ctx.blocks = {"block_m": options["block_n"], "block_n": options["block_m"]}
        return out, lse

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> Any:
        grads, _ = flash_backward(*ctx.saved_tensors, *douts, **ctx.common, **ctx.blocks)
        return *grads, None


def flash(version: int, block_m: int, block_n: int) -> budget.Attention:
    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        options = {"version": version, "block_m": block_m, "block_n": block_n}
        return Flash.apply(q, k, v, {**options, "causal": causal, "allowed": mask, "scale": scale})  # type: ignore[return-value]

    return attention


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 48), (64, 32)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_oracle(version: int, n: int, m: int, block_m: int, block_n: int, causal: bool) -> None:
    case = budget.Case(dict(inputs(n, m)), {"causal": causal})
    attention = flash(version, block_m, block_n)
    budget.assert_within(attention, case, torch.float32, torch.randn(2, 4, n, 24), torch.randn(2, 4, n))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision(version: int, dtype: torch.dtype, causal: bool) -> None:
    case = budget.Case(dict(inputs(65, 113)), {"causal": causal, "scale": 0.3})
    budget.assert_within(flash(version, 32, 16), case, dtype, torch.randn(2, 4, 65, 24), torch.randn(2, 4, 65))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shape", [(2, 4, 65, 50), (1, 4, 1, 50), (65, 50)])
@pytest.mark.parametrize("causal", [False, True])
def test_allowed(version: int, shape: tuple[int, ...], causal: bool) -> None:
    mask = torch.rand(shape) < 0.5
    mask[..., 0, :] = False
    case = budget.Case({**inputs(65, 50), "mask": mask}, {"causal": causal})
    budget.assert_within(flash(version, 16, 32), case, torch.float32, torch.randn(2, 4, 65, 24), torch.randn(2, 4, 65))


def test_large_logits() -> None:
    tensors = inputs(65, 50)
    tensors["q"] = tensors["q"] * 100
    for version in (1, 2):
        case = budget.Case(tensors, {"causal": True})
        budget.assert_within(flash(version, 16, 32), case, torch.float32, torch.randn(2, 4, 65, 24))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_float64_to_a_derived_bound(version: int, causal: bool) -> None:
    q, k, v = (x.double() for x in inputs(65, 113).values())
    out, lse = flash(version, 16, 32)(q, k, v, causal=causal)
    exact_out, exact_lse = oracle.attention(q, k, v, causal=causal)
    # A score is off by D roundings of Σ|q||k|·scale, which the exponent makes relative; then M terms and 4 rescalings.
    size = (q.abs() @ k.abs().repeat_interleave(2, 1).mT).max().item() * 40**-0.5
    relative = 2 * EPS * (42 * size + 113 + 4 * 6 + 8)
    assert budget.worst(lse, exact_lse) <= relative + 2 * EPS * size
    assert budget.worst(out, exact_out) <= 2 * relative * v.abs().max().item()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(version: int, causal: bool) -> None:
    q, k, v = (x.double().requires_grad_() for x in inputs(5, 7, 2, 1, 4, 3).values())
    assert torch.autograd.gradcheck(lambda q, k, v: flash(version, 2, 3)(q, k, v, causal=causal), (q, k, v))


@pytest.mark.parametrize("version", [1, 2])
def test_rows_that_see_nothing(version: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(65, 40).values()]
    out, lse = flash(version, 16, 16)(*tensors, causal=True)
    assert out[:, :, :25].eq(0).all()
    assert lse[:, :, :25].eq(-float("inf")).all()
    dq, dk, dv = torch.autograd.grad([out, lse], tensors, [torch.ones_like(out), torch.ones_like(lse)])
    assert dq[:, :, :25].eq(0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("loop", [flash_v1, flash_v2])
@pytest.mark.parametrize(("n", "m"), [(3, 0), (0, 3)])
def test_no_rows_or_no_keys(loop: Any, n: int, m: int) -> None:
    q, k, v = inputs(n, m).values()
    (out, lse), _ = loop(q, k, v)
    assert out.shape == (2, 4, n, 24)
    assert out.eq(0).all()
    assert lse.eq(-float("inf")).all()
    grads, _ = flash_backward(q, k, v, out, lse, out)
    assert all(grad.eq(0).all() for grad in grads)


def test_a_mask_costs_a_byte_a_score_and_nothing_else() -> None:
    q, k, v = inputs(65, 50).values()
    for loop in (flash_v1, flash_v2):
        _, plain = loop(q, k, v, block_m=16, block_n=16)
        _, masked = loop(q, k, v, allowed=torch.ones(65, 50, dtype=torch.bool), block_m=16, block_n=16)
        assert masked.bytes_read - plain.bytes_read == 2 * 4 * 65 * 50
        assert masked.bytes_written == plain.bytes_written
        assert masked.matmul_flops == plain.matmul_flops


def test_v2_moves_less_and_divides_less_than_v1() -> None:
    """The claim that v2 is faster for "looping over heads" is a slip: what changes is which tiles stay on chip."""
    q, k, v = inputs(256, 256).values()
    (out1, _), v1 = flash_v1(q, k, v)
    (out2, _), v2 = flash_v2(q, k, v)
    assert v1.matmul_flops == v2.matmul_flops
    assert v1.rescalings == v2.rescalings == v1.divisions == 8 * 16
    assert v2.divisions == 8 * 4
    # v1 writes O, m and l once to start with and once for each of the four K, V tiles; v2 writes O and lse once.
    assert v1.elements_written == 8 * 256 * (24 + 2) * 5
    assert v2.elements_written == 8 * 256 * (24 + 1)
    assert torch.allclose(out1, out2, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


def test_causal_tiles_are_skipped_and_cost_nothing() -> None:
    q, k, v = inputs(256, 256).values()
    for loop in (flash_v1, flash_v2):
        _, counted = loop(q, k, v, causal=True)
        assert counted.tiles_visited == 8 * 10
        assert counted.tiles_skipped == 8 * 6


@pytest.mark.parametrize("argument", ["block_m", "block_n"])
def test_a_block_below_one_is_refused(argument: str) -> None:
    q, k, v = inputs(4, 4).values()
    for call in (
        lambda **block: flash_v1(q, k, v, **block),
        lambda **block: flash_v2(q, k, v, **block),
        lambda **block: flash_backward(q, k, v, q, q[..., 0], q, **block),
    ):
        with pytest.raises(ValueError, match=f"{argument}: got 0; wants at least 1"):
            call(**{argument: 0})


def test_the_chip_counts_what_passes_through_it() -> None:
    chip = Chip(torch.float16, programs=6)
    tile = torch.ones(2, 3, 4, 5, dtype=torch.float16)
    assert chip.load(tile).dtype == torch.float32
    chip.store(torch.empty(2, 3, 4, 5, dtype=torch.float16), tile)
    chip.matmul(tile.float(), tile.float().mT)
    chip.hold((tile,), (tile,), (tile[..., 0],))
    chip.visit(rescalings=1)
    chip.skip()
    chip.divide()
    counted = chip.counters
    assert (counted.elements_read, counted.bytes_read) == (120, 240)
    assert (counted.elements_written, counted.bytes_written) == (120, 240)
    assert counted.elements == counted.bytes / 2 == 240
    assert counted.matmul_flops == 2 * 6 * 4 * 5 * 4
    assert counted.on_chip_bytes == 20 * 2 + 20 * 4 + 4 * 4
    assert (counted.rescalings, counted.divisions, counted.tiles_visited, counted.tiles_skipped) == (6, 6, 6, 6)


def test_everything_stays_on_the_device_of_its_inputs() -> None:
    """On the meta device, where a tensor made elsewhere raises."""
    q, k, v = (x.to("meta") for x in inputs(65, 40).values())
    allowed = torch.ones(65, 40, dtype=torch.bool, device="meta")
    for loop in (flash_v1, flash_v2):
        (out, lse), _ = loop(q, k, v, causal=True, allowed=allowed)
        assert out.device.type == lse.device.type == "meta"
    grads, _ = flash_backward(q, k, v, out, lse, out, lse, causal=True, allowed=allowed)
    assert all(grad.device.type == "meta" for grad in grads)
