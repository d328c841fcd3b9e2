"""Arithmetic intensity against machine balance: is the memory the bound, or the matrix units, and how near is it?

A kernel of intensity I (FLOP a byte moved) attains at most `min(peak, I·bandwidth)`; the two meet where I equals the
machine balance `peak / bandwidth`. Source: Williams, Waterman & Patterson, "Roofline" (2009).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tilewise.cost.counts import forward_flops, ideal_traffic, itemsize, self_attention, standard_traffic
from tilewise.cost.hardware import Device
from tilewise.spec import AttentionSpec

SOFTMAX_OPERATIONS = 5


@dataclass(frozen=True, slots=True)
class Step:
    """Some work: FLOPs done and bytes moved between the chip and memory."""

    name: str
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """A step under the roof of a device."""

    step: Step
    balance: float
    """FLOP a byte of the device at this dtype."""
    bound: Literal["memory", "compute"]
    attainable: float
    """FLOP/s."""
    seconds: float
    """Least time that the roof allows."""

    def reached(self, seconds: float) -> float:
        """Part of the attainable rate that a measured time reaches."""
        return self.seconds / seconds


def place(step: Step, device: Device, dtype: str) -> Placement:
    """Where the roof of `device` puts the step, with matrix units working in `dtype`."""
    peak = device.peak(dtype)
    attainable = min(peak, step.intensity * device.bandwidth)
    bound = "memory" if step.intensity < device.balance(dtype) else "compute"
    return Placement(step, device.balance(dtype), bound, attainable, step.flops / attainable)


def standard_steps(spec: AttentionSpec) -> tuple[Step, Step, Step]:
    """QKᵀ, softmax and PV of standard attention as three kernels, with S and P in the spec's dtype.

    For N ≫ D in 16 bits QKᵀ and PV do `2·N·M·D` FLOPs on the 2 bytes of each score, so D FLOP a byte; softmax does 5
    operations on the 4 bytes that it reads and writes of each, so 1.25. (With N no more than D the operands weigh as
    much as the scores, and the intensity is below that.)
    """
    heads, n, m, d, dv = spec.batch * spec.heads, spec.q_len, spec.k_len, spec.head_dim, spec.v_head_dim
    size = itemsize(spec.dtype)
    scores = heads * n * m
    return (
        Step("QKᵀ", 2 * scores * d, (heads * (n + m) * d + scores) * size),
        Step("softmax", SOFTMAX_OPERATIONS * scores, 2 * scores * size),
        Step("PV", 2 * scores * dv, (scores + heads * (n + m) * dv) * size),
    )


def standard_step(spec: AttentionSpec) -> Step:
    """The two products of standard attention by all its traffic: D/2 FLOP a byte for N ≫ D in 16 bits.

    `4·N²·D` FLOPs on `4·N²` elements, as S and P are each written and read, are D FLOP an element. The quoted `2D` is
    an element too, not a byte, and counts two of the four trips (S written, P read).
    """
    return Step("standard", forward_flops(spec).matmul, standard_traffic(spec).bytes)


def flash_step(spec: AttentionSpec) -> Step:
    """The same FLOPs by the ideal traffic of a fused kernel: N/2 FLOP a byte in 16 bits; the quoted N is an element."""
    return Step("flash", forward_flops(spec).matmul, ideal_traffic(spec).bytes)


def dot_specs(arch: str, dtype: str) -> dict[str, AttentionSpec]:
    """The problems of the roofline's dots: one square, for standard and fused attention, and one decoding step."""
    if arch == "cpu":
        square = self_attention(1024, 64, heads=8, dtype=dtype)
        decode = AttentionSpec(8, 8, 8, 1, 4096, 64, 64, dtype=dtype, scale=64**-0.5)
    else:
        square = self_attention(8192, 128, heads=16, dtype=dtype)
        decode = AttentionSpec(16, 32, 8, 1, 8192, 128, 128, dtype=dtype, scale=128**-0.5)
    square, decode = replace(square, device=arch), replace(decode, device=arch)
    return {"standard": square, "flash": square, "decode": decode}


def dot_step(name: str, spec: AttentionSpec) -> Step:
    """Where the model puts a dot: the products' FLOPs on the method's own traffic."""
    step = standard_step(spec) if name == "standard" else flash_step(spec)
    return replace(step, name=name)
