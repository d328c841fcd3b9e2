"""The device encoding: a tile map built where the mask's arrays lie, without the host ever reading them.

For masks whose ids, booleans or offsets (or whose problem's offsets) are on an accelerator. Every shape is known to the
host, so nothing waits. `judge` gives a coarse grid of tiles, and a bound on the undecided ones of a row; these are
evaluated, and those that turn out empty or full are moved there. Time is that of evaluating the predicate on rows ×
bound tiles, in chunks; memory is one byte a tile and 2 KiB a slot of the bound (N×M/8 bytes where nothing bounds a
mask, as for `Dense` and `Documents`).

Diagonal masks, `Prefix`, `Documents` and `Dense` on the device, and what is combined of them, can be captured in a CUDA
graph; the others send tables from the host, which a capture refuses: call `tensors.tile_map` once before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tilewise.masks.algebra import And, Combination, Mask, Not, PerHead
from tilewise.masks.arrays import Held
from tilewise.masks.coverage import TILE, Tiling, cover
from tilewise.masks.frame import Frame, Grid
from tilewise.masks.lines import EMPTY, FULL, UNDECIDED
from tilewise.masks.patterns import Causal, Diagonal, Prefix
from tilewise.masks.sets import Documents
from tilewise.masks.tensors import TileTensors

_PAIRS = 1 << 22
"""Pairs evaluated at once: with int64 indices some tens of MB."""


class Site(NamedTuple):
    """A frame on a device, and what lifts arrays there."""

    frame: Frame
    device: torch.device
    lift: Callable[[Any], Tensor]

    @property
    def rows(self) -> int:
        return -(-self.frame.n // TILE)

    @property
    def columns(self) -> int:
        return -(-self.frame.m // TILE)

    def arange(self, *bounds: int) -> Tensor:
        return torch.arange(*bounds, device=self.device)


class Judgement(NamedTuple):
    grid: Tensor
    """uint8 [1|B, 1|H, row tiles, column tiles]: EMPTY, FULL or UNDECIDED."""
    in_row: int
    """No row has more undecided tiles than this."""
    in_column: int


def encode_on_device(mask: Mask, frame: Frame, device: torch.device, transposed: bool) -> TileTensors:
    """`mask` compiled on `device`; see the head of this file, and `TileTensors` for the form."""
    site = Site(frame, device, _lift_to(device))
    n, m = (frame.m, frame.n) if transposed else (frame.n, frame.m)
    count, columns = frame.batch * frame.heads * -(-n // TILE), -(-m // TILE)
    if not count * columns:
        ptr = torch.zeros(count, dtype=torch.int32, device=device)
        none, bits = ptr[:0], torch.zeros(0, TILE, TILE // 32, dtype=torch.int32, device=device)
        return TileTensors(n, m, frame.batch, frame.heads, ptr, ptr, none, none, ptr, ptr, none, none, bits)
    grid, in_row, in_column = judge(mask, site)
    grid = grid.expand(frame.batch, frame.heads, -1, -1)
    grid = (grid.transpose(2, 3) if transposed else grid).flatten(0, 2)
    full, undecided = grid == FULL, grid == UNDECIDED
    room = in_column if transposed else in_row
    if m % TILE:
        undecided[:, -1] |= full[:, -1]
        full[:, -1] = False
        room += 1
    room = min(room, columns)
    slots, used = _compact(undecided, site.arange(columns), room)
    bits, kind = _evaluate(mask, site, slots, used, transposed)
    found = torch.zeros(count, columns + 1, dtype=torch.bool, device=device)
    full |= found.scatter_(1, torch.where(kind == FULL, slots, columns), True)[:, :columns]
    part_col, parts = _compact(kind == UNDECIDED, slots, room)
    part_id, _ = _compact(kind == UNDECIDED, site.arange(count * room).view(count, room), room)
    border = torch.zeros(count, 1, dtype=torch.bool, device=device)
    begins = full & ~torch.cat((border, full[:, :-1]), dim=1)
    ends = full & ~torch.cat((full[:, 1:], border), dim=1)
    most_runs = (columns + 1) // 2
    run_start, runs = _compact(begins, site.arange(columns), most_runs)
    run_stop, _ = _compact(ends, site.arange(1, columns + 1), most_runs)
    rows = site.arange(count)
    run_begin, part_begin = rows * most_runs, rows * room
    return TileTensors(
        n,
        m,
        frame.batch,
        frame.heads,
        run_begin.int(),
        (run_begin + runs).int(),
        run_start.flatten().int(),
        run_stop.flatten().int(),
        part_begin.int(),
        (part_begin + parts).int(),
        part_col.flatten().int(),
        part_id.flatten().int(),
        bits,
    )


def dense_on_device(mask: Mask, frame: Frame, device: torch.device) -> Tensor:
    """The predicate as a matrix on `device`, bool [batch, heads, n, m]."""
    site = Site(frame, device, _lift_to(device))
    matrix = torch.empty(frame.batch, frame.heads, frame.n, frame.m, dtype=torch.bool, device=device)
    step, j = max(1, _PAIRS // max(1, frame.m)), site.arange(frame.m)[None, :]
    for b, h, first in product(range(frame.batch), range(frame.heads), range(0, frame.n, step)):
        i = site.arange(first, min(frame.n, first + step))[:, None]
        matrix[b, h, first : first + step] = mask.allow(Grid(torch, site.lift, frame, b, h, i, j))
    return matrix


def _lift_to(device: torch.device) -> Callable[[Any], Tensor]:
    """What takes a `Held` or a NumPy array to `device`, each once."""
    lifted: dict[int, tuple[Any, Tensor]] = {}

    def lift(array: Any) -> Tensor:
        if id(array) not in lifted:
            tensor = array.tensor(torch.from_numpy) if isinstance(array, Held) else torch.from_numpy(array)
            # The array is kept too: its id is its own only while it lives.
            lifted[id(array)] = array, tensor.to(device, non_blocking=True)
        return lifted[id(array)][1]

    return lift


def _compact(chosen: Tensor, values: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The values where `chosen` [R, C] is true moved to the left, int64 [R, room], and how many there are, [R]."""
    place = torch.where(chosen, chosen.cumsum(1) - 1, room)
    packed = torch.zeros(chosen.shape[0], room + 1, dtype=torch.int64, device=chosen.device)
    return packed.scatter_(1, place, values.expand(chosen.shape))[:, :room], chosen.sum(1)


def _evaluate(mask: Mask, site: Site, slots: Tensor, used: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """Bits [rows·room, 128, 4] of the tiles in columns `slots` [rows, room], row r using `used[r]` of them, and what
    each tile is: uint8 [rows, room]."""
    rows, heads = site.arange(len(slots)), site.frame.heads
    if heads == 1 or not _names_heads(mask):
        bits, kind = _evaluate_rows(mask, site, rows, slots, used, 0 if heads == 1 else None, transposed)
        return bits.flatten(0, 1), kind
    # `PerHead` evaluates one head at a time.
    by_head = [x.unflatten(0, (site.frame.batch, heads, -1)) for x in (rows, slots, used)]
    parts = []
    for head in range(heads):
        rows_, slots_, used_ = (x[:, head].flatten(0, 1) for x in by_head)
        parts.append(_evaluate_rows(mask, site, rows_, slots_, used_, head, transposed))
    bits, kind = (
        torch.stack([x.unflatten(0, (site.frame.batch, -1)) for x in part], dim=1).flatten(0, 2)
        for part in zip(*parts, strict=True)
    )
    return bits.flatten(0, 1), kind


def _evaluate_rows(
    mask: Mask, site: Site, rows: Tensor, slots: Tensor, used: Tensor, head: int | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Bits [K, room, 128, 4] and kind [K, room] for K rows of tiles, all of one head unless that is None."""
    frame, (count, room) = site.frame, slots.shape
    n, m = (frame.m, frame.n) if transposed else (frame.n, frame.m)
    tiles, within = -(-n // TILE), site.arange(TILE)
    bits = torch.empty(count, room, TILE, TILE // 32, dtype=torch.int32, device=site.device)
    kind = torch.empty(count, room, dtype=torch.uint8, device=site.device)
    width = max(1, min(room, _PAIRS // (TILE * TILE)))
    height = max(1, _PAIRS // (width * TILE * TILE))
    for top, left in product(range(0, count, height), range(0, room, width)):
        here = slice(top, top + height), slice(left, left + width)
        r, c = rows[here[0], None, None, None], slots[here]
        row, column = r % tiles * TILE + within[:, None], c[:, :, None, None] * TILE + within
        i, j = (column, row) if transposed else (row, column)
        plane = r // tiles
        h = plane % frame.heads if head is None else head
        grid = Grid(torch, site.lift, frame, plane // frame.heads, h, i, j)
        real = ((row < n) & (column < m)).expand(*c.shape, TILE, TILE)
        allowed = mask.allow(grid).expand(*c.shape, TILE, TILE) & real
        is_used = site.arange(room)[here[1]] < used[here[0], None]
        empty = ~(allowed.any(-1).any(-1) & is_used)
        full = (allowed == real).all(-1).all(-1) & ((c + 1) * TILE <= m)
        kind[here] = _choose(empty, EMPTY, _choose(full, FULL, UNDECIDED))
        bits[here] = _pack(allowed)
    return bits, kind


def _names_heads(mask: Mask) -> bool:
    if isinstance(mask, Combination):
        return any(_names_heads(part) for part in mask.masks)
    return _names_heads(mask.mask) if isinstance(mask, Not) else isinstance(mask, PerHead)


def _pack(allowed: Tensor) -> Tensor:
    """bool [..., 128, 128] to int32 [..., 128, 4]."""
    bytes_of_8 = allowed.contiguous().view(torch.uint8).unflatten(-1, (TILE // 8, 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=allowed.device)
    return (bytes_of_8 * weights).sum(-1, dtype=torch.uint8).view(torch.int32)


@singledispatch
def judge(mask: Mask, site: Site) -> Judgement:
    """A coarse, always right classification of all tiles, and bounds known to the host."""
    if _on_host(mask, site.frame):
        tiling = Tiling(site.frame)
        line, batch, heads = cover(mask, tiling, np.arange(site.frame.heads))
        grid = np.repeat(line.state, np.diff(line.stops, prepend=0)).reshape(batch, heads, site.rows, site.columns)
        undecided = grid == UNDECIDED
        bounds = (int(undecided.sum(axis=axis).max(initial=0)) for axis in (3, 2))
        return Judgement(site.lift(grid), *bounds)
    return _unknown(site)


def _on_host(mask: Mask, frame: Frame) -> bool:
    there = not isinstance(frame.offset, int) and frame.offset.on_device
    return not (there or any(held.on_device for held in mask.arrays))


def _unknown(site: Site) -> Judgement:
    grid = torch.full((1, 1, site.rows, site.columns), UNDECIDED, dtype=torch.uint8, device=site.device)
    return Judgement(grid, site.columns, site.rows)


@judge.register
def _(mask: Combination, site: Site) -> Judgement:
    # What one EMPTY decides for `&`, one FULL decides for `|`.
    decides, passes = (EMPTY, FULL) if isinstance(mask, And) else (FULL, EMPTY)
    grid, in_row, in_column = judge(mask.masks[0], site)
    for other in mask.masks[1:]:
        part = judge(other, site)
        decided, passed = (grid == decides) | (part.grid == decides), (grid == passes) & (part.grid == passes)
        grid = _choose(decided, decides, _choose(passed, passes, UNDECIDED))
        in_row, in_column = in_row + part.in_row, in_column + part.in_column
    return Judgement(grid, in_row, in_column)


def _choose(condition: Tensor, yes: int, no: int | Tensor) -> Tensor:
    return torch.where(condition, yes, no).to(torch.uint8)


@judge.register
def _(mask: Not, site: Site) -> Judgement:
    inner = judge(mask.mask, site)
    grid = inner.grid
    return inner._replace(grid=_choose(grid == EMPTY, FULL, _choose(grid == FULL, EMPTY, UNDECIDED)))


@judge.register
def _(mask: PerHead, site: Site) -> Judgement:
    parts = [judge(part, site) for part in mask.masks]
    batch = max(part.grid.shape[0] for part in parts)
    grid = torch.cat([_one_head(part.grid, h).expand(batch, -1, -1, -1) for h, part in enumerate(parts)], dim=1)
    return Judgement(grid, max(part.in_row for part in parts), max(part.in_column for part in parts))


def _one_head(grid: Tensor, h: int) -> Tensor:
    return grid[:, h : h + 1] if grid.shape[1] > 1 else grid


@judge.register
def _(mask: Diagonal, site: Site) -> Judgement:
    low, high = (None, None) if isinstance(mask, Causal) else mask.bounds(0)
    start = site.frame.offset
    offset = start if isinstance(start, int) else site.lift(start)[:, None, None, None]
    distance = (site.arange(site.columns) - site.arange(site.rows)[:, None]) * TILE - offset
    some, all_of = torch.ones_like(distance, dtype=torch.bool), torch.ones_like(distance, dtype=torch.bool)
    if isinstance(mask, Causal):
        high = mask.offset if isinstance(mask.offset, int) else site.lift(mask.offset)[:, None, None, None]
    if low is not None:
        some, all_of = some & (distance + TILE - 1 >= low), all_of & (distance - TILE + 1 >= low)
    if high is not None:
        some, all_of = some & (distance - TILE + 1 <= high), all_of & (distance + TILE - 1 <= high)
    if mask.step > 1:
        all_of = torch.zeros_like(all_of)
    grid = _choose(all_of, FULL, _choose(some, UNDECIDED, EMPTY))
    grid = grid.expand(-1, 1, -1, -1) if grid.dim() == 4 else grid[None, None]
    # One limit crosses at most two tiles of a row; between two limits lie at most so many tiles.
    crossed = 2 * ((low is not None) + (high is not None)) if mask.step == 1 else max(site.rows, site.columns)
    if isinstance(low, int) and isinstance(high, int):
        between = (high - low + 2 * TILE - 2) // TILE + 1
        crossed = min(crossed, between)
    return Judgement(grid, min(crossed, site.columns), min(crossed, site.rows))


@judge.register
def _(mask: Prefix, site: Site) -> Judgement:
    start = site.arange(site.columns) * TILE
    row = _choose(start + TILE <= mask.n, FULL, _choose(start < mask.n, UNDECIDED, EMPTY))
    return Judgement(row.expand(1, 1, site.rows, site.columns), 1, site.rows)


@judge.register
def _(mask: Documents, site: Site) -> Judgement:
    if _on_host(mask, site.frame):
        return judge.dispatch(Mask)(mask, site)

    def ends(held: Held, tiles: int) -> tuple[Tensor, Tensor]:
        ids = site.lift(held)
        ids = ids if ids.dim() == 2 else ids[None]
        at = site.arange(tiles * TILE).clip(max=ids.shape[1] - 1)
        parted = ids[:, at].view(ids.shape[0], 1, tiles, TILE)
        return parted.amin(-1), parted.amax(-1)

    (q_low, q_high), (k_low, k_high) = ends(mask.q_ids, site.rows), ends(mask.k_ids, site.columns)
    q_low, q_high, k_low, k_high = q_low[..., None], q_high[..., None], k_low[:, :, None], k_high[:, :, None]
    apart = (q_high < k_low) | (k_high < q_low)
    same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    grid = _choose(apart, EMPTY, _choose(same, FULL, UNDECIDED))
    return Judgement(grid, site.columns, site.rows)
