"""What the Hopper backend decides on the host: whom it serves, how tiles are dealt out, which tensors it copies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from tilewise.backends.base import Operands
from tilewise.backends.hopper import HOPPER, schedule
from tilewise.backends.hopper.backward import backward_obstacle
from tilewise.backends.hopper.backward import plan as backward_plan
from tilewise.backends.hopper.configs import SELECTABLE, forward_config
from tilewise.backends.hopper.launch import for_copy_engine
from tilewise.masks import BigBird, Causal, Mask, PerHead, Prefix, Window, tile_map
from tilewise.masks.tensors import pack, to_tensors
from tilewise.ops.dispatch import choose
from tilewise.spec import AttentionSpec

SPEC = AttentionSpec(2, 8, 4, 4096, 4096, 128, 128, "bfloat16", "sm_90", 128**-0.5, causal=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "sm_100"}, "wgmma"),
        ({"device": "cpu"}, "wgmma"),
        ({"dtype": "float32"}, "float32"),
        ({"head_dim": 264}, "up to 256"),
        ({"v_head_dim": 60}, "multiples of 8"),
        ({"bias": (1, 1, 1, 4096)}, "biases"),
        ({"relative": 7}, "biases"),
        ({"alibi": True}, "biases"),
        ({"dropout": 0.1}, "dropout"),
        ({"scale": -1.0}, "scale above zero"),
        ({"softcap": 1e5}, "tanh"),
        ({"packed": True, "mask": "causal()"}, "tile map"),
        ({"head_dim": 256, "packed": True, "window": (9, 9), "softcap": 2.0}, "registers"),
    ],
    ids=str,
)
def test_it_says_what_it_cannot_do(change: dict[str, Any], words: str) -> None:
    pytest.importorskip("triton")
    assert HOPPER.why_not(SPEC) is None
    sentence = HOPPER.why_not(replace(SPEC, **change))
    assert sentence is not None
    assert words in sentence


def test_the_backward_says_what_it_cannot_do() -> None:
    assert backward_obstacle(SPEC) is None
    assert backward_obstacle(replace(SPEC, head_dim=256, deterministic=True)) is None
    assert "tile maps" in str(backward_obstacle(replace(SPEC, head_dim=256, mask="causal()")))
    assert "order" in str(backward_obstacle(replace(SPEC, deterministic=True)))
    assert "65535" in str(backward_obstacle(replace(SPEC, batch=40000)))
    assert backward_plan(replace(SPEC, head_dim=40, v_head_dim=72)).block_d == 128
    assert backward_plan(replace(SPEC, v_head_dim=136)).block_d == 256


def test_the_plan_names_tiles_and_who_computes_gradients() -> None:
    pytest.importorskip("triton")
    plan = choose(SPEC)
    assert plan.backend == "hopper"
    assert "forward 128×128, 2 consumers, 2 stages; backward: hopper" in str(plan)
    wide = choose(replace(SPEC, deterministic=True))
    assert "backward: triton because" in str(wide)
    assert json.loads(json.dumps(wide.as_dict()["config"]))["forward"]["block_n"] == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_len": 1024, "k_len": 1024, "batch": 1}, "descriptors"),
        ({"packed": True, "q_total": 2000, "k_total": 4000}, "descriptors"),
        ({"head_dim": 64, "v_head_dim": 64, "window": (1000, None)}, "edges"),
    ],
    ids=str,
)
def test_auto_takes_a_faster_one_and_says_so(change: dict[str, Any], words: str) -> None:
    pytest.importorskip("triton")
    spec = replace(SPEC, **change)
    plan = choose(spec)
    assert plan.backend == "triton"
    assert words in plan.reason
    assert words in plan.rejected["hopper"]
    assert choose(spec, "hopper").backend == "hopper"


def test_tiles_fit_into_shared_memory() -> None:
    assert all(config.shared_bytes <= 227 << 10 for config in SELECTABLE)
    assert {config.stages for config in SELECTABLE} <= {2, 3}, "hardware barriers 6 to 15 hold three stages"
    assert {config.q_buffers for config in SELECTABLE} == {1, 2}, "claim_tile relies on it"
    assert not any(config.out_over_q for config in SELECTABLE if config.q_buffers == 2), "it would be stored elsewhere"
    assert len({str(config) for config in SELECTABLE if config.block_d == 64}) == 4, "who compiles ahead tells by this"
    for dims in ((8, 8), (72, 64), (64, 72), (192, 128), (136, 128), (128, 256), (256, 256)):
        config = forward_config(replace(SPEC, head_dim=dims[0], v_head_dim=dims[1]))
        assert config.block_d >= dims[0]
        assert config.block_dv >= dims[1]


@pytest.mark.parametrize(
    ("n", "m", "planes", "options"),
    [
        (1000, 1000, 8, {"causal": True}),
        (4096, 4096, 16, {"causal": True}),
        (300, 811, 12, {"window": (100, 7)}),
        (811, 300, 3, {"causal": True}),
        (500, 700, 4, {"causal": True, "q_offset": -130}),
        (65, 1, 1, {"causal": True}),
    ],
)
def test_every_tile_is_dealt_out_once_and_evenly(n: int, m: int, planes: int, options: dict[str, Any]) -> None:
    rows, block_n, programs = 128, 128, 13
    spec = AttentionSpec(1, planes, planes, n, m, 128, 128, "bfloat16", "sm_90", 1.0, **options)
    dealt = schedule.of_band(spec, rows, block_n, programs, torch.device("cpu")).numpy()
    begins, tiles = dealt[: programs + 1], -(-n // rows)
    assert begins[0] == programs + 1
    assert sorted(dealt[programs + 1 :].tolist()) == list(range(planes * tiles))
    assert begins[-1] == len(dealt)
    allowed = oracle.allowed(n, m, 1, **options)[0, 0].numpy()
    visited = [
        sum(allowed[i : i + rows, j : j + block_n].any() for j in range(0, m, block_n)) for i in range(0, n, rows)
    ]
    loads = [sum(max(1, visited[tile % tiles]) for tile in dealt[begins[p] : begins[p + 1]]) for p in range(programs)]
    most = max(visited) + schedule.OVERHEAD
    assert max(loads) <= np.mean(loads) + most + 8


@pytest.mark.parametrize(
    "mask", [Causal(), BigBird(64, 3, 1, 2), PerHead([Causal(), Window(100, 0), Prefix(70)])], ids=str
)
@pytest.mark.parametrize("rows", [64, 128])
def test_a_map_s_queue_holds_every_tile_longest_first(mask: Mask, rows: int) -> None:
    n, m, batch, heads = 1000, 900, 2, 3
    host = tile_map(mask, n, m, heads=heads)
    spec = AttentionSpec(batch, heads, heads, n, m, 64, 64, "bfloat16", "sm_90", 1.0, mask=str(mask))
    tiles = to_tensors(host, "cpu")
    counts, queue = schedule.of_tile_map(tiles, spec, rows)
    full = np.bincount(*_lengths(host), minlength=host.rows)
    assert counts[:, 0].tolist() == np.diff(host.part_ptr).tolist()
    assert counts[:, 1].tolist() == full.tolist()
    row_tiles = -(-n // rows)
    assert queue[0] == batch * heads * row_tiles
    assert sorted(queue[1:].tolist()) == list(range(batch * heads * row_tiles))
    costs = counts.sum(1).view(host.batch, host.heads, -1).expand(batch, heads, -1).reshape(batch * heads, -1)
    found = [costs[tile // row_tiles, tile % row_tiles * rows // 128].item() for tile in queue[1:].tolist()]
    assert found == sorted(found, reverse=True)
    assert schedule.of_tile_map(tiles, spec, rows)[1] is queue


def test_the_page_s_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    page = Path(__file__).parents[3] / "docs" / "hopper.md"
    for code in re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(code, str(page), "exec"), {})  # noqa: S102 - the project's own documentation
    assert "hopper: the first choice on sm_90" in capsys.readouterr().out


def _lengths(host: Any) -> tuple[np.ndarray, np.ndarray]:
    row, _, length = host.runs()
    return row, length


def test_only_what_the_copy_engine_cannot_take_is_copied() -> None:
    x = torch.randn(2, 3, 40, 64).to(torch.bfloat16)
    taken = [x, x.transpose(1, 2), x[:, :, 3:30], x[..., 8:32], x[:1, :, :1]]
    assert all(for_copy_engine(view)[0].data_ptr() == view.data_ptr() for view in taken)
    refused = [x[..., 1:33], x[..., ::2], x[:, :1].expand(-1, 3, -1, -1)]
    for view in refused:
        copy, strides = for_copy_engine(view)
        assert torch.equal(copy, view)
        assert copy.data_ptr() != view.data_ptr()
        assert strides[3] == 1
    _, strides = for_copy_engine(x.as_strided((1, 1, 5, 64), (7, 3, 64, 1)))
    assert strides == [8, 8, 64, 1]


def test_a_kernel_is_remembered_by_what_its_pointers_point_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks of two dtypes are two kernels; a mask of other contents is the same one."""
    pytest.importorskip("triton")
    from tilewise.backends.hopper import forward, launch

    asked: list[int] = []
    ran: list[int] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: (asked if options else ran).append(1) or self

    monkeypatch.setattr(forward, "attention_forward", Kernel())
    monkeypatch.setattr(launch, "multiprocessors", lambda index: 132)
    q = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    spec = AttentionSpec(1, 2, 2, 256, 256, 64, 64, "bfloat16", "sm_90", 0.125, sink=True)
    plan = launch.plan(spec)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        launch.forward(Operands(q, q, q, sink=torch.zeros(2, dtype=dtype)), spec, plan)
    assert (len(asked), len(ran)) == (2, 1)
    masked = replace(spec, sink=False, mask=str(Prefix(3)))
    plan = launch.plan(masked)
    for mask in (Prefix(3), Prefix(3)):
        launch.forward(Operands(q, q, q, mask_tensors=pack(mask)[1]), masked, plan)
    assert (len(asked), len(ran)) == (3, 2)
