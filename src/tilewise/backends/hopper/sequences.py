"""The schedule of packed sequences, whose lengths only the device knows: longest sequence first.

One program a sequence counts the tiles of all sequences that come before its own (a longer one, or an equal one with a
smaller number) and writes its own tiles behind them, the last tile first. The first program also writes how many tiles
there are in all, and that none is taken.
"""

# Kernels are in Triton's language, which checks its own types when it compiles.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch", "tiles"], do_not_specialize_on_alignment=["cu_ptr"])
def order_sequences(
    cu_ptr, items_ptr, queue_ptr, batch: tl.int32, tiles: tl.int32, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """items [1 + pairs]: the number of pairs, then sequence·tiles + tile; and queue [1], from which none is taken."""
    own = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    there = lanes < batch
    lengths = tl.load(cu_ptr + lanes + 1, mask=there, other=0) - tl.load(cu_ptr + lanes, mask=there, other=0)
    # No more than the caller has announced, so that a wrong longest length cannot write elsewhere.
    counts = tl.minimum((lengths + ROWS - 1) // ROWS, tiles)
    mine = tl.sum(tl.where(lanes == own, counts, 0), 0)
    before = (counts > mine) | ((counts == mine) & (lanes < own))
    at = tl.sum(tl.where(before, counts, 0), 0)
    if own == 0:
        total = tl.sum(counts, 0)
        tl.store(items_ptr, total)
        tl.store(queue_ptr, 0)
        if total == 0:
            # What a CTA that finds no work looks at all the same.
            tl.store(items_ptr + 1, 0)
    for tile in range(0, mine):
        tl.store(items_ptr + 1 + at + tile, own * tiles + (mine - 1 - tile))
