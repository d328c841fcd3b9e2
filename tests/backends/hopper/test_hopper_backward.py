"""The Hopper backward on the device: every configuration against float64, bitwise repeatability, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

from backward_problems import ROUNDING, exact, lowered, make, ours, worst_error

from tilewise.backends.base import Needs
from tilewise.backends.hopper.backward import backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90"
    ),
]

PACKED = [(100, 130), (1, 64), (257, 257), (40, 0), (128, 1)]
CASES: dict[str, dict[str, Any]] = {
    "one": {"n": 1, "m": 1},
    "odd": {"n": 113, "m": 257},
    "full": {"n": 515, "m": 1000, "dlse": True},
    "heads": {"n": 513, "m": 513, "kv_heads": 4},
    "mqa": {"n": 300, "m": 300, "heads": 8, "kv_heads": 1, "causal": True},
    "causal": {"n": 640, "m": 640, "causal": True},
    "causal-longer": {"n": 113, "m": 300, "causal": True, "dlse": True},
    "causal-empty-rows": {"n": 700, "m": 300, "causal": True},
    "offset": {"n": 65, "m": 640, "causal": True, "q_offset": 37},
    "offsets": {"n": 200, "m": 500, "causal": True, "offsets": [300, -50]},
    "window": {"n": 1000, "m": 1000, "causal": True, "window": (100, None)},
    "window-both": {"n": 777, "m": 515, "window": (70, 33)},
    "window-left": {"n": 600, "m": 600, "window": (90, None)},
    "window-right": {"n": 600, "m": 600, "window": (None, 50)},
    "softcap": {"n": 300, "m": 400, "softcap": 1.7},
    "softcap-causal": {"n": 300, "m": 400, "softcap": 30.0, "causal": True},
    "sink": {"n": 300, "m": 310, "sink": True, "causal": True, "dlse": True},
    "packed": {"lengths": PACKED},
    "packed-causal": {"lengths": PACKED, "causal": True, "dlse": True},
    "packed-window": {"lengths": PACKED, "window": (64, 10), "sink": True},
    "packed-offset": {"lengths": PACKED, "causal": True, "q_offset": 5, "softcap": 5.0},
    "map": {"n": 515, "m": 777, "mask": "window(100, 20) | global([0:3])"},
    "map-softcap": {"n": 515, "m": 777, "mask": "causal()", "softcap": 2.0},
    "negative-scale": {"n": 256, "m": 256, "scale": -0.3},
}


def with_dims(*names: str) -> list[tuple[int, str]]:
    """Each case at each head dim that takes it."""
    return [(dim, name) for dim in (64, 128, 256) for name in names if dim <= 128 or "mask" not in CASES[name]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("dim", "name"), with_dims(*CASES))
def test_gradients(name: str, dtype: str, dim: int) -> None:
    problem = make(dim=dim, dtype=dtype, **CASES[name])
    out, lse, grads = exact(problem)
    assert worst_error(ours(problem, out, lse), grads) < ROUNDING[dtype]


@pytest.mark.parametrize(("dim", "name"), with_dims("odd", "causal-longer", "window-both", "packed", "map"))
def test_scores_far_below_those_of_keys_past_the_end(dim: int, name: str) -> None:
    problem = lowered(make(dim=dim, **CASES[name]))
    out, lse, grads = exact(problem)
    found = ours(problem, out, lse)
    # The first column of dQ is dS times a constant, which cancels.
    assert worst_error([x[..., 1:] for x in found], [x[..., 1:] for x in grads]) < ROUNDING["bfloat16"]


@pytest.mark.parametrize(
    "dims", [(80, 80), (96, 72), (40, 40), (8, 64), (64, 128), (128, 32), (192, 128), (136, 200)], ids=str
)
def test_head_dims_are_padded(dims: tuple[int, int]) -> None:
    problem = make(n=300, m=333, dim=dims[0], v_dim=dims[1], causal=True)
    out, lse, grads = exact(problem)
    assert worst_error(ours(problem, out, lse), grads) < ROUNDING["bfloat16"]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dk_and_dv_are_the_same_bits_every_time(dim: int) -> None:
    problem = make(n=1500, m=1500, dim=dim, heads=16, kv_heads=8, causal=True)
    out, lse, _ = exact(problem)
    first = ours(problem, out, lse)
    for _ in range(249):
        again = ours(problem, out, lse)
        assert torch.equal(again[1], first[1])
        assert torch.equal(again[2], first[2])
        assert dim <= 128 or torch.equal(again[0], first[0]), "dQ too"


def test_neighbouring_sequences_do_not_touch() -> None:
    problem = make(lengths=[(70, 70), (130, 200), (64, 90)], dim=64)
    out, lse, grads = exact(problem)
    for x in (problem.operands.q, problem.operands.k, problem.operands.v, problem.dout):
        x[:, :, -64:] = float("nan")
    dq, dk, dv = ours(problem, out, lse)
    for x, y, tokens in ((dq, grads[0], 200), (dk, grads[1], 270), (dv, grads[2], 270)):
        assert worst_error([x[:, :, :tokens]], [y[:, :, :tokens]]) < ROUNDING["bfloat16"]


def test_strided_and_expanded_tensors() -> None:
    problem = make(n=200, m=200, dim=64, batch=1)
    operands = problem.operands
    q = operands.q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([operands.k, operands.k], -1)[..., 60:124]
    dout = problem.dout[..., :1].expand(problem.dout.shape)
    problem = problem._replace(operands=operands._replace(q=q, k=k), dout=dout)
    out, lse, grads = exact(problem)
    assert worst_error(ours(problem, out, lse), grads) < ROUNDING["bfloat16"]


@pytest.mark.parametrize("dim", [128, 256])
def test_a_graph_replays_it(dim: int) -> None:
    problem = make(n=300, m=300, dim=dim, causal=True)
    out, lse, _ = exact(problem)
    out, lse = out.bfloat16(), lse.float()
    arguments = (problem.dout, None, problem.operands, out, lse, problem.spec, None, Needs())
    eager = backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(*arguments)
    assert captured.k is not None
    captured.k.fill_(float("nan"))
    graph.replay()
    assert eager.k is not None
    assert torch.equal(captured.k, eager.k)
