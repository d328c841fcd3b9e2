"""Masks and torch: the only files of this floor that know tensors are this one, device.py and blockmask.py.

- `pack` and `unpack` carry a mask over an op boundary as a string and tensors.
- `tile_map` gives kernels a compiled mask as `TileTensors` on their device, by one of two encodings that kernels read
  alike: *analytic* (compiler.py) for masks whose parameters are on the host, and *device* (device.py) for masks whose
  arrays, or offsets, lie on the device, by tensor operations that never wait for it.
- `to_block_mask` and `from_block_mask` (blockmask.py) exchange tile maps with FlexAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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
from tilewise.masks.sets import Dense
from tilewise.masks.tilemap import TileMap
from tilewise.masks.tiles import FromTiles
from tilewise.resident import capturing, from_host, made, used

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def as_mask(mask: Mask | Tensor | np.ndarray) -> Mask:
    """A mask as it is; a boolean tensor or array that broadcasts to [B, H, N, M] as `Dense`."""
    return mask if isinstance(mask, Mask) else Dense(mask)


def pack(mask: Mask) -> tuple[str, list[Tensor]]:
    """(expression, tensors): the tensors stand for $0, $1, … in it. A host array becomes a CPU tensor, once."""
    if torch.compiler.is_compiling():  # a tensor's version is no number there
        return str(mask), [held.as_made for held in mask.arrays]
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
    place = torch.device(device)

    def on(array: np.ndarray) -> Tensor:
        return from_host(torch.from_numpy(array.view(np.int32)), place, "the mask's tile map")

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


def to_block_mask(
    mask: Mask | TileMap,
    n: int | None = None,
    m: int | None = None,
    *,
    offset: int | None = None,
    heads: int | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """See blockmask.py; FlexAttention is imported when this is called."""
    from tilewise.masks.blockmask import to_block_mask as convert

    return convert(mask, n, m, offset=offset, heads=heads, device=device)


def from_block_mask(block_mask: BlockMask) -> FromTiles:
    """See blockmask.py."""
    from tilewise.masks.blockmask import from_block_mask as convert

    return convert(block_mask)


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
            from tilewise.masks.device import encode_on_device

            return made(encode_on_device(mask, frame, place, transposed), place)
        tiles = compile_map(mask, n, m, offset=frame.offset, heads=heads)
        return to_tensors(tiles.transpose() if transposed else tiles, place)

    if there and capturing(place):
        return build()  # a part of the graph, and there when it has run
    return used(cached(_TENSORS, mask, frame, build, (str(place), transposed)), place)


def dense(
    mask: Mask,
    n: int,
    m: int,
    *,
    device: torch.device | str,
    offset: int | Sequence[int] | np.ndarray | Tensor | None = None,
    heads: int | None = None,
) -> Tensor:
    """The predicate as a matrix on `device`, evaluated there: bool, always [1|B, 1|H, n, m].

    Arguments and errors as of `tile_map`.
    """
    frame, place = settle(mask, n, m, offset, heads), torch.device(device)
    _on_device(mask, frame, place)
    from tilewise.masks.device import dense_on_device

    return dense_on_device(mask, frame, place)


def _on_device(mask: Mask, frame: Frame, device: torch.device) -> bool:
    """Whether the mask must be compiled on the accelerator; raises ValueError if that is another one than `device`."""
    arrays = (*mask.arrays, frame.offset) if isinstance(frame.offset, Held) else mask.arrays
    there = [held for held in arrays if held.on_device]
    for held in there:
        other = torch.device(held.device)
        if other.type != device.type or other.index not in (None, device.index or 0):
            raise bad_value("mask", f"{held.argument} on {held.device}", f"one on {device}", f'`.to("{device}")`')
    return bool(there)
