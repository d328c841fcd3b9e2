"""The Hopper backend: FlashAttention-3's structure in Gluon, which ships inside Triton; forward and backward for sm_90.

What its backward kernels cannot serve is handed to the portable Triton kernels, which take the same `(out, lse)`; the
plan says so. Triton itself is imported by the first call that runs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from tilewise.backends.base import Gradients, Needs, Operands
from tilewise.backends.hopper.configs import ForwardConfig
from tilewise.backends.hopper.launch import ForwardPlan, plan
from tilewise.backends.triton import TRITON, import_obstacle, made_current
from tilewise.backends.triton.launch import TMA_SCORES, TritonPlan
from tilewise.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class HopperPlan:
    """The forward kernel's plan, and who computes the gradients."""

    forward: ForwardPlan
    obstacle: str | None
    """Why the gradients come from the Triton kernels, or None."""
    triton: TritonPlan | None

    @property
    def config(self) -> ForwardConfig:
        return self.forward.config

    def __str__(self) -> str:
        backward = "hopper" if self.obstacle is None else f"triton because {self.obstacle}"
        return f"forward {self.forward}; backward: {backward}"

    def _asdict(self) -> dict[str, object]:
        """A JSON-ready form, for `explain`."""
        return {"forward": self.config._asdict(), "backward": "hopper" if self.obstacle is None else self.obstacle}


@cache
def gluon_obstacle() -> str | None:
    """Why Gluon cannot be imported here, or None."""
    obstacle = import_obstacle()
    if obstacle is not None:
        return obstacle
    if importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper") is None:
        return "it needs Gluon's Hopper primitives, which come with Triton 3.6"
    return None


class HopperBackend:
    """`Backend` on Gluon kernels."""

    name = "hopper"

    def why_not(self, spec: AttentionSpec) -> str | None:
        if spec.device != "sm_90":
            return f"its kernels use wgmma and TMA as sm_90 has them, not {spec.device}"
        if spec.dtype not in ("float16", "bfloat16"):
            return f"its matrix products take float16 and bfloat16, not {spec.dtype}"
        if max(spec.head_dim, spec.v_head_dim) > 256:
            return "its accumulators hold head dims up to 256"
        if spec.head_dim % 8 or spec.v_head_dim % 8:
            return "the copy engine needs rows of a multiple of 16 bytes, so head dims that are multiples of 8"
        if spec.bias is not None or spec.relative is not None or spec.alibi:
            return "its softmax has no registers left for biases"
        if spec.dropout > 0.0:
            return "its softmax has no time left for dropout's random numbers"
        if spec.scale <= 0.0:
            return "it takes row maxima before it scales, so it needs a scale above zero"
        if spec.softcap is not None and spec.softcap > 1000.0:
            return "its tanh is right to 2·10⁻⁷ of the soft cap, too coarse for caps above 1000"
        if spec.packed and spec.mask is not None:
            return "a tile map has one geometry, and packed sequences have many: causal and window work without a map"
        if max(spec.head_dim, spec.v_head_dim) > 128 and spec.packed and spec.windowed and spec.softcap is not None:
            return "beside 256 columns of accumulators there are no registers for packed sequences, window and cap"
        return gluon_obstacle()

    def outrun_by(self, spec: AttentionSpec) -> tuple[str, str] | None:
        """Who is faster on a spec that this backend could serve, and why: `auto` takes that one."""
        rows, keys = (spec.q_total, spec.k_total) if spec.packed else (spec.batch * spec.q_len, spec.k_len)
        if spec.heads * rows * keys < TMA_SCORES:
            return "triton", "fewer than 2²⁶ scores: hopper's four descriptors, 10 µs each, take longer than the scores"
        left, right = spec.reach
        narrow = left is not None and right is not None and left + right <= 1024
        if narrow and spec.mask is None and not spec.packed and max(spec.head_dim, spec.v_head_dim) <= 64:
            return "triton", "windows up to 1024 at head dims up to 64: its tiles of 64 rows waste less at the edges"
        return None

    def configure(self, spec: AttentionSpec) -> HopperPlan:
        from tilewise.backends.hopper.backward import backward_obstacle

        obstacle = backward_obstacle(spec)
        return HopperPlan(plan(spec), obstacle, None if obstacle is None else TRITON.configure(spec))

    def forward(self, operands: Operands, spec: AttentionSpec, config: HopperPlan) -> tuple[Tensor, Tensor]:
        from tilewise.backends.hopper.launch import forward

        with made_current(operands.q):
            return forward(operands, spec, config.forward)

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        config: HopperPlan,
        needs: Needs,
    ) -> Gradients:
        if config.triton is not None:
            return TRITON.backward(dout, dlse, operands, out, lse, spec, config.triton, needs)
        from tilewise.backends.hopper.backward import backward

        with made_current(operands.q):
            return backward(dout, dlse, operands, out, lse, spec, config, needs)


HOPPER = HopperBackend()
