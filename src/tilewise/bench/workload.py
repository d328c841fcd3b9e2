"""The tensors of a case, who sees whom in it, and tilewise's own call on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

import tilewise
from tilewise.bench.suites import BLOCK, Case
from tilewise.masks import Mask, Random, tile_map
from tilewise.ops.arguments import Arguments, Packed, build
from tilewise.ops.dispatch import Plan
from tilewise.ops.library import route
from tilewise.spec import AttentionSpec

Call = Callable[[], Tensor]
"""A forward pass on a workload's tensors: the output, shaped as `dout`, connected to q, k and v."""


@dataclass(frozen=True)
class Workload:
    """q, k, v and dout of a case, random normal: [B, H, N, D] with B, Hkv for k and v, or [T, H, D] where packed.

    q, k and v are leaves that want a gradient.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device, seed: int = 0) -> Workload:
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)

        def normal(heads: int) -> Tensor:
            shape = (case.length, heads) if case.packed else (case.batch, heads, case.length)
            return torch.randn(*shape, case.head_dim, generator=generator, device=device).to(dtype)

        q, k, v = (normal(heads).requires_grad_() for heads in (case.heads, case.kv_heads, case.kv_heads))
        return cls(case, q, k, v, normal(case.heads))

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[sequences + 1] int32, where packed."""
        return torch.tensor([0, *accumulate(self.case.packed)], dtype=torch.int32, device=self.device)

    @cached_property
    def dense_mask(self) -> Tensor:
        """bool [N, N]: half of it True, the diagonal always."""
        n = self.case.length
        generator = torch.Generator(self.device).manual_seed(1)
        drawn = torch.rand(n, n, generator=generator, device=self.device) < 0.5
        return drawn.fill_diagonal_(True)

    @cached_property
    def blocks(self) -> Tensor:
        """bool [N / 128, N / 128]: the blocks that a sparse case sees."""
        rows = self.case.length // BLOCK
        return torch.from_numpy(tile_map(self.block_mask, *[self.case.length] * 2).grid() > 0).view(rows, rows)

    @property
    def block_mask(self) -> Mask:
        return Random(self.case.seen_blocks(), block=BLOCK, seed=0, per_head=False)

    def allowed(self, begin: int, end: int, keys: int) -> Tensor | None:
        """bool [end − begin, keys]: what these rows of a piece see, or None for everything."""
        case = self.case
        rows = torch.arange(begin, end, device=self.device)[:, None]
        columns = torch.arange(keys, device=self.device)
        if case.sparsity is not None:
            grid = self.blocks.to(self.device)
            return grid[rows // BLOCK, columns // BLOCK]
        if case.dense_mask:
            return self.dense_mask[begin:end, :keys]
        if not case.causal:
            return None
        seen = columns <= rows
        return seen if case.window is None else seen & (columns >= rows - case.window)

    def query_pieces(self, x: Tensor) -> list[Tensor]:
        """A tensor shaped as q, cut into dense problems [P, G, N, D]: P key heads, each shared by G query heads."""
        group = self.case.heads // self.case.kv_heads
        if self.case.packed:
            return [part.transpose(0, 1).unflatten(0, (-1, group)) for part in x.split(self.case.packed)]
        return [x.unflatten(1, (-1, group)).flatten(0, 1)]

    def key_pieces(self, x: Tensor) -> list[Tensor]:
        """A tensor shaped as k, cut into the same problems: [P, M, D] each."""
        if self.case.packed:
            return [part.transpose(0, 1) for part in x.split(self.case.packed)]
        return [x.flatten(0, 1)]

    def ours(self, backend: str) -> Call:
        """`tilewise.attention`, or `attention_varlen` where packed, on `backend`.

        Raises:
            UnsupportedError: from the call, if a named backend cannot do this.
        """
        case, options = self.case, self._options(backend)
        if case.packed:
            longest = max(case.packed)
            sizes = (self.cu_seqlens, self.cu_seqlens, longest, longest)
            return lambda: cast("Tensor", tilewise.attention_varlen(self.q, self.k, self.v, *sizes, **options))
        return lambda: cast("Tensor", tilewise.attention(self.q, self.k, self.v, **options))

    def arguments(self, backend: str) -> Arguments:
        """What `ours(backend)` hands to the operator."""
        options = self._options(backend)
        if not self.case.packed:
            return build(*self.leaves, **options)
        longest = max(self.case.packed)
        packed = Packed(self.cu_seqlens, self.cu_seqlens, longest, longest)
        return build(*(x.transpose(0, 1)[None] for x in self.leaves), packed=packed, **options)

    def plan(self, backend: str) -> Plan[AttentionSpec]:
        """What `ours(backend)` does: the backend that runs, and why."""
        return route(self.arguments(backend).signature(), backend)[0]

    def _options(self, backend: str) -> dict[str, Any]:
        case = self.case
        window = None if case.window is None else (case.window, 0)
        options: dict[str, Any] = {"mask": None, "causal": case.causal, "window": window, "backend": backend}
        if case.sparsity is not None:
            options["mask"] = self.block_mask
        if case.dense_mask:
            options["mask"] = self.dense_mask
        return options
