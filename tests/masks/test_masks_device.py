"""The device encoding, run here on CPU tensors: right for every mask, and made of operations that never wait."""

from __future__ import annotations

import random
from typing import Any

import mask_oracle
import numpy as np
import pytest
import torch
from mask_oracle import Case, Problem
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise import masks
from tilewise.masks import tensors
from tilewise.masks.arrays import Held
from tilewise.masks.compiler import settle
from tilewise.masks.device import dense_on_device, encode_on_device
from tilewise.masks.tensors import TileTensors
from waiting import never_wait

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")


class NeverWaits(TorchDispatchMode):
    """Fails on any operation whose result's shape or value the host would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in WAITS, f"{name} waits for the device"
        assert not (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])), "boolean index"
        return func(*args, **(kwargs or {}))


def decode(tiles: TileTensors) -> np.ndarray:
    """bool [batch, heads, n, m], read as a kernel reads it."""
    rows = tiles.batch * tiles.heads * tiles.q_tiles
    matrix = np.zeros((rows, 128, tiles.k_tiles * 128), bool)
    bits = np.unpackbits(tiles.bits.numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)
    for r in range(rows):
        seen: set[int] = set()
        previous = -1
        for k in range(int(tiles.run_begin[r]), int(tiles.run_end[r])):
            start, stop = int(tiles.run_start[k]), int(tiles.run_stop[k])
            assert previous < start < stop, "runs ascend and never touch"
            previous = stop
            matrix[r, :, start * 128 : stop * 128] = True
            seen |= set(range(start, stop))
        assert not tiles.m % 128 or tiles.k_tiles - 1 not in seen
        columns = tiles.part_col[tiles.part_begin[r] : tiles.part_end[r]].tolist()
        assert columns == sorted(set(columns) - seen)
        for k in range(int(tiles.part_begin[r]), int(tiles.part_end[r])):
            column, tile = int(tiles.part_col[k]), bits[int(tiles.part_id[k])]
            matrix[r, :, column * 128 : (column + 1) * 128] = tile
    assert not matrix[:, :, tiles.m :].any(), "bits from m on are cleared"
    shape = (tiles.batch, tiles.heads, tiles.q_tiles * 128, tiles.m)
    return matrix[:, :, : tiles.m].reshape(shape)[:, :, : tiles.n]


def unreadable(held: Held) -> np.ndarray:
    raise AssertionError(f"the host reads {held.argument}")


def check(case: Case, problem: Problem, there: bool) -> None:
    """`there` treats all arrays as if they lay on an accelerator, except where the host has to know them."""
    one = len(set(problem.offset)) == 1
    offset = problem.offset[0] if one else list(problem.offset)
    frame = settle(case.mask, problem.n, problem.m, offset, problem.heads)
    want = case.answer(problem).numpy()
    for transposed in (False, True):
        with pytest.MonkeyPatch.context() as patch, NeverWaits():
            if there and "tree" not in str(case.mask):
                patch.setattr(Held, "on_device", property(lambda self: True))
                patch.setattr(Held, "host", unreadable)
            tiles = encode_on_device(case.mask, frame, torch.device("cpu"), transposed)
        got = decode(tiles)
        got = np.broadcast_to(got.swapaxes(2, 3) if transposed else got, want.shape)
        np.testing.assert_array_equal(got, want, err_msg=f"{case.mask} in {problem}, transposed={transposed}")
    with NeverWaits():
        dense = dense_on_device(case.mask, frame, torch.device("cpu"))
    np.testing.assert_array_equal(np.broadcast_to(dense.numpy(), want.shape), want, err_msg=f"{case.mask} in {problem}")


@pytest.mark.parametrize("there", [False, True], ids=["host-arrays", "device-arrays"])
@pytest.mark.parametrize("seed", range(4))
def test_random_expressions(seed: int, there: bool) -> None:
    rng = random.Random(seed + 100 * there)
    for _ in range(12):
        problem = mask_oracle.problem_of(rng)
        check(mask_oracle.expression(rng, problem, depth=2), problem, there)


@pytest.mark.parametrize("there", [False, True], ids=["host-arrays", "device-arrays"])
@pytest.mark.parametrize("kind", mask_oracle.LEAVES)
def test_every_mask_on_its_own(kind: str, there: bool) -> None:
    rng = random.Random(kind)
    for _ in range(5):
        problem = mask_oracle.problem_of(rng)
        check(mask_oracle.leaf(kind, rng, problem, headed=True), problem, there)


@pytest.mark.gpu
def test_on_an_accelerator_without_waiting() -> None:
    device = torch.device("cuda")
    n, m, batch = 513, 700, 3
    q_ids, k_ids = (torch.randint(0, 9, (batch, size)).sort().values for size in (n, m))
    content = torch.rand(batch, 2, n, m) > 0.5
    starts = torch.tensor([0, 100, 187], dtype=torch.int32)

    def family(place: torch.device | str) -> tuple[masks.Mask, ...]:
        return (
            masks.Documents(q_ids.to(place), k_ids.to(place)) & masks.Causal(),
            masks.Dense(content.to(place)) | masks.Global([0, 300]),
            masks.Causal(starts.to(place)) & masks.Window(100, 100) | masks.Random(1, 32, seed=2),
            masks.PerHead([masks.Causal(starts.to(place)), masks.Dilated(20, 3)]),
        )

    for offset in (None, starts):
        for host, mask in zip(family("cpu"), family(device), strict=True):
            want = host.to_dense(n, m, offset=offset, heads=2)
            moved = None if offset is None else offset.to(device)
            for transposed in (False, True):
                with never_wait():
                    tiles = tensors.tile_map(mask, n, m, offset=moved, device=device, heads=2, transposed=transposed)
                assert tiles.bits.device.type == "cuda"
                got = decode(TileTensors(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in tiles)))
                got = got.swapaxes(2, 3) if transposed else got
                np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape), err_msg=str(host))
    assert tensors.tile_map(masks.Causal(), n, m, device=device).run_start.device.type == "cuda"
    with pytest.raises(ValueError, match="on cuda"):
        tensors.tile_map(family(device)[0], n, m, device="cpu")


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    device = torch.device("cuda")
    ids = torch.zeros(700, dtype=torch.int64, device=device)
    mask = masks.Documents(ids) & masks.Causal() & masks.Window(300, 0) | masks.Prefix(3)
    frame = settle(mask, 700, 700, None, 1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        encode_on_device(mask, frame, device, transposed=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tiles = encode_on_device(mask, frame, device, transposed=False)
    later = torch.arange(700) // 150
    ids.copy_(later)
    graph.replay()
    got = decode(TileTensors(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in tiles)))
    want = masks.Documents(later) & masks.Causal() & masks.Window(300, 0) | masks.Prefix(3)
    np.testing.assert_array_equal(got[0, 0], want.to_dense(700, 700))
