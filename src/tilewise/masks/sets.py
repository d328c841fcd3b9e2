"""The elementary masks that are sets of tokens, blocks, documents or bits, and the two famous combinations.

As in patterns.py: each class states its pairs, and `allow` evaluates them with NumPy and PyTorch alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from tilewise.errors import bad_value
from tilewise.masks.algebra import Mask
from tilewise.masks.arrays import Held
from tilewise.masks.frame import Grid, joint
from tilewise.masks.patterns import Pattern, Window, integer, placeholder
from tilewise.masks.sampling import draw_distinct


class Global(Pattern):
    """`p ∈ tokens` or `j ∈ tokens`: tokens, in key coordinates, that see and are seen by all. Longformer's global."""

    name = "global"
    tokens: tuple[int, ...]

    def __init__(self, tokens: int | Iterable[int]) -> None:
        listed = tokens if isinstance(tokens, Iterable) else [tokens]
        self._set(tokens=tuple(sorted({integer(token, "tokens", 0) for token in listed})))
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
            blocks=integer(blocks, "blocks", 0),
            block=integer(block, "block", 1),
            seed=integer(seed, "seed"),
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
        self._set(n=integer(n, "n", 0), seed=integer(seed, "seed"), per_head=bool(per_head), by_head=bool(per_head))

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
    if integer(window, "window", 0) % 2:
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
    integer(block, "block", 1)
    half = block * integer(window_blocks, "window_blocks", 0) // 2
    mask: Mask = Window(half, half)
    if integer(global_blocks, "global_blocks", 0):
        mask = mask | Global(range(global_blocks * block))
    return mask | Random(random_blocks, block, seed) if integer(random_blocks, "random_blocks", 0) else mask
