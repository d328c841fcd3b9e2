"""The elementary masks that are formulas of positions; those that are sets of tokens, blocks or bits are in sets.py.

Each class states its set of pairs (i, j) with `p` the position of row i among the keys (algebra.py) and evaluates it in
`allow`, in operators that NumPy and PyTorch share.
"""

from __future__ import annotations

import operator
from functools import cached_property
from typing import Any

import numpy as np

from tilewise.errors import bad_type, bad_value
from tilewise.masks.algebra import Mask
from tilewise.masks.arrays import Held, is_tensor
from tilewise.masks.frame import Grid

LONGEST = 2**31
"""Sizes and positions stay below this: kernels index with 32 bits."""


def integer(value: Any, argument: str, least: int | None = None, fix: str | None = None) -> int:
    """`value` as an int of at least `least`; TypeError for what is no integer, booleans included."""
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__") or is_tensor(value):
        raise bad_type(argument, value, "an int")
    number = operator.index(value)
    if least is not None and number < least:
        raise bad_value(argument, number, f"at least {least}", fix)
    if abs(number) >= LONGEST:
        raise bad_value(argument, number, "below 2³¹")
    return number


def placeholder(held: Held, arrays: list[Held]) -> str:
    """How an array stands in an expression; appended to `arrays` if it is not among them yet."""
    for k, seen in enumerate(arrays):
        if seen is held:
            return f"${k}"
    arrays.append(held)
    return f"${len(arrays) - 1}"


class Pattern(Mask):
    """An elementary mask: a name and parameters."""

    name: str

    def _parameters(self, arrays: list[Held]) -> list[str]:
        """The arguments of the expression, in the constructor's order."""
        del arrays
        return []

    def _write(self, arrays: list[Held]) -> str:
        return f"{self.name}({', '.join(self._parameters(arrays))})"

    @property
    def _meaning(self) -> object:
        return self.name, *sorted((key, value) for key, value in self.__dict__.items() if not key.startswith("_"))


class Diagonal(Pattern):
    """A pattern of the distance alone: `low ≤ j − p ≤ high` and `(p − j) mod step = 0`; None is unlimited."""

    step: int = 1

    def bounds(self, b: int) -> tuple[int | None, int | None]:
        """(low, high) for sequence b."""
        raise NotImplementedError


class Causal(Diagonal):
    """`j ≤ p + offset`. `offset` is an int, or integers [B]: one a sequence."""

    name = "causal"
    offset: int | Held

    def __init__(self, offset: Any = 0) -> None:
        if hasattr(offset, "__index__") and getattr(offset, "ndim", 0) == 0 and not is_tensor(offset):
            self._set(offset=integer(offset, "offset"))
        else:
            held = Held.integers(offset, "offset", (1,))
            self._set(offset=held, batch=held.shape[0])

    def allow(self, grid: Grid) -> Any:
        offset = self.offset if isinstance(self.offset, int) else grid.lift(self.offset)[grid.b]
        return grid.j <= grid.p + offset

    def bounds(self, b: int) -> tuple[int | None, int | None]:
        return None, self.offset if isinstance(self.offset, int) else int(self.offset.host()[b])

    def _parameters(self, arrays: list[Held]) -> list[str]:
        if isinstance(self.offset, Held):
            return [placeholder(self.offset, arrays)]
        return [str(self.offset)] if self.offset else []


class Window(Diagonal):
    """`p − left ≤ j ≤ p + right`, both ends inclusive; None is unlimited on that side."""

    name = "window"
    left: int | None
    right: int | None

    def __init__(self, left: int | None, right: int | None) -> None:
        fix = "give sizes, not coordinates: `Window(256, 0)` is the row itself and the 256 keys before it"
        self._set(
            left=None if left is None else integer(left, "left", 0, fix),
            right=None if right is None else integer(right, "right", 0, fix),
        )

    def allow(self, grid: Grid) -> Any:
        distance = grid.j - grid.p
        everywhere = distance == distance
        if self.left is not None:
            everywhere = everywhere & (distance >= -self.left)
        return everywhere if self.right is None else everywhere & (distance <= self.right)

    def bounds(self, b: int) -> tuple[int | None, int | None]:
        del b
        return None if self.left is None else -self.left, self.right

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        return ["none" if side is None else str(side) for side in (self.left, self.right)]


class Dilated(Diagonal):
    """`|p − j| ≤ window·step` and `(p − j) mod step = 0`: `window` keys on each side, every `step`-th."""

    name = "dilated"
    window: int

    def __init__(self, window: int, step: int) -> None:
        self._set(window=integer(window, "window", 0), step=integer(step, "step", 1))
        integer(self.window * self.step, "window·step")

    def allow(self, grid: Grid) -> Any:
        distance = grid.p - grid.j
        return (abs(distance) <= self.window * self.step) & (distance % self.step == 0)

    def bounds(self, b: int) -> tuple[int | None, int | None]:
        del b
        return -self.window * self.step, self.window * self.step

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        return [str(self.window), str(self.step)]


class Strided(Diagonal):
    """`(p − j) mod step = 0`."""

    name = "strided"

    def __init__(self, step: int) -> None:
        self._set(step=integer(step, "step", 1))

    def allow(self, grid: Grid) -> Any:
        return (grid.p - grid.j) % self.step == 0

    def bounds(self, b: int) -> tuple[int | None, int | None]:
        del b
        return None, None

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        return [str(self.step)]


class Prefix(Pattern):
    """`j < n`: everyone sees the first n keys. A prefix language model is `Causal() | Prefix(n)`."""

    name = "prefix"
    n: int

    def __init__(self, n: int) -> None:
        self._set(n=integer(n, "n", 0))

    def allow(self, grid: Grid) -> Any:
        return (grid.j < self.n) & (grid.p == grid.p)

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        return [str(self.n)]


class Tree(Pattern):
    """A draft tree for speculative decoding: the last T query rows are its nodes, and each node sees the context, its
    ancestors and itself.

    `parents[t]` is the parent of node t, −1 for a root; a parent stands before its children. Node t is query row
    N − T + t and the key at that row's position; keys before node 0 are context, keys after the last node are unseen;
    rows before the tree are causal. A chain (`parents[t] = t − 1`) is `Causal()`.
    """

    name = "tree"
    parents: Held

    def __init__(self, parents: Any) -> None:
        held = Held.integers(parents, "parents", (1,))
        self._set(parents=held)
        if held.shape[0] == 0:
            raise bad_value("parents", "no nodes", "at least one")
        if held.on_device:
            raise bad_value("parents", f"a tensor on {held.device}", "host memory", "`parents.cpu()`")
        values = held.host()
        wrong = np.flatnonzero((values < -1) | (values >= np.arange(len(values))))
        if len(wrong):
            node = int(wrong[0])
            got = f"parents[{node}] = {values[node]}"
            want = f"−1 for a root, or an earlier node (0…{node - 1})" if node else "−1, since the first node is a root"
            raise bad_value("parents", got, want, "renumber depth-first")

    def check(self, n: int, m: int) -> None:
        size = self.parents.shape[0]
        if size > n or size > m:
            got = f"{size} nodes with {n} query rows and {m} keys"
            raise bad_value("parents", got, "at most as many nodes as either")

    @cached_property
    def _span(self) -> tuple[np.ndarray, np.ndarray]:
        """Depth-first entry and exit of each node: a is an ancestor of t, or t, iff enter[a] ≤ enter[t] < leave[a]."""
        parents = self.parents.host().tolist()
        size = [1] * len(parents)
        for t in range(len(parents) - 1, -1, -1):
            if parents[t] >= 0:
                size[parents[t]] += size[t]
        enter, next_free, next_root = [0] * len(parents), [0] * len(parents), 0
        for t, parent in enumerate(parents):
            if parent < 0:
                enter[t], next_root = next_root, next_root + size[t]
            else:
                enter[t] = next_free[parent]
                next_free[parent] += size[t]
            next_free[t] = enter[t] + 1
        start = np.array(enter, dtype=np.int64)
        return start, start + np.array(size, dtype=np.int64)

    def allow(self, grid: Grid) -> Any:
        enter, leave = (grid.lift(array) for array in self._span)
        last = self.parents.shape[0] - 1
        node = grid.i - (grid.frame.n - 1 - last)
        key = grid.j - (grid.p - node)
        row = enter[node.clip(0, last)]
        at = key.clip(0, last)
        ancestor = (enter[at] <= row) & (row < leave[at]) & (key <= last)
        return ((node >= 0) & ((key < 0) | ancestor)) | ((node < 0) & (grid.j <= grid.p))

    def _parameters(self, arrays: list[Held]) -> list[str]:
        return [placeholder(self.parents, arrays)]
