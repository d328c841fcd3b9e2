"""Whether a result is right: float64 attention of a workload, and how far each stretch of rows may be from it.

The largest error of a whole tensor says little at long lengths: causal row 0 is as large as a value, row 16383 is an
average of thousands of them, and an error as large as that average would pass for rounding of row 0. So each tile of
128 rows is held to a budget of its own, which scales with the size of what stands there, over all heads:

    out          2·err_std·size + one unit in the last place of size; size is the tile's largest |out|
    dq, dk, dv   (3·err_std + 4·ε₃₂ + ε)·κ (the ε for 16-bit dtypes)

err_std is the largest error, over all tiles and as a share of size or κ, of standard attention that PyTorch computes in
the case's dtype. κ bounds the terms that cancel in `P∘(dP − Δ)`: with `E = P∘(|dO||V|ᵀ + rowsum(|dO||O|))` it is the
tile's largest scale·E|K| for dq, scale·Eᵀ|Q| for dk, Pᵀ|dO| for dv. Everything is computed in chunks of rows, so N×M is
never held at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tilewise.bench.workload import Workload

TILE = 128
_MOST_SCORES = {"cuda": 2**33, "cpu": 2**25}
"""Scores that are checked, by device type: beyond that an evenly spread part of the heads, at least one."""
_CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Of one matrix of scores."""


class Finding(NamedTuple):
    """The tile that comes nearest to its budget, or goes beyond."""

    error: float
    budget: float
    where: str
    """Such as "dk, rows 128 to 255"."""

    @property
    def passed(self) -> bool:
        return self.error <= self.budget


class _Tiles(NamedTuple):
    """One tensor of one piece: its exact value [..., N, D]; the rest is by tile, [⌈N / 128⌉]."""

    name: str
    exact: Tensor
    size: Tensor
    """What errors are measured by: the largest |out|, or κ."""
    plain: Tensor
    """The error of standard attention."""


class Judge:
    """The exact results of a workload; `backward` includes those of the gradients."""

    def __init__(self, work: Workload, *, backward: bool) -> None:
        q, k, v = (x.detach() for x in work.leaves)
        self._work = work
        scores = sum(spec.batch * spec.heads * spec.q_len * spec.k_len for spec in work.case.specs)
        self._share = min(1.0, _MOST_SCORES[work.device.type] / scores)
        pieces = zip(
            work.query_pieces(q),
            work.key_pieces(k),
            work.key_pieces(v),
            work.query_pieces(work.dout),
            strict=True,
        )
        self._pieces = [self._expected([self._sampled(x) for x in piece], backward) for piece in pieces]
        names = {tiles.name for piece in self._pieces for tiles in piece}
        self._err_std = {
            name: max(
                (t.plain / t.size).nan_to_num(nan=0.0).max().item()
                for piece in self._pieces
                for t in piece
                if t.name == name
            )
            for name in names
        }

    def out(self, out: Tensor) -> Finding:
        """How `out`, shaped as q, fares."""
        return self._worst({"out": self._work.query_pieces(out)})

    def gradients(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Finding:
        work = self._work
        return self._worst({"dq": work.query_pieces(dq), "dk": work.key_pieces(dk), "dv": work.key_pieces(dv)})

    def _sampled(self, piece: Tensor) -> Tensor:
        """Evenly spread planes of the first dim of a piece, as many as the limit allows."""
        planes = max(1, int(len(piece) * self._share))
        if planes == len(piece):
            return piece
        index = torch.linspace(0, len(piece) - 1, planes, device=piece.device).round().long()
        return piece[index]

    def _worst(self, found: dict[str, list[Tensor]]) -> Finding:
        worst = Finding(0.0, math.inf, "nothing")
        for index, piece in enumerate(self._pieces):
            for tiles in piece:
                if tiles.name not in found:
                    continue
                error = _by_tile(self._sampled(found[tiles.name][index]).double() - tiles.exact)
                budget = self._budget(tiles)
                tile = int((error / budget).nan_to_num(nan=0.0).argmax())
                where = _where(tiles.name, tile, tiles.exact.shape[-2])
                here = Finding(error[tile].item(), budget[tile].item(), where)
                if here.error * worst.budget > worst.error * here.budget or worst.where == "nothing":
                    worst = here
        return worst

    def _budget(self, tiles: _Tiles) -> Tensor:
        """The largest error allowed in each tile."""
        dtype, err_std = self._work.q.dtype, self._err_std[tiles.name]
        eps, low = torch.finfo(dtype).eps, torch.finfo(dtype).bits < 32
        if tiles.name == "out":
            return 2 * err_std * tiles.size + eps * torch.exp2(tiles.size.log2().floor())
        return (3 * err_std + 4 * torch.finfo(torch.float32).eps + (eps if low else 0.0)) * tiles.size

    def _expected(self, piece: list[Tensor], backward: bool) -> list[_Tiles]:
        q, k, v, dout = piece
        exact = self._attend(q, k, v, dout, torch.float64, backward, condition=backward)
        plain = self._attend(q, k, v, dout, q.dtype, backward, condition=False)
        names = ("out", "dq", "dk", "dv") if backward else ("out",)
        sizes = [exact[0], *exact[4:]]
        return [
            _Tiles(name, exact[i], _by_tile(sizes[i]), _by_tile(plain[i].double() - exact[i]))
            for i, name in enumerate(names)
        ]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype, backward: bool, condition: bool
    ) -> list[Tensor]:
        """Standard attention in `dtype` with PyTorch's operators: out, then dq, dk, dv, then κ of these."""
        (planes, group, n, _), m = q.shape, k.shape[1]
        fitting = _chunk_bytes(q.device) // dtype.itemsize
        step = max(1, fitting // (group * n * m))
        rows = max(TILE, fitting // (step * group * m) // TILE * TILE)
        shapes = [q, q, k, v, q, k, v][: 7 if condition else 4 if backward else 1]
        results = [torch.zeros_like(x, dtype=dtype) for x in shapes]
        for plane in range(0, planes, step):
            for row in range(0, n, rows):
                at, span = slice(plane, plane + step), slice(row, row + rows)
                q_rows, dout_rows = (x[at, :, span].to(dtype).flatten(1, 2) for x in (q, dout))
                allowed = self._work.allowed(row, min(row + rows, n), m)
                keys, values = k[at].to(dtype), v[at].to(dtype)
                found = _chunk(q_rows, dout_rows, keys, values, allowed, group, backward, condition)
                for result, part in zip(results, found, strict=True):
                    if result.dim() == 4:
                        result[at, :, span] = part.unflatten(1, (group, -1))
                    else:
                        result[at] += part
        return results


def _chunk(
    q: Tensor,
    dout: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    group: int,
    backward: bool,
    condition: bool,
) -> list[Tensor]:
    """The same for some rows: q and dout [P, G·rows, D], k and v [P, M, D], all in the dtype to compute in."""
    scale = q.shape[-1] ** -0.5
    s = (q @ k.mT).mul_(scale)
    if allowed is not None:
        s.unflatten(1, (group, -1)).masked_fill_(~allowed, -math.inf)
    p = torch.softmax(s, dim=-1)
    del s
    out = p @ v
    if not backward:
        return [out]
    ds = torch._softmax_backward_data(dout @ v.mT, p, -1, p.dtype).mul_(scale)
    found = [out, ds @ k, ds.mT @ q, p.mT @ dout]
    del ds
    if condition:
        size = (dout.abs() @ v.abs().mT).add_((dout * out).abs().sum(-1, keepdim=True)).mul_(p).mul_(scale)
        found += [size @ k.abs(), size.mT @ q.abs(), p.mT @ dout.abs()]
    return found


def _chunk_bytes(device: torch.device) -> int:
    """About ten matrices of a chunk are held at once: all of them in a part of the memory that is free."""
    most = _CHUNK_BYTES[device.type]
    return min(most, torch.cuda.mem_get_info(device)[0] // 20) if device.type == "cuda" else most


def _by_tile(x: Tensor) -> Tensor:
    """Largest |x| of each 128 rows of [..., N, D], over everything else; infinite where anything is NaN."""
    rows = x.abs().nan_to_num(nan=math.inf).amax(dim=(*range(x.dim() - 2), -1))
    padded = torch.nn.functional.pad(rows, (0, -len(rows) % TILE))
    return padded.view(-1, TILE).amax(dim=1)


def _where(name: str, tile: int, rows: int) -> str:
    return f"{name}, rows {tile * TILE} to {min(rows, (tile + 1) * TILE) - 1}"
