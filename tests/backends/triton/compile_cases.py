"""Which kernels to compile ahead of time: every row of the tables under feature sets that cover all pairs of
features."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

import torch
from aot import Report, compiling, resources
from machine_code import unset_uniform_registers
from torch import Tensor

from tilewise.backends.base import Needs, Operands
from tilewise.backends.triton import TRITON
from tilewise.backends.triton.backward import backward
from tilewise.backends.triton.configs import BUCKETS, largest_head_dim
from tilewise.backends.triton.forward import forward
from tilewise.masks.tensors import TileTensors
from tilewise.spec import AttentionSpec

FEATURES = (
    "causal", "window", "offsets", "packed", "mask", "bias", "relative", "alibi", "softcap", "sink", "dropout", "odd",
)  # fmt: skip
APART = ({"packed", "mask"}, {"packed", "bias"}, {"bias", "relative"})
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes that one block may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


class Target(NamedTuple):
    """One thing to compile: all kernels of a call, forward and backward."""

    arch: int
    dtype: str
    dim: int
    features: frozenset[str]

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.dtype}-D{self.dim}-{'+'.join(sorted(self.features)) or 'plain'}"


def covering() -> list[frozenset[str]]:
    """Feature sets such that every allowed pair of features is together in one, and the empty set. Greedy, so not
    minimal."""
    open_pairs = [set(pair) for pair in combinations(FEATURES, 2) if set(pair) not in APART]
    sets = [frozenset[str]()]
    while open_pairs:
        chosen = set(open_pairs[0])
        for name in FEATURES:
            grown = chosen | {name}
            if len(grown) <= 5 and not any(pair <= grown for pair in APART):
                gain = sum(pair <= grown for pair in open_pairs) - sum(pair <= chosen for pair in open_pairs)
                chosen = grown if gain else chosen
        sets.append(frozenset(chosen))
        open_pairs = [pair for pair in open_pairs if not pair <= chosen]
    return sets


def every_target(arch: int) -> list[Target]:
    dtypes = ("bfloat16", "float32")
    dims = [dim for dim in BUCKETS if dim <= largest_head_dim(f"sm_{arch}")]
    return [Target(arch, dtype, dim, features) for dtype in dtypes for dim in dims for features in covering()]


def compile_target(target: Target) -> list[Report]:
    """Compile the forward and backward kernels of `target`, as their launchers launch them."""
    has, dtype = target.features.__contains__, getattr(torch, target.dtype)
    batch, heads, kv_heads, n, m = 2, 4, 2, 4096, 4096
    dim = target.dim - 5 if has("odd") else target.dim

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.int32)

    leading = 1 if has("packed") else batch
    operands = Operands(
        meta(leading, heads, n, dim),
        meta(leading, kv_heads, m, dim),
        meta(leading, kv_heads, m, dim),
        bias=meta(1, heads, n, m) if has("bias") else None,
        relative=meta(heads, 41) if has("relative") else None,
        alibi=meta(1, heads, dtype=torch.float32) if has("alibi") else None,
        sink=meta(heads) if has("sink") else None,
        q_offset=integers(batch) if has("offsets") else None,
        cu_seqlens_q=integers(batch + 1) if has("packed") else None,
        cu_seqlens_k=integers(batch + 1) if has("packed") else None,
        seed=meta(1, dtype=torch.int64) if has("dropout") else None,
    )
    spec = AttentionSpec(
        batch, heads, kv_heads, n, m, dim, dim, target.dtype, f"sm_{target.arch}", dim**-0.5,
        causal=has("causal"), window=(256, None) if has("window") else (None, None),
        q_offset="tensor" if has("offsets") else None, mask="causal()" if has("mask") else None,
        bias=(1, heads, n, m) if has("bias") else None, relative=20 if has("relative") else None, alibi=has("alibi"),
        softcap=30.0 if has("softcap") else None, sink=has("sink"), dropout=0.1 if has("dropout") else 0.0,
        packed=has("packed"),
    )  # fmt: skip
    plan = TRITON.configure(spec)
    arrays: list[Any] = [integers(9)[1:] if field % 2 else integers(8) for field in range(8)]
    tiles = TileTensors(n, m, 1, 1, *arrays, integers(3, 128, 4)) if has("mask") else None
    with compiling(target.arch) as compiled:
        out, lse = forward(operands, plan, tiles)
        needs = Needs(bias=has("bias"), relative=has("relative"))
        dout, dlse = meta(leading, heads, n, dim), meta(leading, heads, n, dtype=torch.float32)
        backward(dout, dlse, operands, out, lse, plan, tiles, tiles, needs)
    return [resources(kernel) for kernel in compiled]


def faults(target: Target, reports: list[Report]) -> list[str]:
    """What is wrong with the compiled kernels: too much shared memory, or machine code that reads what nobody wrote."""
    limit = SHARED_MEMORY[target.arch]
    found = [f"{r.kernel}: {r.shared} bytes of shared memory, {limit} allowed" for r in reports if r.shared > limit]
    if target.arch == 90:
        found += [f"{r.kernel}: {line}" for r in reports for line in unset_uniform_registers(r.compiled)]
    return found
