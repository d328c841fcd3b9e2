"""The Hopper kernels' own source, run on the CPU by emulator.py: results, barriers, buffers and addresses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

import emulator
from backward_problems import ROUNDING, exact, lowered, make, ours, with_exact_delta, worst_error
from hopper_cases import DEVICE, NAMED, assert_right, problem

from tilewise.backends.hopper.configs import D64_LONG, D64_SHORT, D128_HELD
from tilewise.backends.hopper.launch import forward, plan
from tilewise.backends.triton import interpreting
from tilewise.masks import BigBird, Mask, PerHead, Prefix, Random, Window

pytestmark = pytest.mark.skipif(DEVICE == "cuda" or interpreting(), reason="the kernels run themselves there")

FAR = 2**31 - 1
LENGTHS = ([70, 1, 0, 133], [70, 7, 20, 0])
FORWARD: dict[str, dict[str, Any]] = {
    "causal": {"n": 300, "m": 411, "heads": 2, "causal": True},
    "window": {"n": 290, "m": 333, "batch": 1, "window": (100, 37), "softcap": 3.0, "sink": True},
    "packed": {"lengths": LENGTHS, "causal": True, "sink": True},
}
MASKS: dict[str, tuple[Mask, dict[str, Any]]] = {
    "blocks": (BigBird(64, 3, 1, 2), {"n": 300, "m": 500, "heads": 2}),
    "heads": (PerHead([Random(2), Window(100, 0), Prefix(70), Window(3, 3)]), {"n": 200, "m": 300, "batch": 1}),
}
BACKWARD: dict[str, dict[str, Any]] = {
    "causal": {"n": 300, "m": 233, "heads": 3, "kv_heads": 1, "causal": True, "dlse": True},
    "window": {"n": 277, "m": 300, "batch": 1, "window": (70, 33), "softcap": 1.7, "sink": True},
    "packed": {"lengths": [(100, 130), (1, 64), (0, 9), (40, 0)], "causal": True},
    "map": {"n": 315, "m": 277, "batch": 1, "mask": "window(100, 20) | global([0:3])"},
}
MASKED = {"mask": "window(200, 200)"}
EXTREMES: list[dict[str, Any]] = [
    {"offset": FAR, "window": (5, None)},
    {"offset": [FAR], "causal": True},
    {"offset": -FAR, "window": (None, FAR)},
    {"offset": [-FAR], "window": (5, 7)},
    {"offset": 3, "window": (FAR, FAR)},
]


@pytest.mark.parametrize("case", FORWARD)
@pytest.mark.parametrize("name", NAMED)
def test_forward(name: str, case: str) -> None:
    with emulator.emulating():
        assert_right(NAMED[name], dtype=torch.float16, **FORWARD[case])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["D64_NARROW", "D256"])
def test_map(name: str, mask: str) -> None:
    value, options = MASKS[mask]
    with emulator.emulating():
        assert_right(NAMED[name], mask=value, dtype=torch.float16, **options)


@pytest.mark.parametrize(
    ("dims", "case"),
    [(dims, case) for dims in ((64, 64), (128, 128), (256, 256), (192, 128)) for case in BACKWARD
     if dims[0] <= 128 or case != "map"],
    ids=str,
)  # fmt: skip
def test_backward(dims: tuple[int, int], case: str) -> None:
    given = make(dim=dims[0], v_dim=dims[1], dtype="float16", **BACKWARD[case])
    out, lse, grads = exact(given)
    with emulator.emulating():
        assert worst_error(ours(given, out, lse), grads) < ROUNDING["float16"]


@pytest.mark.parametrize(("dim", "options"), [(d, {}) for d in (64, 128, 256)] + [(d, MASKED) for d in (64, 128)])
def test_scores_far_below_those_of_keys_past_the_end(dim: int, options: dict[str, Any]) -> None:
    given = lowered(make(n=130, m=70, dim=dim, batch=1, dtype="float16", **options))
    out, lse, grads = exact(given)
    with emulator.emulating():
        found = ours(given, out, lse)
    # The first column of dQ is dS times a constant, which cancels.
    assert worst_error([x[..., 1:] for x in found], [x[..., 1:] for x in grads]) < ROUNDING["float16"]


@pytest.mark.parametrize("dim", [64, 256])
def test_what_is_not_a_number_stays_so(dim: int) -> None:
    """Also where the weights of keys past the end are limited: the plain minimum of NaN and 0 is 0."""
    given = make(n=70, m=70, dim=dim, batch=1, heads=1, kv_heads=1, dtype="float16")
    out, lse, _ = exact(given)
    given.operands.q[0, 0, 3, 5] = float("nan")
    with emulator.emulating():
        assert all(x.isnan().any() for x in ours(given, out, lse))


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_offsets_and_windows_at_the_ends_of_int32(options: dict[str, Any]) -> None:
    with emulator.emulating():
        assert_right(D64_SHORT, n=130, m=140, batch=1, heads=2, dtype=torch.float16, **options)
    offset = options["offset"]
    rest = {name: x for name, x in options.items() if name != "offset"}
    rest |= {"offsets": offset} if isinstance(offset, list) else {"q_offset": offset}
    given = make(n=130, m=140, batch=1, heads=2, dtype="float16", **rest)
    out, lse, grads = exact(given)
    with emulator.emulating():
        assert worst_error(ours(given, out, lse), grads) < ROUNDING["float16"]


def test_tokens_that_belong_to_no_sequence() -> None:
    operands, spec = problem(None, dims=(64, 64), lengths=([40, 60], [40, 60]), dtype=torch.float16)
    nowhere = torch.zeros(3, dtype=torch.int32)
    with emulator.emulating():
        out, _ = forward(operands._replace(cu_seqlens_q=nowhere, cu_seqlens_k=nowhere), spec, plan(spec))
    assert out.isnan().all()  # as it was allocated


@pytest.mark.parametrize("seed", range(4))
def test_many_orders_of_events_at_head_dims_above_128(seed: int) -> None:
    """Fewer blocks than buffers, and more."""
    for n, m in ((1, 1), (64, 130), (130, 64), (500, 300)):
        given = make(n=n, m=m, dim=136, batch=1, heads=2, kv_heads=1, dtype="float16", seed=seed)
        out, lse, grads = exact(given)
        with emulator.emulating(seed=seed):
            assert worst_error(ours(given, out, lse), grads) < ROUNDING["float16"]


def test_what_is_lost_where_gradients_cancel_is_the_outputs_rounding() -> None:
    """One row and two keys, one of which has nearly all the weight: the worst of 6320 random problems."""
    given = make(dim=192, v_dim=64, heads=1, kv_heads=1, lengths=[(1, 2), (113, 0)], dtype="float16", seed=945914910)
    out, lse, grads = exact(given)
    with emulator.emulating():
        assert worst_error(ours(given, out, lse), grads) > 5 * ROUNDING["float16"]
        assert worst_error(ours(with_exact_delta(given, out, lse), out, lse), grads) < ROUNDING["float16"]


FAULTS = [
    ("\n        fence_async_shared()\n", "\n", "fenced"),
    ("            store_wait(0)\n        out_s", "            pass\n        out_s", "still reads"),
    ("mbarrier.wait(call.q_free.index(at), (count // call.Q_BUFFERS & 1) ^ 1)", "pass", "changed under a product"),
    ("warpgroup_mma_wait(0, deps=[acc_issued, w", "warpgroup_mma_wait(1, deps=[acc_issued, w", "before it is done"),
    (
        ">= call.STAGES:\n        barrier_sync(V",
        "> call.STAGES:\n        barrier_sync(V",
        "twice|more arrivals|changed under",
    ),
    ("mbarrier.arrive(call.q_free.index(q_at), count=1)", "pass", "deadlock"),
    ("            fence_async_shared()\n            mb", "            mb", "overtook"),
]


@pytest.mark.parametrize(("was", "becomes", "words"), FAULTS, ids=[words for _, _, words in FAULTS])
def test_the_emulator_finds(was: str, becomes: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault, put into the kernel's source, is found."""
    source = emulator.inspect.getsource
    monkeypatch.setattr(emulator.inspect, "getsource", lambda function: source(function).replace(was, becomes))
    emulator.functions.cache_clear()
    # Q in registers and one block a tile: the next tile comes as soon as it can.
    short = words in ("overtook", "still reads")
    config, options = (D128_HELD, {"m": 100}) if short else (D64_LONG, {"m": 500, "causal": True})
    with pytest.raises(AssertionError, match=words), emulator.emulating():
        assert_right(config, n=500, dtype=torch.float16, **options)
    emulator.functions.cache_clear()


BACKWARD_FAULTS = [
    ("    fence_async_shared()\n    tile", "    tile", "fenced"),
    ("if count >= q_pairs(D):", "if count > q_pairs(D):", "changed under a product"),
    ("    pending = NOWHERE\n    pos", "    pending = -16\n    pos", "illegal"),
    ("        store_wait(0)\n        dq =", "        dq =", "still reads"),
]


@pytest.mark.parametrize(("was", "becomes", "words"), BACKWARD_FAULTS, ids=[words for _, _, words in BACKWARD_FAULTS])
def test_the_emulator_finds_in_the_backward(
    was: str, becomes: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = emulator.inspect.getsource
    monkeypatch.setattr(emulator.inspect, "getsource", lambda function: source(function).replace(was, becomes))
    emulator.functions.cache_clear()
    given = make(n=700, m=100, dim=128, batch=1, heads=1, kv_heads=1, dtype="float16")
    out, lse, _ = exact(given)
    with pytest.raises(AssertionError, match=words), emulator.emulating():
        ours(given, out, lse)
    emulator.functions.cache_clear()
