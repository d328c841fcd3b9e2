"""Which implementation stands behind each (op, backend)."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from tilewise.backends.base import Needs, Operands
from tilewise.backends.hopper import HOPPER
from tilewise.backends.hopper.decoding import HOPPER_DECODE
from tilewise.backends.linear import STANDARD_LINEAR, TILED_LINEAR
from tilewise.backends.sdpa import SDPA
from tilewise.backends.standard import STANDARD
from tilewise.backends.standard_decode import STANDARD_DECODE
from tilewise.backends.tiled import TILED
from tilewise.backends.tiled_decode import TILED_DECODE
from tilewise.backends.triton import TRITON
from tilewise.backends.triton.decoding import TRITON_DECODE
from tilewise.backends.triton.linear import TRITON_LINEAR
from tilewise.spec import AttentionSpec


class Absent:
    """A backend that is known by name but not part of this version: it can always say so, and never runs."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason

    def why_not(self, spec: AttentionSpec) -> str:
        return self._reason

    def configure(self, spec: AttentionSpec) -> NoReturn:
        raise AssertionError(f"{self.name} was chosen for {spec} although it cannot run: {self._reason}")

    def forward(self, operands: Operands, spec: AttentionSpec, config: Any) -> NoReturn:
        self.configure(spec)

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        config: Any,
        needs: Needs,
    ) -> NoReturn:
        self.configure(spec)


REGISTRY: dict[tuple[str, str], Any] = {
    ("attention", "hopper"): HOPPER,
    ("attention", "triton"): TRITON,
    ("attention", "tiled"): TILED,
    ("attention", "sdpa"): SDPA,
    ("attention", "standard"): STANDARD,
    ("decode", "hopper"): HOPPER_DECODE,
    ("decode", "triton"): TRITON_DECODE,
    ("decode", "tiled"): TILED_DECODE,
    ("decode", "sdpa"): Absent("sdpa", "PyTorch's fused attention knows neither lengths nor pages"),
    ("decode", "standard"): STANDARD_DECODE,
    ("linear", "hopper"): Absent("hopper", "its kernels compute a softmax"),
    ("linear", "triton"): TRITON_LINEAR,
    ("linear", "tiled"): TILED_LINEAR,
    ("linear", "sdpa"): Absent("sdpa", "PyTorch's fused attention computes a softmax"),
    ("linear", "standard"): STANDARD_LINEAR,
}
