"""What to compile ahead of time for sm_90: each configuration, forward and backward, with all it may be chosen for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from aot import Report, compiling, resources
from machine_code import unset_uniform_registers
from torch import Tensor

from tilewise.backends.base import Needs, Operands
from tilewise.backends.hopper import HOPPER, backward, launch, schedule
from tilewise.backends.hopper.configs import ForwardConfig, forward_config
from tilewise.masks.tensors import TileTensors
from tilewise.spec import AttentionSpec

SHARED_MEMORY = 227 << 10
"""Bytes that one block may have on sm_90 (CUDA C++ Programming Guide, technical specifications)."""

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
    "both": {"sink": True, "softcap": 30.0},
    "plain": {},
    "cap": {"softcap": 30.0},
    "sink": {"sink": True},
}


MAIN = ("attention_forward", "attention_backward", "attention_dkdv", "attention_dq")

OLD_ASSEMBLER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Triton 3.6 and 3.7 come with ptxas 12.8; later ones keep more values in memory."""

FORWARD_SPILLS = {("D128", "map", "both"): 8, ("D128", "map", "cap"): 8}
"""Bytes a thread: addresses of the output's buffer, read back once a tile. 0 in every other forward kernel."""

BACKWARD_SPILLS = {
    64: {"full": (0, 16), "tail": (0, 16), "causal": (16, 16), "shifted": (16, 16), "offsets": (24, 40),
         "window": (16, 24), "left": (16, 24), "map": (32, 40), "packed": (0, 0), "packed-causal": (56, 56),
         "packed-window": (0, 8)},
    128: {"full": (32, 48), "tail": (32, 48), "causal": (72, 80), "shifted": (72, 80), "offsets": (80, 80),
          "window": (72, 80), "left": (72, 64), "map": (152, 256), "packed": (40, 48), "packed-causal": (96, 88),
          "packed-window": (88, 96)},
}  # fmt: skip
"""Bytes of stack a thread without and with a soft cap, the most of Triton 3.6.0 and 3.7.1. The loop over fully visible
tiles spills 8 at most; the rest is in the masked one."""

NEWER_SPILLS = {"attention_forward": 72, "attention_backward": 440, "attention_dkdv": 72, "latent_decode": 136}
"""The most seen under Triton 3.9.0."""


def allowed_spills(target: Target, kernel: str) -> int:
    """Bytes a thread that a kernel is known to keep in memory."""
    if not OLD_ASSEMBLER:
        return NEWER_SPILLS.get(kernel, 0)
    if kernel == "attention_backward":
        return BACKWARD_SPILLS[target.dims[0]][target.geometry][target.extra in ("cap", "both")]
    name = f"D{target.dims[1]}"
    return FORWARD_SPILLS.get((name, target.geometry, target.extra), 0) if kernel == "attention_forward" else 0


class Target(NamedTuple):
    """One call to compile, forward or backward."""

    way: str
    dims: tuple[int, int]
    rows: int
    geometry: str
    extra: str
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.way}-D{self.dims[0]}x{self.dims[1]}-N{self.rows}-{self.geometry}-{self.extra}-{self.dtype}"

    @property
    def spec(self) -> AttentionSpec:
        options = {"k_len": self.rows} | GEOMETRIES[self.geometry] | EXTRAS[self.extra]
        keys = options.pop("k_len")
        return AttentionSpec(
            2, 4, 2, self.rows, keys, *self.dims, self.dtype, "sm_90", self.dims[0] ** -0.5, **options
        )  # fmt: skip

    @property
    def compiled_for(self) -> tuple[object, ...]:
        """All that decides what is compiled: targets that agree in it are one."""
        if self.way == "backward":
            return self
        return forward_config(self.spec), launch.plan(self.spec).constants, self.dtype


SHAPES = [
    ("backward", (64, 64), 4096), ("backward", (128, 128), 4096), ("backward", (256, 256), 4096),
    ("forward", (64, 64), 1024), ("forward", (64, 64), 16384), ("forward", (128, 128), 1024),
    ("forward", (128, 128), 16384), ("forward", (192, 128), 4096), ("forward", (256, 256), 4096),
]  # fmt: skip
"""Head dims and lengths; the length decides on the forward's configuration at 64 and 128."""


def every_target() -> list[Target]:
    """All that the backend takes; of the backward only the rows' statistics know of a sink."""
    found = [
        Target(way, dims, rows, geometry, extra, dtype)
        for way, dims, rows in SHAPES
        for geometry in GEOMETRIES
        for extra in EXTRAS
        for dtype in ("bfloat16", "float16")
        if way == "forward" or extra in ("plain", "cap") or geometry == "full"
    ]
    found = [target for target in found if HOPPER.why_not(target.spec) is None]
    found = [t for t in found if t.way == "forward" or t.dims[0] <= 128 or t.geometry != "map"]
    different = {target.compiled_for: target for target in reversed(found)}
    return list(reversed(different.values()))


def demanding_targets() -> list[Target]:
    """For every shape and geometry what needs most: in the forward all extras that the backend takes together there, in
    the backward the plain one too. Float16 needs what bfloat16 needs (the same to the byte in 66 pairs).
    """
    wanted: dict[tuple[object, ...], Target] = {}
    for target in every_target():
        if target.dtype == "bfloat16":
            apart = target.extra if target.way == "backward" else ""
            wanted.setdefault((target.way, target.dims, target.rows, target.geometry, apart), target)
    return list(wanted.values())


def compile_target(target: Target) -> list[Report]:
    """Compile the kernels of a call as its launcher launches them."""
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
    with compiling(90) as compiled:
        if target.way == "backward":
            backward.plan.cache_clear()  # it remembers what another target compiled
            backward.backward(out, lse, operands, out, lse, spec, None, Needs(sink=spec.sink))
        else:
            _forward(operands, spec, out, lse, integers)
    return [resources(kernel) for kernel in compiled]


def _forward(operands: Operands, spec: AttentionSpec, out: Tensor, lse: Tensor, integers: Any) -> None:
    """The forward's launcher, where it needs a device's multiprocessors or would look at a tile map's contents."""
    arrays: list[Any] = [integers(9)[1:] if field % 2 else integers(8) for field in range(8)]
    tiles = TileTensors(spec.q_len, spec.k_len, 1, 1, *arrays, integers(3, 128, 4)) if spec.mask else None
    before = launch.multiprocessors, schedule.of_tile_map
    launch.multiprocessors = lambda index: 132  # type: ignore[assignment]
    schedule.of_tile_map = lambda *_: (integers(8, 2), integers(200))
    try:
        launch.launch(operands, spec, launch.plan(spec), tiles, out, lse)
    finally:
        launch.multiprocessors, schedule.of_tile_map = before


def faults(target: Target, reports: list[Report]) -> list[str]:
    """What the compiled kernels must not do."""
    found = []
    for report in reports:
        if report.spills > allowed_spills(target, report.kernel):
            found.append(f"{report.kernel}: {report.spills} bytes spilled")
        if report.shared > SHARED_MEMORY:
            found.append(f"{report.kernel}: {report.shared} bytes of shared memory")
        if report.kernel in MAIN and "wgmma.mma_async" not in report.compiled.asm["ptx"]:
            found.append(f"{report.kernel}: no wgmma")
        found += [f"{report.kernel}: {line}" for line in unset_uniform_registers(report.compiled)]
    return found


def chosen(target: Target) -> ForwardConfig:
    return forward_config(target.spec)
