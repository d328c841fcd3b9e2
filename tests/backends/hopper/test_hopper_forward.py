"""The Hopper forward on a GPU: every selectable configuration under every feature, mask and geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hopper_cases import NAMED, assert_right, problem

import tilewise
from tilewise.backends.hopper import HOPPER
from tilewise.backends.hopper.configs import SELECTABLE, ForwardConfig
from tilewise.backends.hopper.launch import forward, plan
from tilewise.backends.hopper.schedule import of_sequences
from tilewise.masks import BigBird, Causal, Dense, Mask, PerHead, Prefix, Random, Window
from tilewise.ops.dispatch import choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
    ),
]

PACKED = ([100, 1, 0, 333, 64, 129], [100, 7, 20, 333, 64, 129])
SHORT = ([100, 1, 0, 333, 64, 129], [50, 7, 0, 400, 64, 200])
CASES: dict[str, dict[str, Any]] = {
    "full": {"n": 1000, "m": 1000, "bshd": True},
    "full-even": {"n": 512, "m": 512},
    "cross": {"n": 130, "m": 1500},
    "one": {"n": 1, "m": 1},
    "one-row": {"n": 1, "m": 777},
    "causal": {"n": 1000, "m": 1000, "causal": True},
    "causal-even": {"n": 1024, "m": 1024, "causal": True},
    "causal-more-keys": {"n": 300, "m": 811, "causal": True},
    "causal-fewer-keys": {"n": 811, "m": 300, "causal": True},
    "offset": {"n": 500, "m": 700, "causal": True, "offset": 17},
    "offset-below": {"n": 500, "m": 700, "causal": True, "offset": -130},
    "offsets": {"n": 500, "m": 700, "causal": True, "offset": [5, -90]},
    "window": {"n": 1000, "m": 1000, "causal": True, "window": (200, None)},
    "window-two-sided": {"n": 777, "m": 999, "window": (100, 37)},
    "window-narrow": {"n": 700, "m": 700, "window": (3, 1)},
    "window-left": {"n": 600, "m": 900, "window": (150, None)},
    "window-ahead": {"n": 500, "m": 500, "window": (-20, 90)},
    "window-empty": {"n": 500, "m": 300, "window": (-20, 10)},
    "sink": {"n": 300, "m": 500, "causal": True, "sink": True},
    "sink-empty-rows": {"n": 500, "m": 300, "causal": True, "sink": True},
    "softcap": {"n": 300, "m": 500, "causal": True, "softcap": 3.0},
    "softcap-large": {"n": 300, "m": 512, "softcap": 30.0, "gain": 10.0},
    "large-logits": {"n": 640, "m": 640, "gain": 30.0},
    "float16": {"n": 333, "m": 555, "dtype": torch.float16, "causal": True},
    "packed": {"lengths": SHORT},
    "packed-causal": {"lengths": PACKED, "causal": True},
    "packed-window": {"lengths": ([500, 333], [500, 444]), "window": (100, 0), "sink": True},
    "packed-offsets": {"lengths": ([100, 300], [200, 100]), "causal": True, "offset": [4, -7]},
}
MASKS: dict[str, tuple[Mask, dict[str, Any]]] = {
    "causal": (Causal(), {"n": 1000, "m": 1000}),
    "window": (Window(200, 30), {"n": 900, "m": 1100}),
    "blocks": (Random(2), {"n": 1000, "m": 1000}),
    "everything": (Window(5000, 5000), {"n": 512, "m": 512}),
    "bigbird": (BigBird(64, 3, 1, 2), {"n": 1500, "m": 1500, "sink": True, "softcap": 5.0}),
    "heads": (PerHead([Causal(), Window(100, 0), Prefix(70), Window(3, 3)]), {"n": 500, "m": 600}),
    "offsets": (Window(300, 300), {"n": 500, "m": 700, "causal": True, "offset": [3, -70]}),
    "few-keys": (Prefix(100), {"n": 300, "m": 3000}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMED)
def test_case(name: str, case: str) -> None:
    assert_right(NAMED[name], **CASES[case])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [name for name, config in NAMED.items() if config.warpgroups == 2])
def test_mask(name: str, mask: str) -> None:
    value, options = MASKS[mask]
    assert_right(NAMED[name], mask=value, **options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["random", "stripes"])
def test_dense_mask_of_either_encoding(kind: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    allowed = torch.rand(700, 900, generator=g) < 0.5
    if kind == "stripes":
        allowed = (torch.arange(700)[:, None] % 300 < 100).expand(700, 900).clone()
    assert_right(None, mask=Dense(allowed.to(device)), n=700, m=900, dims=(128, 128))


@pytest.mark.parametrize("lengths", [None, ([100, 77], [100, 120])], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "dims",
    [
        (8, 8),
        (40, 40),
        (72, 72),
        (96, 96),
        (96, 64),
        (128, 64),
        (64, 128),
        (136, 136),
        (192, 192),
        (256, 128),
        (200, 64),
    ],
    ids=str,
)
def test_head_dims(dims: tuple[int, int], lengths: tuple[list[int], list[int]] | None) -> None:
    assert_right(None, dims=dims, lengths=lengths, n=300, m=500, causal=True)


def _views(q: torch.Tensor) -> dict[str, torch.Tensor]:
    """q's values in other memory."""
    wide = torch.zeros(*q.shape[:3], q.shape[3] + 3, dtype=q.dtype, device="cuda")
    wide[..., 1 : q.shape[3] + 1] = q
    return {
        "unaligned rows": wide[..., 1 : q.shape[3] + 1],
        "strided head dim": torch.stack((q, q), -1).flatten(3)[..., ::2],
        "every other token": torch.stack((q, q), 3).flatten(2, 3)[:, :, ::2],
    }


def test_what_the_copy_engine_cannot_take_is_copied() -> None:
    operands, spec = problem(None, dims=(64, 64), n=200, m=200, kv_heads=4, causal=True)
    expected = forward(operands, spec, plan(spec))
    for name, view in _views(operands.k).items():
        found = forward(operands._replace(k=view), spec, plan(spec))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), name
    shared = operands._replace(k=operands.k[:, :1].expand(-1, 4, -1, -1))
    copied = shared._replace(k=shared.k.contiguous())
    pairs = zip(forward(shared, spec, plan(spec)), forward(copied, spec, plan(spec)), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_sequences_do_not_see_each_other() -> None:
    operands, spec = problem(None, dims=(128, 128), lengths=([100, 150, 70], [130, 40, 99]), causal=True)
    clean, _ = forward(operands, spec, plan(spec))
    k, v = operands.k.clone(), operands.v.clone()
    k[:, :, 130:170], v[:, :, 130:170] = float("nan"), float("inf")
    dirty, _ = forward(operands._replace(k=k, v=v), spec, plan(spec))
    others = [*range(100), *range(250, 320)]
    assert torch.equal(clean[:, :, others], dirty[:, :, others])


def test_long_sequences_come_first() -> None:
    lengths = [100, 0, 700, 129, 700, 1]
    operands, spec = problem(None, dims=(64, 64), lengths=(lengths, lengths))
    assert operands.cu_seqlens_q is not None
    items = of_sequences(operands.cu_seqlens_q, spec, 128)[0].tolist()
    tiles = [-(-length // 128) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda s: (-tiles[s], s))
    assert items[: 1 + sum(tiles)] == [sum(tiles), *(s * 6 + t for s in order for t in reversed(range(tiles[s])))]


def test_no_keys_and_no_rows() -> None:
    operands, spec = problem(None, dims=(64, 64), n=5, m=0, sink=True)
    out, lse = forward(operands, spec, plan(spec))
    assert operands.sink is not None
    assert out.eq(0).all()
    assert torch.equal(lse, operands.sink.float()[None, :, None].expand(2, 4, 5))
    operands, spec = problem(None, dims=(64, 64), n=0, m=5)
    assert forward(operands, spec, plan(spec))[0].shape == (2, 4, 0, 64)


@pytest.mark.parametrize("config", SELECTABLE, ids=str)
def test_the_same_bits_250_times(config: ForwardConfig) -> None:
    masked = config.warpgroups == 2
    operands, spec = problem(
        config, n=1100, m=1100, heads=8, causal=True, mask=BigBird(64, 3, 1, 2) if masked else None
    )
    packed = problem(config, lengths=([500, 77, 900], [500, 99, 900]), heads=8, causal=True)
    # One block a tile, and next tiles that lie half behind the end: their rows are there at once, as zeros.
    short = problem(config, n=2100, m=128, batch=1, heads=20, kv_heads=4)
    for tensors, its_spec in ((operands, spec), packed, short):
        prepared = plan(its_spec, config)
        first = forward(tensors, its_spec, prepared)
        for _ in range(249):
            again = forward(tensors, its_spec, prepared)
            assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"lengths": ([100, 300], [100, 300]), "causal": True}, {"mask": BigBird(64, 3, 1, 2)}],
    ids=["causal", "packed", "mask"],
)
def test_graph_replays_what_eager_computes(options: dict[str, Any]) -> None:
    operands, spec = problem(None, dims=(128, 128), n=600, m=600, **options)
    prepared = plan(spec)
    eager = forward(operands, spec, prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(operands, spec, prepared)
    for x in operands[:3]:
        x.normal_()
    for _ in range(2):
        graph.replay()
    fresh = forward(operands, spec, prepared)
    assert all(torch.equal(x, y) for x, y in zip(captured, fresh, strict=True))
    assert not torch.equal(captured[0], eager[0])


def test_auto_takes_it_and_says_so() -> None:
    q, k, v = (torch.randn(2, 8, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    chosen = tilewise.explain(q, k, v, causal=True)
    assert chosen.backend == "hopper"
    assert "forward 128×128, 2 consumers" in str(chosen)
    out = tilewise.attention(q, k, v, causal=True)
    assert torch.equal(out, tilewise.attention(q, k, v, causal=True, backend="hopper"))
    assert choose(chosen.spec, "triton").backend == "triton"
    assert HOPPER.why_not(chosen.spec) is None
