"""Where a mask stands: the sizes and positions of one problem, and the grids of pairs on which predicates are asked.

Notation: i a query row, j a key column, `p = i + offset` the position of the row among the keys. Predicates are written
with operators that NumPy arrays and torch tensors share, so that one formula serves both; the few functions that
differ come from `Grid.xp`, which is the numpy or the torch module. This file knows neither of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tilewise.errors import bad_value
from tilewise.masks.arrays import Held


@dataclass(frozen=True)
class Frame:
    """Sizes of one problem: n query rows, m keys, and as many batch entries and heads as the mask tells apart.

    `offset` is the position of query row 0 among the keys: an int, or one a sequence (integers [B]).
    """

    n: int
    m: int
    offset: int | Held
    batch: int = 1
    heads: int = 1

    def offset_of(self, b: int) -> int:
        """The offset of sequence b; waits for the device if the offsets lie there."""
        return self.offset if isinstance(self.offset, int) else int(self.offset.host()[b])


@dataclass(frozen=True)
class Grid:
    """Pairs (b, h, i, j) as broadcastable integer arrays of at least one dimension; b and h may be plain ints.

    `lift` turns a Held or a NumPy array into an array of the library that the grid is made of.
    """

    xp: Any
    lift: Callable[[Any], Any]
    frame: Frame
    b: Any
    h: Any
    i: Any
    j: Any

    @cached_property
    def p(self) -> Any:
        """Positions of the rows: `i + offset[b]`."""
        offset = self.frame.offset
        return self.i + (offset if isinstance(offset, int) else self.lift(offset)[self.b])


def default_offset(n: int, m: int) -> int:
    """Bottom-right alignment: the last row stands at the last key."""
    return m - n


def joint(argument: str, sizes: Sequence[int], what: str) -> int:
    """The one size that all of `sizes` broadcast to; ValueError if two differ and neither is 1."""
    wide = sorted({size for size in sizes if size != 1})
    if len(wide) > 1:
        raise bad_value(argument, f"parts for {' and '.join(map(str, wide))} {what}", f"one number of {what}")
    return wide[0] if wide else 1
