"""The elementary masks, and the two famous combinations of them.

Each class states its set of pairs (i, j) with `p` the position of row i among the keys (algebra.py) and evaluates it in
`allow`, in operators that NumPy and PyTorch share.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from tilewise.errors import bad_type, bad_value
from tilewise.masks.algebra import Mask
from tilewise.masks.arrays import Held, is_tensor
from tilewise.masks.frame import Grid, joint
from tilewise.masks.sampling import draw_distinct

LONGEST = 2**31
"""Sizes and positions stay below this: kernels index with 32 bits."""


def _integer(value: Any, argument: str, least: int | None = None, fix: str | None = None) -> int:
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
            self._set(offset=_integer(offset, "offset"))
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
            left=None if left is None else _integer(left, "left", 0, fix),
            right=None if right is None else _integer(right, "right", 0, fix),
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
        self._set(window=_integer(window, "window", 0), step=_integer(step, "step", 1))
        _integer(self.window * self.step, "window·step")

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
        self._set(step=_integer(step, "step", 1))

    def allow(self, grid: Grid) -> Any:
        return (grid.p - grid.j) % self.step == 0

    def bounds(self, b: int) -> tuple[int | None, int | None]:
        del b
        return None, None

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        return [str(self.step)]


class Global(Pattern):
    """`p ∈ tokens` or `j ∈ tokens`: tokens, in key coordinates, that see and are seen by all. Longformer's global."""

    name = "global"
    tokens: tuple[int, ...]

    def __init__(self, tokens: int | Iterable[int]) -> None:
        listed = tokens if isinstance(tokens, Iterable) else [tokens]
        self._set(tokens=tuple(sorted({_integer(token, "tokens", 0) for token in listed})))
        if not self.tokens:
            raise bad_value("tokens", "no tokens", "at least one")

    def check(self, n: int, m: int) -> None:
        if self.tokens[-1] >= m:
            raise bad_value("tokens", f"token {self.tokens[-1]} with {m} keys", f"tokens of 0…{m - 1}")

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.array(self.tokens, dtype=np.int64)

    def allow(self, grid: Grid) -> Any:
        tokens = grid.lift(self._sorted)

        def member(x: Any) -> Any:
            return tokens[grid.xp.searchsorted(tokens, x).clip(max=len(self.tokens) - 1)] == x

        return member(grid.p) | member(grid.j)

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        runs: list[list[int]] = []
        for token in self.tokens:
            if runs and runs[-1][1] == token:
                runs[-1][1] = token + 1
            else:
                runs.append([token, token + 1])
        parts = [f"{a}:{stop}" if stop > a + 2 else ", ".join(map(str, range(a, stop))) for a, stop in runs]
        return [f"[{', '.join(parts)}]"]


class Random(Pattern):
    """For each block of query positions, `blocks` distinct random blocks of keys (all of them if there are no more).

    `⌊j / block⌋ ∈ draw(seed, head, ⌊p / block⌋)` with the draw out of the ⌈M / block⌉ key blocks: a pure function of
    (seed, head, ⌊p / block⌋, M), the same on any machine. `per_head=False` gives all heads one pattern. BigBird's
    random part (Zaheer et al. 2020).
    """

    name = "random"

    def __init__(self, blocks: int, block: int = 64, seed: int = 0, per_head: bool = True) -> None:
        self._set(
            blocks=_integer(blocks, "blocks", 0),
            block=_integer(block, "block", 1),
            seed=_integer(seed, "seed"),
            per_head=bool(per_head),
            by_head=bool(per_head),
        )

    blocks: int
    block: int
    seed: int
    per_head: bool

    def draw(self, xp: Any, row: Any, head: Any, m: int) -> list[Any]:
        """The chosen key blocks of block rows `row`: at most `blocks` arrays of row's shape."""
        return draw_distinct(xp, self.seed, row, head if self.per_head else 0, self.blocks, -(-m // self.block))

    def allow(self, grid: Grid) -> Any:
        column = grid.j // self.block
        allowed = (grid.p != grid.p) & (column != column)
        for chosen in self.draw(grid.xp, grid.p // self.block, grid.h, grid.frame.m):
            allowed = allowed | (chosen == column)
        return allowed

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        shared = [] if self.per_head else ["per_head=false"]
        return [str(self.blocks), f"block={self.block}", f"seed={self.seed}", *shared]


class RandomTokens(Pattern):
    """For each query, `n` distinct random keys (all if there are no more): a pure function of (seed, head, p, M)."""

    name = "random_tokens"

    def __init__(self, n: int, seed: int = 0, per_head: bool = True) -> None:
        self._set(n=_integer(n, "n", 0), seed=_integer(seed, "seed"), per_head=bool(per_head), by_head=bool(per_head))

    n: int
    seed: int
    per_head: bool

    def draw(self, xp: Any, row: Any, head: Any, m: int) -> list[Any]:
        """The chosen keys of positions `row`: at most n arrays of row's shape."""
        return draw_distinct(xp, self.seed, row, head if self.per_head else 0, self.n, m)

    def allow(self, grid: Grid) -> Any:
        allowed = (grid.p != grid.p) & (grid.j != grid.j)
        for chosen in self.draw(grid.xp, grid.p, grid.h, grid.frame.m):
            allowed = allowed | (chosen == grid.j)
        return allowed

    def _parameters(self, arrays: list[Held]) -> list[str]:
        del arrays
        return [str(self.n), f"seed={self.seed}", *([] if self.per_head else ["per_head=false"])]


class Documents(Pattern):
    """`q_ids[i] = k_ids[j]`: packed documents see only themselves. Ids are integers [N] or [B, N]; `k_ids=None` means
    the same ids for the keys, and then N = M."""

    name = "documents"
    q_ids: Held
    k_ids: Held

    def __init__(self, q_ids: Any, k_ids: Any = None) -> None:
        rows = Held.integers(q_ids, "q_ids", (1, 2))
        columns = rows if k_ids is None else Held.integers(k_ids, "k_ids", (1, 2))
        columns = rows if columns == rows else columns
        sizes = [held.shape[0] for held in (rows, columns) if len(held.shape) == 2]
        self._set(q_ids=rows, k_ids=columns, batch=joint("k_ids", sizes, "sequences"))

    def check(self, n: int, m: int) -> None:
        if self.q_ids.shape[-1] != n:
            raise bad_value("q_ids", f"{self.q_ids.shape[-1]} ids", f"one a query row: {n}")
        if self.k_ids.shape[-1] != m:
            fix = "give `k_ids`: without it keys have the ids of the rows" if self.k_ids is self.q_ids else None
            raise bad_value("k_ids", f"{self.k_ids.shape[-1]} ids", f"one a key: {m}", fix)

    def allow(self, grid: Grid) -> Any:
        def at(held: Held, index: Any, last: int) -> Any:
            ids, index = grid.lift(held), index.clip(0, last)
            if len(held.shape) == 1:
                return ids[index]
            return ids[grid.b if held.shape[0] > 1 else 0, index]

        return at(self.q_ids, grid.i, grid.frame.n - 1) == at(self.k_ids, grid.j, grid.frame.m - 1)

    def _parameters(self, arrays: list[Held]) -> list[str]:
        rows = placeholder(self.q_ids, arrays)
        return [rows] if self.k_ids is self.q_ids else [rows, placeholder(self.k_ids, arrays)]


class Prefix(Pattern):
    """`j < n`: everyone sees the first n keys. A prefix language model is `Causal() | Prefix(n)`."""

    name = "prefix"
    n: int

    def __init__(self, n: int) -> None:
        self._set(n=_integer(n, "n", 0))

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
            raise bad_value("parents", got, f"−1 for a root, or an earlier node (0…{node - 1})", "renumber depth-first")

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


class Dense(Pattern):
    """A boolean array or tensor that broadcasts to [B, H, N, M], True = attend.

    A torch tensor is looked at, not copied, and two `Dense` masks are equal when they look at the same memory at the
    same version (arrays.py); a NumPy array is copied.
    """

    name = "dense"
    content: Held

    def __init__(self, content: Any) -> None:
        held = Held.booleans(content, "content")
        if not 1 <= len(held.shape) <= 4:
            raise bad_value("content", f"shape {list(held.shape)}", "1 to 4 dimensions that broadcast to [B, H, N, M]")
        batch, heads = ((1, 1, 1, *held.shape)[-4:])[:2]
        self._set(content=held, batch=batch, heads=heads if heads != 1 else None)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[1|B, 1|H, 1|N, 1|M]."""
        b, h, n, m = (1, 1, 1, *self.content.shape)[-4:]
        return b, h, n, m

    def check(self, n: int, m: int) -> None:
        rows, columns = self.shape[2:]
        if rows not in (1, n) or columns not in (1, m):
            fix = "transpose the last two dimensions" if (columns, rows) == (n, m) else None
            raise bad_value("content", f"shape {list(self.content.shape)}", f"[…, 1|{n}, 1|{m}]", fix)

    def allow(self, grid: Grid) -> Any:
        b, h, n, m = self.shape
        content = grid.lift(self.content).reshape(b, h, n, m)
        i, j = (grid.i.clip(0, n - 1), grid.j.clip(0, m - 1))
        return content[grid.b if b > 1 else 0, grid.h if h > 1 else 0, i, j]

    def _parameters(self, arrays: list[Held]) -> list[str]:
        return [placeholder(self.content, arrays)]


def Longformer(window: int, global_tokens: int | Iterable[int]) -> Mask:  # noqa: N802 - named like the masks it makes
    """Longformer (Beltagy et al. 2020): a window of `window` keys, half on each side, and global tokens.

    `Window(window/2, window/2) | Global(global_tokens)`; `window` is even, as in the paper.
    """
    if _integer(window, "window", 0) % 2:
        raise bad_value("window", window, "an even number: half on each side")
    return Window(window // 2, window // 2) | Global(global_tokens)


def BigBird(  # noqa: N802 - named like the masks it makes
    block: int, window_blocks: int, global_blocks: int, random_blocks: int, seed: int = 0
) -> Mask:
    """BigBird (Zaheer et al. 2020): a window of `window_blocks` blocks, half on each side, the first `global_blocks`
    blocks global, and `random_blocks` random blocks for each block of queries and head. Block sizes in tokens.

    `Window(w, w) | Global(range(global_blocks·block)) | Random(random_blocks, block, seed)` with
    `w = block·window_blocks/2`.
    """
    _integer(block, "block", 1)
    half = block * _integer(window_blocks, "window_blocks", 0) // 2
    mask: Mask = Window(half, half)
    if _integer(global_blocks, "global_blocks", 0):
        mask = mask | Global(range(global_blocks * block))
    return mask | Random(random_blocks, block, seed) if _integer(random_blocks, "random_blocks", 0) else mask
