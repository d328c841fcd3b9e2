"""What stays on a device between calls, with the capture of a CUDA graph played."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from tilewise import resident
from tilewise.backends.hopper import schedule
from tilewise.masks import BigBird, Causal
from tilewise.masks.compiler import tile_map as compiled
from tilewise.masks.tensors import tile_map, to_tensors
from tilewise.ops import arguments
from tilewise.spec import AttentionSpec

CPU = torch.device("cpu")

Capture = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Inside, everybody believes that a graph is being captured."""
    monkeypatch.setattr(resident, "_READ_BY_GRAPHS", {})

    @contextmanager
    def capturing() -> Iterator[None]:
        with monkeypatch.context() as inside:
            for module in (resident, schedule, arguments):
                inside.setattr(module, "capturing", lambda device: True)
            yield

    return capturing


def spec(n: int, mask: str | None = None) -> AttentionSpec:
    return AttentionSpec(1, 2, 2, n, n, 64, 64, "bfloat16", "sm_90", 0.125, causal=mask is None, mask=mask)


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_graph_reads_outlives_its_cache(captured: bool, capture: Capture) -> None:
    lists = schedule.of_band(spec(1001), 128, 128, 13, CPU)
    alive = weakref.ref(lists)
    with capture() if captured else nullcontext():
        assert schedule.of_band(spec(1001), 128, 128, 13, CPU) is lists
    del lists
    for n in range(1002, 1002 + 256):
        schedule.of_band(spec(n), 128, 128, 13, CPU)
    gc.collect()
    assert (alive() is not None) == captured


def test_nothing_is_fetched_from_the_host_during_a_capture(capture: Capture) -> None:
    with capture():
        with pytest.raises(RuntimeError, match=r"schedule is not on cpu yet.*once before the capture"):
            schedule.of_band(spec(2001), 128, 128, 13, CPU)
        with pytest.raises(RuntimeError, match="tile map is not on cpu yet"):
            tile_map(Causal() & BigBird(64, 3, 1, 2, 77), 500, 500)
    assert schedule.of_band(spec(2001), 128, 128, 13, CPU).numel() > 0


def test_a_queue_that_a_capture_makes_is_not_found_by_later_calls(capture: Capture) -> None:
    tiles = to_tensors(compiled(Causal(), 1000, 1000), "cpu")
    with capture():
        first = schedule.of_tile_map(tiles, spec(1000, "causal()"), 128)
    again = schedule.of_tile_map(tiles, spec(1000, "causal()"), 128)
    assert again[1] is not first[1]
    assert torch.equal(again[1], first[1])
    assert schedule.of_tile_map(tiles, spec(1000, "causal()"), 128)[1] is again[1]


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waited = number, []

    def record_event(self) -> str:
        return f"event of {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.waited.append(event)


def test_another_stream_waits_for_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, device = Stream(1), Stream(2), torch.device("cuda", 0)
    monkeypatch.setattr(resident, "_MADE", {})
    monkeypatch.setattr(resident, "capturing", lambda device: False)
    for stream, other in ((first, second), (second, first)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        resident.made(0, device)
        resident.used(0, device)
        assert resident.used("it", torch.device("cuda", 1)) == "it"
        assert other.waited == []
    assert first.waited == []
    assert second.waited == ["event of 1"]


def test_offsets_under_a_mask_are_a_copy_in_a_graph() -> None:
    """A graph's replays may find other values there, and maps are cached by a tensor's identity."""
    q, offset = torch.zeros(1, 1, 4, 8), torch.zeros(1, dtype=torch.int32)
    plain = arguments.Arguments(
        q, q, q, None, None, None, None, offset, None, None, None, [], "causal()", False, None, None, None, 4, 4, None,
        None, 0.0, False, False, False, "tiled",
    )  # fmt: skip
    assert plain.operands().q_offset is offset
    assert plain._replace(mask=None, traced=True).operands().q_offset is offset
    found = plain._replace(traced=True).operands().q_offset
    assert found is not None
    assert found.data_ptr() != offset.data_ptr()
