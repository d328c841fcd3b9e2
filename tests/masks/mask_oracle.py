"""Masks and, beside each, the same set of pairs written down plainly: a boolean torch tensor [B, H, N, M].

Nothing here calls the predicates under test. A case is a mask with a function of the problem that answers for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tilewise import masks

SIZES = (1, 2, 63, 64, 65, 113, 127, 128, 129, 255, 256, 257, 300, 513, 1000)


class Problem(NamedTuple):
    n: int
    m: int
    offset: tuple[int, ...]
    heads: int

    @property
    def batch(self) -> int:
        return len(self.offset)

    def grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """i [1, 1, N, 1], p [B, 1, N, 1] and j [1, 1, 1, M]."""
        i = torch.arange(self.n).view(1, 1, -1, 1)
        return i, i + torch.tensor(self.offset).view(-1, 1, 1, 1), torch.arange(self.m).view(1, 1, 1, -1)

    def full(self, allowed: Tensor) -> Tensor:
        return allowed.expand(self.batch, self.heads, self.n, self.m)


Answer = Callable[[Problem], Tensor]


class Case(NamedTuple):
    mask: masks.Mask
    answer: Answer


_U64 = (1 << 64) - 1


def splitmix(x: int) -> int:
    x &= _U64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _U64
    return x ^ (x >> 31)


def drawn(seed: int, row: int, head: int, count: int, size: int) -> set[int]:
    """Floyd's sample of `count` out of range(size), from the documented hash, with Python's integers and a set."""
    golden = 0x9E3779B97F4A7C15
    state = splitmix(splitmix((row & _U64) ^ splitmix(seed + golden)) ^ head)
    chosen: set[int] = set()
    count = min(count, size)
    for k in range(count):
        top = size - count + k
        value = ((splitmix(state + (k + 1) * golden) >> 33) * (top + 1)) >> 31
        chosen.add(top if value in chosen else value)
    return chosen


def causal(offset: int | list[int]) -> Case:
    def answer(problem: Problem) -> Tensor:
        _, p, j = problem.grid()
        return problem.full(j <= p + torch.tensor(offset).view(-1, 1, 1, 1))

    return Case(masks.Causal(offset), answer)


def window(left: int | None, right: int | None) -> Case:
    def answer(problem: Problem) -> Tensor:
        _, p, j = problem.grid()
        low = torch.full_like(p, -(10**9)) if left is None else p - left
        high = torch.full_like(p, 10**9) if right is None else p + right
        return problem.full((j >= low).logical_and(j <= high))

    return Case(masks.Window(left, right), answer)


def dilated(size: int, step: int) -> Case:
    def answer(problem: Problem) -> Tensor:
        _, p, j = problem.grid()
        hit = torch.zeros(problem.batch, 1, problem.n, problem.m, dtype=torch.bool)
        for k in range(-size, size + 1):
            hit |= j == p + k * step
        return problem.full(hit)

    return Case(masks.Dilated(size, step), answer)


def strided(step: int) -> Case:
    def answer(problem: Problem) -> Tensor:
        _, p, j = problem.grid()
        return problem.full(torch.remainder(p, step) == torch.remainder(j, step))

    return Case(masks.Strided(step), answer)


def global_(tokens: list[int]) -> Case:
    def answer(problem: Problem) -> Tensor:
        _, p, j = problem.grid()
        wanted = torch.tensor(tokens)
        return problem.full(torch.isin(p, wanted).logical_or(torch.isin(j, wanted)))

    return Case(masks.Global(tokens), answer)


def prefix(count: int) -> Case:
    def answer(problem: Problem) -> Tensor:
        allowed = torch.zeros(1, 1, problem.n, problem.m, dtype=torch.bool)
        allowed[..., :count] = True
        return problem.full(allowed)

    return Case(masks.Prefix(count), answer)


def random_blocks(blocks: int, block: int, seed: int, per_head: bool) -> Case:
    def answer(problem: Problem) -> Tensor:
        allowed = torch.zeros(problem.batch, problem.heads, problem.n, problem.m, dtype=torch.bool)
        columns = -(-problem.m // block)
        for b, offset in enumerate(problem.offset):
            for h in range(problem.heads):
                for row in range(offset // block, (offset + problem.n - 1) // block + 1):
                    first, stop = max(0, row * block - offset), min(problem.n, (row + 1) * block - offset)
                    for c in drawn(seed, row, h if per_head else 0, blocks, columns):
                        allowed[b, h, first:stop, c * block : (c + 1) * block] = True
        return allowed

    return Case(masks.Random(blocks, block, seed, per_head), answer)


def random_tokens(count: int, seed: int, per_head: bool) -> Case:
    def answer(problem: Problem) -> Tensor:
        allowed = torch.zeros(problem.batch, problem.heads, problem.n, problem.m, dtype=torch.bool)
        for b, offset in enumerate(problem.offset):
            for h in range(problem.heads):
                for i in range(problem.n):
                    keys = drawn(seed, i + offset, h if per_head else 0, count, problem.m)
                    allowed[b, h, i, list(keys)] = True
        return allowed

    return Case(masks.RandomTokens(count, seed, per_head), answer)


def documents(q_ids: np.ndarray, k_ids: np.ndarray | None) -> Case:
    def answer(problem: Problem) -> Tensor:
        rows = torch.from_numpy(q_ids).view(-1, 1, q_ids.shape[-1], 1)
        columns = rows.transpose(2, 3) if k_ids is None else torch.from_numpy(k_ids).view(-1, 1, 1, k_ids.shape[-1])
        return problem.full(rows == columns)

    return Case(masks.Documents(q_ids, k_ids), answer)


def tree(parents: list[int]) -> Case:
    def answer(problem: Problem) -> Tensor:
        size = len(parents)
        sees = torch.zeros(size, size, dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                sees[node] = sees[parent]
            sees[node, node] = True
        allowed = torch.zeros(problem.batch, 1, problem.n, problem.m, dtype=torch.bool)
        for b, offset in enumerate(problem.offset):
            for i in range(problem.n):
                node = i - (problem.n - size)
                context = i + offset + 1 if node < 0 else i + offset - node
                allowed[b, 0, i, : max(0, context)] = True
                for other in range(size) if node >= 0 else ():
                    key = context + other
                    if 0 <= key < problem.m and sees[node, other]:
                        allowed[b, 0, i, key] = True
        return problem.full(allowed)

    return Case(masks.Tree(parents), answer)


def dense(content: np.ndarray) -> Case:
    return Case(masks.Dense(content), lambda problem: problem.full(torch.from_numpy(content)))


def both(a: Case, b: Case) -> Case:
    return Case(a.mask & b.mask, lambda problem: a.answer(problem).logical_and(b.answer(problem)))


def either(a: Case, b: Case) -> Case:
    return Case(a.mask | b.mask, lambda problem: a.answer(problem).logical_or(b.answer(problem)))


def neither(a: Case) -> Case:
    return Case(~a.mask, lambda problem: a.answer(problem).logical_not())


def per_head(cases: list[Case]) -> Case:
    def answer(problem: Problem) -> Tensor:
        return torch.stack([case.answer(problem)[:, h] for h, case in enumerate(cases)], dim=1)

    return Case(masks.PerHead([case.mask for case in cases]), answer)


LEAVES = (
    "causal",
    "window",
    "dilated",
    "strided",
    "global",
    "prefix",
    "random",
    "random_tokens",
    "documents",
    "documents_sorted",
    "tree",
    "dense",
)


def leaf(kind: str, rng: random.Random, problem: Problem, headed: bool) -> Case:
    """A random mask of one kind that fits the problem; `headed` allows a mask that names heads."""
    n, m = problem.n, problem.m
    numbers = np.random.default_rng(rng.randrange(1 << 30))
    many = problem.batch > 1 and rng.random() < 0.5
    match kind:
        case "causal":
            offset = rng.randint(-m, m)
            return causal([rng.randint(-m, m) for _ in range(problem.batch)] if many else offset)
        case "window":
            return window(*(rng.choice([None, 0, 1, rng.randint(0, m), 128]) for _ in range(2)))
        case "dilated":
            return dilated(rng.randint(0, 40), rng.choice([1, 2, 3, 8, 64, 127, 128, 130]))
        case "strided":
            return strided(rng.choice([1, 2, 7, 64, 128, 129, 2000]))
        case "global":
            run = rng.randrange(m)
            tokens = [rng.randrange(m) for _ in range(rng.randint(1, 4))]
            return global_(tokens + list(range(run, min(m, run + rng.choice([0, 5, 200])))))
        case "prefix":
            return prefix(rng.randint(0, m + 10))
        case "random":
            block = rng.choice([1, 5, 16, 33, 64, 100, 128, 200, 256])
            return random_blocks(rng.randint(0, 3), block, rng.randint(-5, 5), rng.random() < 0.5)
        case "random_tokens":
            return random_tokens(rng.randint(0, 5), rng.randint(0, 9), rng.random() < 0.5)
        case "documents":
            shape = (problem.batch, n) if many else (n,)
            few = rng.choice([1, 2, 3, 50])
            k_ids = numbers.integers(-1, few, (*shape[:-1], m))
            same = n == m and rng.random() < 0.5
            return documents(numbers.integers(-1, few, shape), None if same else k_ids)
        case "documents_sorted":
            shape = (problem.batch, n) if many else (n,)
            few = rng.choice([1, 2, 5, 20])
            q_ids, k_ids = (np.sort(numbers.integers(0, few, size)) for size in (shape, (m,)))
            return documents(q_ids, k_ids)
        case "tree":
            size = rng.randint(1, min(n, m, 200))
            return tree([-1 if t == 0 else rng.randint(max(-1, t - 5), t - 1) for t in range(size)])
        case _:
            shape = (
                problem.batch if many else 1,
                problem.heads if headed and rng.random() < 0.5 else 1,
                rng.choice([1, n]),
                rng.choice([1, m, m]),
            )
            content = numbers.random(shape) < rng.choice([0.02, 0.5, 0.98])
            if rng.random() < 0.5:
                content[..., m // 3 :] = rng.random() < 0.5
            return dense(content)


def expression(rng: random.Random, problem: Problem, depth: int, headed: bool = True) -> Case:
    """A random expression: leaves joined by &, |, ~ and, at most once on a path, PerHead."""
    roll = rng.random()
    if depth == 0 or roll < 0.2:
        return leaf(rng.choice(LEAVES), rng, problem, headed)
    if headed and roll < 0.3 and problem.heads > 1:
        return per_head([expression(rng, problem, depth - 1, False) for _ in range(problem.heads)])
    if roll < 0.45:
        return neither(expression(rng, problem, depth - 1, headed))
    join = both if roll < 0.75 else either
    return join(expression(rng, problem, depth - 1, headed), expression(rng, problem, depth - 1, headed))


def problem_of(rng: random.Random) -> Problem:
    """Random sizes, N ≠ M, any alignment, one sequence and head or a few."""
    n, m = rng.choice(SIZES), rng.choice(SIZES)
    batch = rng.choice([1, 1, 1, 2, 3])
    offsets = [rng.choice([m - n, 0, rng.randint(-m, m), rng.randint(-300, 300)])] * batch
    if batch > 1 and rng.random() < 0.6:
        offsets = [rng.randint(-200, m) for _ in range(batch)]
    return Problem(n, m, tuple(offsets), rng.choice([1, 1, 2, 3]))
