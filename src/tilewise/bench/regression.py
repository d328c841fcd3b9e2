"""`bench --against`: which cells lost ground to their peers since an earlier run, beyond what both runs scatter.

Machines differ from hour to hour, so what is compared is the ratio to the fastest peer, not the time. A ratio is known
as well as its two times are: it lies between the peer's fastest round over our slowest and the peer's slowest round
over our fastest. A cell has regressed when the whole range of the new ratio lies below the whole range of the old one
and the ratio itself fell by more than `TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tilewise.bench.results import Cell, Results, Spread

TOLERANCE = 0.03
"""What a ratio may fall in any case: five rounds see less than the whole scatter of a machine."""


@dataclass(frozen=True)
class Change:
    """One cell then and now, against the peers that both runs timed. Ratios above 1 are faster than the fastest."""

    cell: Cell
    then: float
    then_range: Spread
    now: float
    now_range: Spread

    @property
    def relative(self) -> float:
        """−0.1 for a ratio that fell by a tenth."""
        return self.now / self.then - 1

    @property
    def regressed(self) -> bool:
        return self.now_range[1] < self.then_range[0] and self.relative < -TOLERANCE


@dataclass(frozen=True)
class Changes:
    """Every cell that both runs timed, and why each other cell of the new run has nothing to be compared with."""

    changes: tuple[Change, ...]
    left_out: dict[str, str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regressed]

    @property
    def passed(self) -> bool:
        return not self.regressions


def compare_runs(now: Results, then: Results) -> Changes:
    """`now` against the earlier `then`, cell by cell."""
    earlier = then.by_key()
    changes: list[Change] = []
    left_out: dict[str, str] = {}
    for cell in now.cells:
        before = earlier.get(cell.key)
        name = f"{cell.case}, {cell.which}, {cell.backend}"
        if before is None:
            left_out[name] = "not in the earlier run"
        elif cell.ms is None or before.ms is None:
            left_out[name] = f"no time in the {'new' if cell.ms is None else 'earlier'} run"
        elif common := _timed_peers(cell, before):
            changes.append(Change(cell, *_ratio(before, common), *_ratio(cell, common)))
        else:
            left_out[name] = "no peer was timed in both runs"
    return Changes(tuple(changes), left_out)


def _timed_peers(a: Cell, b: Cell) -> list[str]:
    return [
        name
        for name, peer in a.peers.items()
        if peer.ms is not None and name in b.peers and b.peers[name].ms is not None
    ]


def _ratio(cell: Cell, peers: Sequence[str]) -> tuple[float, Spread]:
    """The ratio to the fastest of `peers`, and its range."""
    best = cell.peers[min(peers, key=lambda name: cell.peers[name].ms or 0.0)]
    if cell.ms is None or cell.spread is None or best.ms is None or best.spread is None:
        raise ValueError(f"{cell.key} holds no time")
    return best.ms / cell.ms, (best.spread[0] / cell.spread[1], best.spread[1] / cell.spread[0])
