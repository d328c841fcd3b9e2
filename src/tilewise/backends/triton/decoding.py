"""`DecodeBackend` on Triton kernels."""

from __future__ import annotations

import re

from torch import Tensor

from tilewise.backends.decoding import DecodeOperands
from tilewise.backends.triton import import_obstacle, interpreting, made_current
from tilewise.backends.triton.configs import LARGE_SHARED
from tilewise.backends.triton.decode_launch import DecodePlan, forward, plan
from tilewise.spec import DecodeSpec


class TritonDecode:
    """Split-KV decoding in Triton, on any GPU from sm_80."""

    name = "triton"

    def why_not(self, spec: DecodeSpec) -> str | None:
        if spec.dtype not in ("float32", "float16", "bfloat16"):
            return f"its kernels compute in float32 at most, not in {spec.dtype}"
        largest = 512 if spec.device in ("cpu", *LARGE_SHARED) else 256
        if spec.v_head_dim > largest or (spec.head_dim > largest and not spec.latent):
            return f"its tiles hold head dims up to {largest} on {spec.device}"
        if spec.latent and spec.head_dim - spec.v_head_dim > 128:
            return "its latent tiles hold up to 128 columns beside the values"
        if spec.int8 and (spec.latent or spec.head_dim % 2 or spec.v_head_dim % 2):
            return "it reads int8 keys and values of even head dims, two at a time"
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

    def configure(self, spec: DecodeSpec) -> DecodePlan:
        return plan(spec)

    def forward(self, operands: DecodeOperands, spec: DecodeSpec, config: DecodePlan) -> tuple[Tensor, Tensor]:
        with made_current(operands.q):
            return forward(operands, config, spec)


TRITON_DECODE = TritonDecode()
