"""Masks and torch: the one file of this floor that knows tensors.

- `pack` and `unpack` carry a mask over an op boundary as a string and tensors.
- `tile_map` gives kernels a compiled mask as `TileTensors` on their device, by one of two encodings that kernels read
  alike: *analytic* (compiler.py, for masks whose parameters are on the host) and *device* (built by tensor operations
  without waiting for the device, for masks whose arrays, or offsets, lie there).
- `to_block_mask` and `from_block_mask` exchange tile maps with FlexAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tilewise.errors import bad_value
from tilewise.masks.algebra import Mask
from tilewise.masks.arrays import Held, looked_at
from tilewise.masks.cache import Cache, cached
from tilewise.masks.compiler import settle
from tilewise.masks.compiler import tile_map as compile_map
from tilewise.masks.expression import parse
from tilewise.masks.frame import Frame
from tilewise.masks.patterns import Dense
from tilewise.masks.tilemap import TileMap


def as_mask(mask: Mask | Tensor | np.ndarray) -> Mask:
    """A mask as it is; a boolean tensor or array that broadcasts to [B, H, N, M] as `Dense`."""
    return mask if isinstance(mask, Mask) else Dense(mask)


def pack(mask: Mask) -> tuple[str, list[Tensor]]:
    """(expression, tensors): the tensors stand for $0, $1, … in it. A host array becomes a CPU tensor, once."""
    return str(mask), [held.tensor(torch.from_numpy) for held in mask.arrays]


def unpack(expression: str, tensors: Sequence[Tensor] = ()) -> Mask:
    """The mask that `pack` took apart; cached, except for masks that look at the tensors themselves."""
    if not tensors or any(tensor.is_inference() for tensor in tensors):
        return parse(expression, tensors)
    looks = [looked_at(tensor) for tensor in tensors]
    key = (expression, *(identity for identity, _ in looks))
    return _UNPACKED.get(key, [owner for _, owner in looks], lambda: parse(expression, tensors))


def _kept_bytes(mask: Mask) -> int:
    """Bytes of a mask's host arrays; more than any cache takes if it looks at tensors, which a cache must not hold."""
    if any(held.source is not None for held in mask.arrays):
        return 1 << 62
    return sum(held.host().nbytes for held in mask.arrays)


_UNPACKED: Cache[Mask] = Cache(128, 256 << 20, _kept_bytes)


class TileTensors(NamedTuple):
    """A tile map for kernels: int32 tensors on one device. One kernel serves both encodings.

    Row `r = (b·heads + h)·q_tiles + t` is row tile t of sequence b and head h, where b counts as 0 if `batch` is 1 and
    h as 0 if `heads` is 1.

    - Full tiles of row r: column tiles `run_start[k] … run_stop[k]` (half-open) for k from `run_begin[r]` to
      `run_end[r]` (exclusive), ascending.
    - Partial tiles of row r: column tile `part_col[k]` with bits `bits[part_id[k]]` for k from `part_begin[r]` to
      `part_end[r]`.
    - `bits[id, i, w]`: bit k of word w is the pair (row i, column 32·w + k) of the tile, 1 = may attend. The last
      column tile is partial wherever m is no multiple of 128, with the bits from m on cleared.

    In the analytic encoding `run_begin` and `run_end` are two views of one pointer array, runs are maximal, and `bits`
    holds each distinct tile once. In the device encoding each row owns a stretch of equal length of `run_start`,
    `part_col` and `part_id`, of which only the part up to its end is meaningful, and each row its own tiles of `bits`.
    """

    n: int
    m: int
    batch: int
    heads: int
    run_begin: Tensor
    """[R]."""
    run_end: Tensor
    """[R]."""
    run_start: Tensor
    run_stop: Tensor
    part_begin: Tensor
    """[R]."""
    part_end: Tensor
    """[R]."""
    part_col: Tensor
    part_id: Tensor
    bits: Tensor
    """[tiles, 128, 4]."""

    @property
    def q_tiles(self) -> int:
        return -(-self.n // 128)

    @property
    def k_tiles(self) -> int:
        return -(-self.m // 128)

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self if isinstance(field, Tensor))


def to_tensors(tiles: TileMap, device: torch.device | str = "cpu") -> TileTensors:
    """A NumPy tile map as tensors on a device; on the CPU they share its memory."""

    def on(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.view(np.int32)).to(device, non_blocking=True)

    run_ptr, part_ptr = on(tiles.run_ptr), on(tiles.part_ptr)
    return TileTensors(
        tiles.n,
        tiles.m,
        tiles.batch,
        tiles.heads,
        run_ptr[:-1],
        run_ptr[1:],
        on(tiles.run_start),
        on(tiles.run_stop),
        part_ptr[:-1],
        part_ptr[1:],
        on(tiles.part_col),
        on(tiles.part_id),
        on(tiles.bits),
    )


_TENSORS: Cache[TileTensors] = Cache(128, 1 << 30, lambda tiles: tiles.nbytes)


def tile_map(
    mask: Mask,
    n: int,
    m: int,
    *,
    offset: int | Sequence[int] | np.ndarray | Tensor | None = None,
    device: torch.device | str = "cpu",
    heads: int | None = None,
    transposed: bool = False,
) -> TileTensors:
    """`mask` compiled for n query rows and m keys, as tensors on `device`; cached.

    Args:
        offset: position of query row 0 among the keys; None is m − n. Integers [B] for one a sequence; a tensor on an
            accelerator is not read by the host.
        heads: query heads of the call (the map's `heads` is 1 where the mask does not tell heads apart).
        transposed: the map of the transposed mask, for dK and dV: rows of keys, columns of queries.

    Raises:
        ValueError: the mask does not fit the sizes, or its arrays lie on another accelerator than `device`.
    """
    frame = settle(mask, n, m, offset, heads)
    place = torch.device(device)
    there = _on_device(mask, frame, place)

    def build() -> TileTensors:
        if there:
            return encode_on_device(mask, frame, place, transposed)
        tiles = compile_map(mask, n, m, offset=frame.offset, heads=heads)
        return to_tensors(tiles.transpose() if transposed else tiles, place)

    return cached(_TENSORS, mask, frame, build, (str(place), transposed))


def _on_device(mask: Mask, frame: Frame, device: torch.device) -> bool:
    """Whether the mask must be compiled on the accelerator; raises ValueError if that is another one than `device`."""
    arrays = (*mask.arrays, frame.offset) if isinstance(frame.offset, Held) else mask.arrays
    there = [held for held in arrays if held.on_device]
    for held in there:
        other = torch.device(held.device)
        if other.type != device.type or other.index not in (None, device.index or 0):
            raise bad_value("mask", f"{held.argument} on {held.device}", f"one on {device}", f'`.to("{device}")`')
    return bool(there)


def encode_on_device(mask: Mask, frame: Frame, device: torch.device, transposed: bool) -> TileTensors:
    """The device encoding: by tensor operations on `device` alone, of shapes that the host knows.

    A grid of tiles is judged coarsely (`_judge`); the undecided tiles of each row are evaluated, as many as the host
    knows that a row can have; those that turn out empty or full are moved there. The cost is that of evaluating the
    predicate on these tiles: all N×M pairs, in chunks, where nothing is known of a mask, and N×M/8 bytes of bits.
    """
    grid, most = _judge(mask, frame, device)
    n, m, bound = (frame.m, frame.n, most[1]) if transposed else (frame.n, frame.m, most[0])
    grid = grid.expand(frame.batch, frame.heads, *grid.shape[2:])
    grid = (grid.transpose(2, 3) if transposed else grid).flatten(0, 2)
    count, columns = grid.shape
    if not count * columns:
        ptr, none = (
            torch.zeros(count, dtype=torch.int32, device=device),
            torch.zeros(0, dtype=torch.int32, device=device),
        )
        bits = none.view(0, 128, 4)
        return TileTensors(n, m, frame.batch, frame.heads, ptr, ptr, none, none, ptr, ptr, none, none, bits)
    full, undecided = grid == FULL, grid == UNDECIDED
    if m % TILE:
        undecided[:, -1] |= full[:, -1]
        full[:, -1] = False
        bound += 1
    bound = min(bound, columns)
    slot_columns, slots = _compact(undecided, torch.arange(columns, device=device), bound)
    bits, kind = _evaluate(mask, frame, slot_columns, slots, transposed)
    found = torch.zeros(count, columns + 1, dtype=torch.bool, device=device)
    found.scatter_(1, torch.where(kind == FULL, slot_columns, columns), True)
    full |= found[:, :columns]
    part, parts = _compact(kind == UNDECIDED, slot_columns, bound)
    part_id, _ = _compact(kind == UNDECIDED, torch.arange(count * bound, device=device).view(count, bound), bound)
    border = torch.zeros(count, 1, dtype=torch.bool, device=device)
    begins, ends = full & ~torch.cat((border, full[:, :-1]), 1), full & ~torch.cat((full[:, 1:], border), 1)
    room = (columns + 1) // 2
    start, runs = _compact(begins, torch.arange(columns, device=device), room)
    stop, _ = _compact(ends, torch.arange(1, columns + 1, device=device), room)
    rows = torch.arange(count, device=device)
    pointers = [rows * room, rows * room + runs, start.flatten(), stop.flatten()]
    pointers += [rows * bound, rows * bound + parts, part.flatten(), part_id.flatten()]
    return TileTensors(n, m, frame.batch, frame.heads, *(tensor.to(torch.int32) for tensor in pointers), bits)


def _compact(chosen: Tensor, values: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The values where `chosen` [R, C] is true moved to the left, [R, room], and how many there are, [R]."""
    place = torch.where(chosen, chosen.cumsum(1) - 1, room)
    packed = torch.zeros(chosen.shape[0], room + 1, dtype=torch.int64, device=chosen.device)
    packed.scatter_(1, place, values.expand(chosen.shape))
    return packed[:, :room], chosen.sum(1)


_ROOM = 1 << 24  # pairs evaluated at once


def _evaluate(mask: Mask, frame: Frame, columns: Tensor, counts: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Bits [R·P, 128, 4] of the tiles at `columns` [R, P], of which row r has `counts[r]`, and what each tile is."""
    device, (rows, room) = columns.device, columns.shape
    n, m = (frame.m, frame.n) if transposed else (frame.n, frame.m)
    tiles = -(-n // TILE)
    within = torch.arange(TILE, device=device)
    bits, kinds = [], []
    step = max(1, _ROOM // (room * TILE * TILE))
    for first in range(0, rows, step):
        head = first // tiles % frame.heads
        stop = min(rows, first + step, (first // tiles + 1) * tiles)
        raise NotImplementedError(head, stop, within, bits, kinds, m, counts)
    return torch.cat(bits), torch.cat(kinds)
