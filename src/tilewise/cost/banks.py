"""Bank conflicts of a shared-memory tile, simulated: plain, padded and swizzled rows.

Shared memory is 32 banks of 4 bytes. A warp's access is served in wavefronts, and each bank hands out one word a
wavefront, so lanes that want *different* words of one bank wait for each other; lanes that want the same word do not.
Accesses wider than 4 bytes a lane are served 8 bytes by half-warps and 16 bytes by quarter-warps.

Sources: CUDA C++ Programming Guide, "Shared Memory" of compute capability 5.x and newer; the swizzle is that of the
copy engine (PTX ISA, "Swizzling modes": 128, 64 and 32 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tilewise import errors
from tilewise.cost.counts import itemsize

BANKS = 32
WORD = 4
"""Bytes that a bank hands out a wavefront."""
CHUNK = 16
"""Bytes that a swizzle moves as one."""
LANES = 32

Layout = Literal["plain", "padded", "swizzled"]
LAYOUTS: tuple[Layout, ...] = ("plain", "padded", "swizzled")
Access = Literal["row", "column", "matrix"]
ACCESSES: tuple[Access, ...] = ("row", "column", "matrix")


@dataclass(frozen=True, slots=True)
class SharedTile:
    """A `rows × columns` tile in shared memory.

    - plain: rows follow one another.
    - padded: 16 bytes are left free after each row, which shifts the next one by four banks.
    - swizzled: 16-byte chunk c of row r stands at `c xor r mod 8` within rows of 128 bytes; wider rows are cut into
      panels of 128 bytes, narrower ones (64, 32) xor with fewer bits. It costs no memory.

    Raises ValueError for a swizzle of rows that are neither 32, 64 nor a multiple of 128 bytes.
    """

    rows: int
    columns: int
    dtype: str = "float16"
    layout: Layout = "plain"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise errors.bad_value("layout", repr(self.layout), f"one of {', '.join(LAYOUTS)}")
        width = self.row_bytes
        if self.layout == "swizzled" and width not in (32, 64) and width % 128:
            raise errors.bad_value("columns", f"rows of {width} bytes", "32, 64 or a multiple of 128", "pad instead")

    @property
    def row_bytes(self) -> int:
        return self.columns * itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Shared memory that the tile takes."""
        return self.rows * (self.row_bytes + (CHUNK if self.layout == "padded" else 0))

    def address(self, row: int, column: int) -> int:
        """Byte address of an element."""
        offset = column * itemsize(self.dtype)
        if self.layout == "plain":
            return row * self.row_bytes + offset
        if self.layout == "padded":
            return row * (self.row_bytes + CHUNK) + offset
        panel = min(self.row_bytes, 128)
        chunks = panel // CHUNK
        chunk = offset % panel // CHUNK ^ row * panel // 128 % chunks
        return offset // panel * panel * self.rows + row * panel + chunk * CHUNK + offset % CHUNK

    def bank(self, row: int, column: int) -> int:
        return self.address(row, column) // WORD % BANKS


def warp_lanes(tile: SharedTile, access: Access) -> tuple[list[tuple[int, int]], int]:
    """What the 32 lanes of a warp touch, as (row, column), and how many bytes each.

    - row: consecutive elements of row 0, at least a word a lane: how a tile is filled.
    - column: column 0 of 32 rows: what a transpose, or a naive QKᵀ with a row a lane, reads.
    - matrix: 16 bytes of each of 8 rows, four chunks one after another: what `ldmatrix` reads for the tensor cores.
    """
    size = itemsize(tile.dtype)
    if access == "row":
        step = max(1, WORD // size)
        return [(lane * step // tile.columns % tile.rows, lane * step % tile.columns) for lane in range(LANES)], max(
            WORD, size
        )
    if access == "column":
        return [(lane % tile.rows, 0) for lane in range(LANES)], size
    if access == "matrix":
        per_chunk = CHUNK // size
        chunks = tile.columns // per_chunk
        return [(lane % 8, lane // 8 % chunks * per_chunk) for lane in range(LANES)], CHUNK
    raise errors.bad_value("access", repr(access), f"one of {', '.join(ACCESSES)}")


def wavefronts(addresses: Sequence[int], width: int) -> int:
    """Wavefronts that one access of a warp takes: `addresses` a lane, `width` bytes each.

    The least is 1 for up to 4 bytes a lane, 2 for 8 and 4 for 16; what is beyond is the conflict.
    """
    group = LANES * WORD // max(width, WORD)
    total = 0
    for start in range(0, len(addresses), group):
        words: list[set[int]] = [set() for _ in range(BANKS)]
        for address in addresses[start : start + group]:
            for word in range(address // WORD, (address + width - 1) // WORD + 1):
                words[word % BANKS].add(word)
        total += max(len(of_bank) for of_bank in words)
    return total


def conflict_ways(tile: SharedTile, access: Access) -> float:
    """Wavefronts of one warp's access over the least there could be: 1 is conflict-free, 32 is one lane at a time."""
    lanes, width = warp_lanes(tile, access)
    least = max(1, width // WORD)
    return wavefronts([tile.address(row, column) for row, column in lanes], width) / least
