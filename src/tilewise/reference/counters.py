"""What a tiled algorithm does to the memory of a GPU, counted while it runs on ordinary tensors.

The reference loops move every tile through a `Chip`: `load` and `store` are trips between HBM and the chip, `matmul` is
a tensor-core product, `hold` says which tiles are on chip at one time. What `tilewise.cost.counts` predicts from sizes
alone must equal what is counted here, to the element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilewise.reference.softmax import accumulator_dtype

Tiles = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals over batch and heads, except `on_chip_bytes`, which is of the one tile set that a program holds."""

    elements_read: int = 0
    """From HBM."""
    elements_written: int = 0
    """To HBM."""
    bytes_read: int = 0
    bytes_written: int = 0
    on_chip_bytes: int = 0
    """Peak over the steps; operand tiles in the inputs' dtype, scores, accumulators and statistics in theirs."""
    matmul_flops: int = 0
    """2 a multiply-add."""
    rescalings: int = 0
    """How often an accumulator tile was multiplied by `e^(m−m')`."""
    divisions: int = 0
    """How often an accumulator tile was divided by its running sum."""
    tiles_visited: int = 0
    tiles_skipped: int = 0
    """Tiles of the score matrix that causality left out; each costs nothing."""

    @property
    def elements(self) -> int:
        """HBM elements moved, both ways."""
        return self.elements_read + self.elements_written

    @property
    def bytes(self) -> int:
        """HBM bytes moved, both ways."""
        return self.bytes_read + self.bytes_written


class Chip:
    """The on-chip side of a pretend GPU for tensors of `dtype`: accumulates what `Counters` reports.

    The batch and head dims of a tile stand for `programs` that run side by side. Tiles come in as they are stored and
    are worked on in `acc_dtype`, as tensor cores do.
    """

    def __init__(self, dtype: torch.dtype, programs: int) -> None:
        self.programs = programs
        self.itemsize = dtype.itemsize
        self.acc_dtype = accumulator_dtype(dtype)
        self._totals = dict.fromkeys(Counters.__slots__, 0)

    def read(self, tile: Tensor) -> None:
        """Counts a tensor as read from HBM."""
        self._totals["elements_read"] += tile.numel()
        self._totals["bytes_read"] += tile.numel() * tile.element_size()

    def load(self, tile: Tensor) -> Tensor:
        """Brings a tile in from HBM."""
        self.read(tile)
        return tile.to(self.acc_dtype) if tile.is_floating_point() else tile

    def write(self, tile: Tensor) -> None:
        """Counts a tensor as written to HBM."""
        self._totals["elements_written"] += tile.numel()
        self._totals["bytes_written"] += tile.numel() * tile.element_size()

    def store(self, destination: Tensor, tile: Tensor) -> None:
        """Writes a tile to its place in HBM, rounding it to the dtype that is stored there."""
        self.write(destination.copy_(tile))

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` for batches of matrices."""
        product = a @ b
        self.multiply(product, depth=a.shape[-1])
        return product

    def multiply(self, product: Tensor, depth: int) -> None:
        """Counts `depth` multiply-adds for each entry of a product."""
        self._totals["matmul_flops"] += 2 * product.numel() * depth

    def hold(self, operands: Tiles, accumulators: Tiles, statistics: Tiles) -> None:
        """States what one program has on chip at this step: tiles of two kinds, and vectors with a number a row."""
        narrow = sum(tile.shape[-2] * tile.shape[-1] for tile in operands)
        wide = sum(tile.shape[-2] * tile.shape[-1] for tile in accumulators) + sum(x.shape[-1] for x in statistics)
        held = narrow * self.itemsize + wide * self.acc_dtype.itemsize
        self._totals["on_chip_bytes"] = max(self._totals["on_chip_bytes"], held)

    def visit(self, *, rescalings: int = 0, divisions: int = 0) -> None:
        """One tile of the score matrix was worked on, in every program."""
        self._totals["tiles_visited"] += self.programs
        self._totals["rescalings"] += rescalings * self.programs
        self._totals["divisions"] += divisions * self.programs

    def skip(self) -> None:
        """One tile of the score matrix was left out, in every program."""
        self._totals["tiles_skipped"] += self.programs

    def divide(self) -> None:
        """An accumulator tile was divided by its running sum, in every program."""
        self._totals["divisions"] += self.programs

    @property
    def counters(self) -> Counters:
        return Counters(**self._totals)
