"""Which forward kernels to compile ahead of time for sm_90: each configuration with all it may be chosen for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from aot import Report, compiling, resources
from torch import Tensor

from tilewise.backends.base import Operands
from tilewise.backends.hopper import HOPPER, configs, launch, schedule
from tilewise.backends.hopper.configs import ForwardConfig, forward_config
from tilewise.masks.tensors import TileTensors
from tilewise.spec import AttentionSpec

SHARED_MEMORY = 227 << 10
"""Bytes that one block may have on sm_90."""

SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 72
"""Bytes a thread that may be spilled: none with the assembler of Triton 3.6 and 3.7; that of 3.9 keeps some tile-level
values in memory, for windows at D = 128 and shifted diagonals at D = 256."""

GEOMETRIES: dict[str, dict[str, Any]] = {
    "full": {},
    "tail": {"k_len": 4000},
    "causal": {"causal": True},
    "shifted": {"causal": True, "q_offset": 17},
    "offsets": {"causal": True, "q_offset": "tensor"},
    "window": {"window": (1000, 5)},
    "left": {"window": (1000, None)},
    "map": {"mask": "causal()"},
    "packed": {"packed": True, "q_total": 8192, "k_total": 8192},
    "packed-causal": {"packed": True, "q_total": 8192, "k_total": 8192, "causal": True},
    "packed-window": {"packed": True, "q_total": 8192, "k_total": 8192, "window": (1000, 5)},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sink": {"sink": True},
    "cap": {"softcap": 30.0},
    "both": {"sink": True, "softcap": 30.0},
}


class ForwardTarget(NamedTuple):
    dims: tuple[int, int]
    rows: int
    geometry: str
    extra: str
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"D{self.dims[0]}x{self.dims[1]}-N{self.rows}-{self.geometry}-{self.extra}-{self.dtype}"

    @property
    def spec(self) -> AttentionSpec:
        options = {"k_len": self.rows} | GEOMETRIES[self.geometry] | EXTRAS[self.extra]
        keys = options.pop("k_len")
        return AttentionSpec(
            2, 4, 2, self.rows, keys, *self.dims, self.dtype, "sm_90", self.dims[0] ** -0.5, **options
        )  # fmt: skip


SHAPES = [
    ((64, 64), 1024), ((64, 64), 16384), ((128, 128), 1024), ((128, 128), 16384), ((192, 128), 4096),
    ((256, 256), 4096),
]  # fmt: skip
"""Head dims and lengths; the length decides at 64 and 128."""


def every_target() -> list[ForwardTarget]:
    """All that the backend takes."""
    found = [
        ForwardTarget(dims, rows, geometry, extra, dtype)
        for dims, rows in SHAPES
        for geometry in GEOMETRIES
        for extra in EXTRAS
        for dtype in ("bfloat16", "float16")
        if dtype == "bfloat16" or extra == "plain"
    ]
    return [target for target in found if HOPPER.why_not(target.spec) is None]


def compile_forward(target: ForwardTarget) -> Report:
    """Compile the forward kernel as the launcher launches it."""
    spec, dtype = target.spec, getattr(torch, target.dtype)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.int32)

    leading = 1 if spec.packed else spec.batch
    operands = Operands(
        meta(leading, spec.heads, spec.q_len, spec.head_dim),
        meta(leading, spec.kv_heads, spec.k_len, spec.head_dim),
        meta(leading, spec.kv_heads, spec.k_len, spec.v_head_dim),
        sink=meta(spec.heads) if spec.sink else None,
        q_offset=integers(spec.batch) if spec.q_offset == "tensor" else None,
        cu_seqlens_q=integers(spec.batch + 1) if spec.packed else None,
        cu_seqlens_k=integers(spec.batch + 1) if spec.packed else None,
    )
    out = meta(leading, spec.heads, spec.q_len, spec.v_head_dim)
    lse = meta(leading, spec.heads, spec.q_len, dtype=torch.float32)
    arrays: list[Any] = [integers(9)[1:] if field % 2 else integers(8) for field in range(8)]
    tiles = TileTensors(spec.q_len, spec.k_len, 1, 1, *arrays, integers(3, 128, 4)) if spec.mask else None
    before = launch.multiprocessors, schedule.of_tile_map
    launch.multiprocessors = lambda index: 132  # type: ignore[assignment]
    schedule.of_tile_map = lambda *_: (integers(8, 2), integers(200))
    try:
        with compiling(90) as compiled:
            launch.launch(operands, spec, launch.plan(spec), tiles, out, lse)
    finally:
        launch.multiprocessors, schedule.of_tile_map = before
    return resources(compiled[-1])


def faults(target: ForwardTarget, report: Report) -> list[str]:
    """What the compiled kernel must not do."""
    found = []
    if report.spills > SPILLS:
        found.append(f"{report.spills} bytes spilled")
    if report.shared > SHARED_MEMORY:
        found.append(f"{report.shared} bytes of shared memory")
    if report.compiled.asm["ptx"].count("wgmma.mma_async") == 0:
        found.append("no wgmma")
    return found


def chosen(target: ForwardTarget) -> ForwardConfig:
    return forward_config(target.spec)


NAMES = {value: name for name, value in vars(configs).items() if isinstance(value, ForwardConfig)}
