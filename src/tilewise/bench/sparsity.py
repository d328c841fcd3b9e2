"""What a sparse pattern saves, by three ways to compute it: dense scores and then a mask, gathered blocks, tiles.

`python -m tilewise.bench.sparsity` prints the table of docs/sparse.md for this machine. The pattern is the same for
all: each block of 128 queries sees the same number of random key blocks. Every method is checked against PyTorch's
dense result before it is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tilewise
from tilewise.bench.timer import interleaved
from tilewise.masks import tile_map
from tilewise.reference.sparse import block_sparse_attention

BLOCK = 128
DENSE = "no mask"
METHODS = (DENSE, "dense, then mask", "gather", "tiles")
SPARSITIES = (0.5, 0.75, 0.9, 0.95)


class Pattern(NamedTuple):
    """The same pattern as each method wants it."""

    mask: tilewise.masks.Mask
    dense: Tensor
    blocks: Tensor
    """[query blocks, key blocks seen]: which ones."""


class Row(NamedTuple):
    """One method at one sparsity: milliseconds forward, forward and backward, and peak extra bytes of the latter."""

    method: str
    sparsity: float
    forward: float
    both: float
    peak_bytes: int


def pattern_of(length: int, sparsity: float) -> Pattern:
    blocks = -(-length // BLOCK)
    mask = tilewise.masks.Random(max(1, round(blocks * (1 - sparsity))), block=BLOCK, seed=0, per_head=False)
    seen = torch.from_numpy(tile_map(mask, length, length).grid()).reshape(blocks, blocks) > 0
    index = torch.stack([row.nonzero().flatten() for row in seen])
    return Pattern(mask, seen.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1), index)


def call_of(method: str, pattern: Pattern) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if method == DENSE:
        return scaled_dot_product_attention
    if method == "dense, then mask":
        return partial(scaled_dot_product_attention, attn_mask=pattern.dense)
    if method == "gather":
        return lambda q, k, v: block_sparse_attention(q, k, v, pattern.blocks, BLOCK).out
    return lambda q, k, v: tilewise.attention(q, k, v, pattern.mask)


def inputs_of(length: int, heads: int, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, length, head_dim, generator=generator).requires_grad_() for _ in range(3)]


def forward_backward(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    out = call(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def measure(
    length: int, heads: int, head_dim: int, seconds: float, sparsities: Sequence[float] = SPARSITIES
) -> list[Row]:
    """Time and memory of every method at every sparsity.

    Raises AssertionError if a method's result differs from PyTorch's dense one.
    """
    rows: list[Row] = []
    inputs = inputs_of(length, heads, head_dim)
    for sparsity in sparsities:
        pattern = pattern_of(length, sparsity)
        calls = {method: call_of(method, pattern) for method in METHODS}
        with torch.no_grad():
            expected = calls["dense, then mask"](*inputs)
            for method in METHODS[2:]:
                torch.testing.assert_close(calls[method](*inputs), expected)
            ahead = {method: partial(call, *inputs) for method, call in calls.items()}
            forward = interleaved(ahead, inputs[0].device, seconds=seconds)
        both_ways = {method: partial(forward_backward, call, inputs) for method, call in calls.items()}
        for call in both_ways.values():
            call()
        both = interleaved(both_ways, inputs[0].device, seconds=seconds)
        for method in METHODS:
            peak = _peak_bytes(method, length, heads, head_dim, sparsity)
            rows.append(Row(method, sparsity, forward[method].least, both[method].least, peak))
    return rows


def _peak_bytes(method: str, length: int, heads: int, head_dim: int, sparsity: float) -> int:
    """What forward and backward hold beyond their inputs and the pattern, asked of a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(sender, method, length, heads, head_dim, sparsity))
    child.start()
    peak = receiver.recv()
    child.join()
    return peak


def _report_peak(sender: Connection, method: str, length: int, heads: int, head_dim: int, sparsity: float) -> None:
    small, pattern = inputs_of(2 * BLOCK, heads, head_dim), pattern_of(length, sparsity)
    forward_backward(call_of(method, pattern_of(2 * BLOCK, sparsity)), small)
    call, inputs = call_of(method, pattern), inputs_of(length, heads, head_dim)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    before = _resident_peak()
    forward_backward(call, inputs)
    sender.send(max(0, _resident_peak() - before))


def _resident_peak() -> int:
    """The largest resident set of this process so far, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line per method and sparsity, speed-ups over dense-then-mask at the same sparsity."""
    base = {row.sparsity: row for row in rows if row.method == "dense, then mask"}
    lines = [
        "| sparsity | method | forward ms | speed-up | forward + backward ms | speed-up | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        of = base[row.sparsity]
        lines.append(
            f"| {row.sparsity:.0%} | {row.method} | {row.forward:.0f} | {of.forward / row.forward:.1f}× "
            f"| {row.both:.0f} | {of.both / row.both:.1f}× | {row.peak_bytes / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens, a multiple of 128")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each method and measurement")
    given = parser.parse_args()
    print(table(measure(given.length, given.heads, given.head_dim, given.seconds)))  # noqa: T201 - its whole purpose


if __name__ == "__main__":
    main()
