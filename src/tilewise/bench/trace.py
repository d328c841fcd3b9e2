"""What the tiled references do, step by step: the frames of an animation, taken from their own counters.

Nothing is recomputed here: a `Chip` that watches is handed to `reference.flash_v1` or `flash_v2`, and every frame holds
the tiles that the loop itself had on chip.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tilewise.reference.counters import Chip, Counters
from tilewise.reference.flash import flash_v1, flash_v2

LOOPS = {"v1": flash_v1, "v2": flash_v2}


@dataclass(frozen=True, slots=True)
class Frame:
    """The state after one visited tile."""

    row_tile: int
    col_tile: int
    scores: tuple[tuple[float | None, ...], ...]
    """The tile of S; None where a score is forbidden (−∞)."""
    m: tuple[float | None, ...]
    """Running maximum of each row of the tile."""
    l: tuple[float, ...]
    acc: tuple[tuple[float, ...], ...]
    """The accumulator: not yet divided by l in v2, and in v1 on its way to be."""
    bytes_read: int
    bytes_written: int
    rescalings: int
    divisions: int
    on_chip_bytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """One run of one loop order."""

    version: str
    n: int
    m: int
    block_m: int
    block_n: int
    frames: tuple[Frame, ...]
    skipped: tuple[tuple[int, int], ...]
    """Tiles that causality left out."""
    total: Counters

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


class _Watching(Chip):
    """Counts as `Chip` does, and keeps what is on chip at every step of batch 0, head 0."""

    def __init__(self, dtype: torch.dtype, q_tiles: int, k_tiles: int, *, columns_outside: bool) -> None:
        super().__init__(dtype, programs=1)
        self.frames: list[Frame] = []
        self.skipped: list[tuple[int, int]] = []
        self._q_tiles, self._k_tiles, self._columns_outside = q_tiles, k_tiles, columns_outside

    def _place(self) -> tuple[int, int]:
        step = len(self.frames) + len(self.skipped)
        if self._columns_outside:
            column, row = divmod(step, self._q_tiles)
            return row, column
        return divmod(step, self._k_tiles)

    def hold(
        self, operands: tuple[Tensor, ...], accumulators: tuple[Tensor, ...], statistics: tuple[Tensor, ...]
    ) -> None:
        super().hold(operands, accumulators, statistics)
        s, _, acc = (_first(x) for x in accumulators)
        m, l = (_first(x) for x in statistics)
        row, column = self._place()
        counted = self.counters
        self.frames.append(
            Frame(
                row,
                column,
                tuple(tuple(_finite(x) for x in line) for line in s.tolist()),
                tuple(_finite(x) for x in m.tolist()),
                tuple(l.tolist()),
                tuple(tuple(line) for line in acc.tolist()),
                counted.bytes_read,
                counted.bytes_written,
                counted.rescalings + 1,
                counted.divisions + self._columns_outside,
                counted.on_chip_bytes,
            )
        )

    def skip(self) -> None:
        super().skip()
        self.skipped.append(self._place())


def _first(x: Tensor) -> Tensor:
    return x[0, 0]


def _finite(x: float) -> float | None:
    return None if x in (float("inf"), float("-inf")) else x


def trace_flash(q: Tensor, k: Tensor, v: Tensor, version: str = "v2", *, causal: bool = False, block: int = 4) -> Trace:
    """Runs one loop order over q [1, 1, N, D], k and v [1, 1, M, D] and keeps every step.

    Raises ValueError for an unknown version.
    """
    if version not in LOOPS:
        from tilewise.errors import bad_value

        raise bad_value("version", repr(version), f"one of {', '.join(LOOPS)}")
    n, m = q.shape[-2], k.shape[-2]
    chip = _Watching(q.dtype, -(-n // block), -(-m // block), columns_outside=version == "v1")
    _, counters = LOOPS[version](q, k, v, causal=causal, block_m=block, block_n=block, chip=chip)
    frames = chip.frames if version == "v1" else _with_rows_written(chip.frames, counters)
    return Trace(version, n, m, block, block, tuple(frames), tuple(chip.skipped), counters)


def _with_rows_written(frames: list[Frame], total: Counters) -> list[Frame]:
    """v2's frames with what follows a row's last tile: the division, and O and lse on their way to memory.

    A frame is taken before that; what was written by the time of the next one was written after this one.
    """
    after = [(frame.bytes_written, frame.divisions) for frame in frames[1:]]
    after.append((total.bytes_written, total.divisions))
    return [
        replace(frame, bytes_written=written, divisions=divisions)
        for frame, (written, divisions) in zip(frames, after, strict=False)  # without frames there is still the total
    ]
