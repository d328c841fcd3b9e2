"""What a tile shape needs of one multiprocessor: bytes on chip, how many programs fit, and what a larger tile saves.

A tile that is too small re-reads K and V often and gives the matrix units little to do at a time; one that is too large
does not fit, or leaves room for a single program, so that nothing hides the wait for memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from tilewise.cost.counts import accumulator_itemsize, itemsize
from tilewise.cost.hardware import Device


@dataclass(frozen=True, slots=True)
class TileShape:
    """The tile set of one program of the forward: bytes of each tile.

    Q, K, V are held in `dtype`; S, P, the output accumulator and the statistics m and l in the accumulator dtype.
    """

    block_m: int
    block_n: int
    head_dim: int
    v_head_dim: int
    dtype: str = "float16"

    @property
    def q(self) -> int:
        return self.block_m * self.head_dim * itemsize(self.dtype)

    @property
    def k(self) -> int:
        return self.block_n * self.head_dim * itemsize(self.dtype)

    @property
    def v(self) -> int:
        return self.block_n * self.v_head_dim * itemsize(self.dtype)

    @property
    def s(self) -> int:
        """S, and P as well: `block_m × block_n` each."""
        return self.block_m * self.block_n * accumulator_itemsize(self.dtype)

    @property
    def acc(self) -> int:
        return self.block_m * self.v_head_dim * accumulator_itemsize(self.dtype)

    @property
    def statistics(self) -> int:
        return 2 * self.block_m * accumulator_itemsize(self.dtype)

    @property
    def tiles(self) -> int:
        """Q, K, V, S and P: the budget that is usually quoted, 56 KB for 64×64 at D = 64 in fp16."""
        return self.q + self.k + self.v + 2 * self.s

    @property
    def total(self) -> int:
        """With the accumulator and the statistics: `Counters.on_chip_bytes` of the reference."""
        return self.tiles + self.acc + self.statistics

    @property
    def intensity(self) -> float:
        """FLOPs a byte of K and V read: `2·block_m / itemsize`, whatever block_n is. Taller Q tiles re-read less."""
        return 2 * self.block_m / itemsize(self.dtype)

    def shared(self, stages: int = 1) -> int:
        """Shared memory of a kernel that has Q once and K, V `stages` deep there, and everything else in registers."""
        return self.q + stages * (self.k + self.v)

    @property
    def registers(self) -> int:
        """Register bytes of that kernel: S, which becomes P in place, acc, m and l. Addresses come on top."""
        return self.s + self.acc + self.statistics

    def programs_per_sm(self, device: Device, stages: int = 1) -> int:
        """How many such programs one multiprocessor holds at once; 0 if not even one fits."""
        shared = self.shared(stages)
        if shared > device.shared_per_block:
            return 0
        reserved = device.shared_per_sm - device.shared_per_block
        return min(device.shared_per_sm // (shared + reserved), device.registers_per_sm // self.registers)


def fitting_shapes(
    device: Device,
    head_dim: int,
    v_head_dim: int | None = None,
    *,
    dtype: str = "float16",
    stages: int = 2,
    blocks: Iterable[int] = (16, 32, 64, 128, 256),
) -> list[tuple[TileShape, int]]:
    """The tile shapes with sides among `blocks` of which one multiprocessor holds at least one, and how many it holds.

    In order of falling intensity, then of rising size: the first is what a kernel would try first.
    """
    dv = head_dim if v_head_dim is None else v_head_dim
    sides = tuple(blocks)
    shapes = [TileShape(block_m, block_n, head_dim, dv, dtype) for block_m, block_n in product(sides, sides)]
    fitting = [(shape, programs) for shape in shapes if (programs := shape.programs_per_sm(device, stages))]
    return sorted(fitting, key=lambda item: (-item[0].intensity, item[0].total))
