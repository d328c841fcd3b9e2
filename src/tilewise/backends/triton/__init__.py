"""The portable GPU backend: Triton kernels for every variant, mask and dtype, forward and backward.

Triton itself is imported by the first call that runs. Where that would fail, `why_not` gives the reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from tilewise.backends.base import Gradients, Needs, Operands
from tilewise.backends.triton.configs import largest_head_dim
from tilewise.backends.triton.launch import NO_LIMIT, TritonPlan, plan, tile_tensors
from tilewise.spec import AttentionSpec, LinearSpec


@cache
def import_obstacle() -> str | None:
    """Why Triton cannot be imported here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU: its own debugging switch, read when Triton is
    imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def made_current(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which must be the tensors' own."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def device_obstacle(spec: AttentionSpec | LinearSpec) -> str | None:
    """Why no kernel runs on the device of `spec`, or None."""
    if spec.device == "cpu":
        if not interpreting():
            return "it runs on GPUs (TRITON_INTERPRET=1 interprets its kernels on the CPU, for tests)"
        if spec.dtype == "bfloat16":
            return "Triton's interpreter multiplies bfloat16 matrices wrongly"
        return import_obstacle()
    found = re.fullmatch(r"sm_(\d+)", spec.device)
    if found is None:
        return f"its tile shapes are tested on NVIDIA GPUs only, not on {spec.device}"
    if int(found[1]) < 80:
        return f"its tile shapes are for sm_80 and newer, not for {spec.device}"
    return import_obstacle()


class TritonBackend:
    """`Backend` on Triton kernels."""

    name = "triton"

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.dtype not in ("float32", "float16", "bfloat16"):
            return f"its kernels compute in float32 at most, not in {spec.dtype}"
        largest = largest_head_dim(spec.device)
        if max(spec.head_dim, spec.v_head_dim) > largest:
            return f"its tiles hold head dims up to {largest} on {spec.device}"
        if spec.packed and spec.mask is not None:
            return "a tile map has one geometry, and packed sequences have many: causal and window work without a map"
        if spec.packed and spec.bias is not None:
            return "a dense bias has no place in packed sequences: relative and ALiBi biases do"
        if isinstance(spec.q_offset, int) and abs(spec.q_offset) + spec.q_len + spec.k_len >= NO_LIMIT:
            return f"its positions are 32-bit integers, and a window side stands for no limit from {NO_LIMIT} keys on"
        return device_obstacle(spec)

    def configure(self, spec: AttentionSpec) -> TritonPlan:
        return plan(spec)

    def forward(self, operands: Operands, spec: AttentionSpec, config: TritonPlan) -> tuple[Tensor, Tensor]:
        from tilewise.backends.triton.forward import forward

        with made_current(operands.q):
            return forward(operands, config, tile_tensors(operands, spec, transposed=False))

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        config: TritonPlan,
        needs: Needs,
    ) -> Gradients:
        from tilewise.backends.triton.backward import backward

        tiles = tile_tensors(operands, spec, transposed=False)
        transposed = tile_tensors(operands, spec, transposed=True)
        with made_current(operands.q):
            return backward(dout, dlse, operands, out, lse, config, tiles, transposed, needs)


TRITON = TritonBackend()
