from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks import CASES, sample, timed_cell, wrong

from tilewise.bench.regression import TOLERANCE, compare_runs
from tilewise.bench.results import Cell, PeerResult

CASE = CASES[0]


def cell(speed: float, scatter: float = 0.005) -> Cell:
    return timed_cell(CASE, "forward", speed=speed, scatter=scatter)


def test_the_same_run_has_not_changed() -> None:
    changes = compare_runs(sample(), sample())
    assert len(changes.changes) == len(sample().cells)
    assert all(change.relative == 0 for change in changes.changes)
    assert changes.passed
    assert not changes.left_out


@pytest.mark.parametrize(
    ("now", "scatter", "regressed"),
    [
        (1.10, 0.005, True),
        (1.17, 0.005, False),  # beyond the spread, but within the tolerance
        (1.10, 0.03, False),  # beyond the tolerance, but within the spread
        (0.60, 0.03, True),
        (1.50, 0.005, False),
    ],
)
def test_a_fall_counts_beyond_spread_and_tolerance(now: float, scatter: float, regressed: bool) -> None:
    changes = compare_runs(sample(cell(now, scatter)), sample(cell(1.2, scatter)))
    (change,) = changes.changes
    assert change.relative == pytest.approx(now / 1.2 - 1)
    assert change.regressed is regressed
    assert changes.passed is not regressed
    assert 0 < TOLERANCE < 0.05


def test_ranges_hold_both_sides_scatter() -> None:
    (change,) = compare_runs(sample(cell(1.2, 0.1)), sample(cell(1.2, 0.1))).changes
    assert change.now_range == pytest.approx((1.2 * 0.9 / 1.1, 1.2 * 1.1 / 0.9))


def test_only_peers_of_both_runs_count() -> None:
    """A faster peer that stood in one of the runs alone would make every ratio fall."""
    before = cell(1.2)
    newcomer = PeerResult(ms=0.01, spread=(0.01, 0.01), tflops=9999.0)
    now = replace(before, peers={**before.peers, "flex": newcomer}, best_peer="flex", ratio=0.01)
    (change,) = compare_runs(sample(now), sample(before)).changes
    assert change.relative == 0


def test_a_slower_machine_is_no_regression() -> None:
    def slower(one: Cell) -> Cell:
        def twice(peer: PeerResult) -> PeerResult:
            if peer.ms is None or peer.spread is None:
                return peer
            return replace(peer, ms=2 * peer.ms, spread=(2 * peer.spread[0], 2 * peer.spread[1]))

        assert one.ms is not None
        assert one.spread is not None
        peers = {name: twice(peer) for name, peer in one.peers.items()}
        return replace(one, ms=2 * one.ms, spread=(2 * one.spread[0], 2 * one.spread[1]), peers=peers)

    (change,) = compare_runs(sample(slower(cell(1.2))), sample(cell(1.2))).changes
    assert change.relative == pytest.approx(0)


def test_what_cannot_be_compared_is_said() -> None:
    known = cell(1.2)
    alone = replace(known, backend="triton", peers={"math": PeerResult(absent="too large")})
    now = sample(known, wrong(timed_cell(CASE, "backward")), timed_cell(CASES[1], "forward"), alone)
    then = sample(known, timed_cell(CASE, "backward"), alone)
    changes = compare_runs(now, then)
    assert [change.cell for change in changes.changes] == [now.cells[0]]
    assert sorted(changes.left_out.values()) == [
        "no peer was timed in both runs",
        "no time in the new run",
        "not in the earlier run",
    ]
