"""What is timed in CUDA graphs: how much is read, what a row says of the roofs, and on a GPU the rows themselves."""

from __future__ import annotations

import pytest
import torch

from tilewise.bench import decoding, subquadratic
from tilewise.bench.calibrate import MachineRates
from tilewise.bench.captured import capture, in_graphs, sets_beyond_cache
from tilewise.bench.timer import L2_FLUSH_BYTES, Timing


def test_sets_of_inputs_fill_more_than_the_cache() -> None:
    for size in (1, 1 << 20, L2_FLUSH_BYTES - 1, L2_FLUSH_BYTES, 1 << 40):
        assert sets_beyond_cache(size) * size >= L2_FLUSH_BYTES
        assert (sets_beyond_cache(size) - 1) * size < L2_FLUSH_BYTES


def test_shares_of_both_roofs() -> None:
    row = decoding.Found(1, 1, "dense", "triton", Timing(2.0, 1.0, 3.0, 5), flops=4e9, read=6e9, error=0.0)
    assert decoding.shares(row, MachineRates(matmul=8e12, copy=4e12)) == pytest.approx((0.25, 0.75))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [decoding, subquadratic])
def test_without_a_gpu_they_say_so(module: object) -> None:
    with pytest.raises(SystemExit, match="GPU"):
        module.main()  # type: ignore[attr-defined]


@pytest.mark.gpu
def test_a_graph_of_calls_is_timed_by_the_call() -> None:
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device)
    found = in_graphs({"one": [lambda: x @ x], "three": [lambda: x @ x] * 3}, device, rounds=2)
    assert found["three"].median == pytest.approx(found["one"].median, rel=0.5)
    counter = torch.zeros((), device=device)
    graph = capture([lambda: counter.add_(1), lambda: counter.add_(1)])
    counter.zero_()
    graph.replay()
    assert counter.item() == 2


@pytest.mark.gpu
def test_every_row_of_decoding_is_right() -> None:
    device = torch.device("cuda")
    rows = [*decoding.grouped_query(1, 1024, device), *decoding.latent(2, 1024, device)]
    assert {row.name for row in rows} >= {"cudnn", "dense", "pages of 64", "latent", "latent, pages of 64"}
    assert all(row.error < 5e-3 and row.timing.median > 0 for row in rows)


@pytest.mark.gpu
def test_a_backward_is_captured_on_its_forwards_stream() -> None:
    rows = {row.name: row for row in subquadratic.linear_family(512, torch.device("cuda"))}
    assert "gates a channel (GLA)" in rows
    assert all(row.forward > 0 and row.backward > 0 for row in rows.values())
