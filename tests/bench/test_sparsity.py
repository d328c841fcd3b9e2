"""The sparsity table at a tiny size: every method agrees, and the numbers are there."""

from __future__ import annotations

import torch

from tilewise.bench.sparsity import BLOCK, METHODS, measure, pattern_of, table


def test_pattern_is_one_pattern() -> None:
    pattern = pattern_of(8 * BLOCK, 0.75)
    assert pattern.blocks.shape == (8, 2)
    rebuilt = torch.zeros(8, 8, dtype=torch.bool).scatter_(1, pattern.blocks, value=True)
    assert torch.equal(rebuilt.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1), pattern.dense)


def test_table_has_every_method_and_sparsity() -> None:
    rows = measure(4 * BLOCK, 1, 8, seconds=0.0, sparsities=[0.5])
    assert [(row.sparsity, row.method) for row in rows] == [(0.5, method) for method in METHODS]
    assert all(row.forward > 0 and row.both > 0 and row.peak_bytes >= 0 for row in rows)
    assert len(table(rows).splitlines()) == 2 + len(rows)
