"""Launch shapes of the linear-attention kernels, as data."""

from __future__ import annotations

from typing import NamedTuple

from tilewise.backends.triton.configs import LARGE_SHARED
from tilewise.spec import LinearSpec

RECURRENT_TOKENS = 16
"""Up to as many tokens a sequence the recurrent kernel is used, which has no chunk to fill."""
RECURRENT_PACKED = 64
"""The same for packed tokens altogether."""


def largest_state(device: str) -> int:
    """Features or value columns that a state in registers may have; 256 need 104 KiB of shared memory."""
    return 256 if device in ("cpu", *LARGE_SHARED) else 128


class Walk(NamedTuple):
    """Launch shape of one walk: block_b columns of y, and the compiler's options."""

    block_b: int
    num_warps: int
    num_stages: int


class Shape(NamedTuple):
    """Launch shapes of one problem. A chunk is the same in all its kernels."""

    chunk: int
    out: Walk
    gradient: Walk
    sums: Walk
    inner_warps: int = 4
    whole: bool = False
    """Whether a program of what happens within a chunk owns the chunk, or 16 of its rows."""
    programs: int = 528
    """Walks that fill the device: segments are as long as this allows."""

    @property
    def inner_rows(self) -> int:
        return self.chunk if self.whole else 16

    def __str__(self) -> str:
        return f"chunks of {self.chunk}, walks of {self.out.block_b} columns, {self.out.num_warps} warps"


def _row(spec: LinearSpec) -> tuple[int, str]:
    size = max(spec.head_dim, spec.v_head_dim)
    plain = spec.feature_map == "identity" and not spec.normalize
    kind = "mapped" if spec.decay == "none" and not plain else spec.decay
    return 64 if size <= 64 else 128 if size <= 128 else 256, kind


def shape_for(spec: LinearSpec) -> Shape:
    """The launch shapes of a spec."""
    if spec.device == "cpu":
        return Shape(16, Walk(16, 4, 1), Walk(16, 4, 1), Walk(32, 4, 1), programs=8)
    size = max(spec.head_dim, spec.v_head_dim)
    if spec.dtype == "float32":
        narrow = Walk(32 if size <= 64 else 16, 4, 1)
        return Shape(32, narrow, narrow, Walk(32, 4, 1))
    shape = HALF[_row(spec)]
    # float16's gradients of a quotient are float32, and 64 rows of 256 of them do not fit.
    return shape._replace(chunk=32) if size > 128 and spec.dtype == "float16" and spec.normalize else shape


_STREAMED = Shape(64, Walk(64, 4, 2), Walk(64, 4, 2), Walk(64, 4, 2))
_LADEN = Shape(64, Walk(64, 4, 1), Walk(64, 4, 1), Walk(64, 4, 1))
_LARGE = Shape(64, Walk(64, 8, 1), Walk(64, 8, 1), Walk(64, 4, 1))
HALF = {
    (64, "none"): _STREAMED,
    (64, "mapped"): _STREAMED,
    (64, "token"): _STREAMED,
    (64, "channel"): _LADEN._replace(whole=True),
    (128, "none"): _STREAMED._replace(sums=Walk(128, 8, 3)),
    (128, "mapped"): _STREAMED,
    (128, "token"): _LADEN._replace(sums=Walk(64, 4, 2)),
    (128, "channel"): _LADEN._replace(whole=True),
    **{(256, kind): _LARGE for kind in ("none", "mapped", "token", "channel")},
}
"""float16 and bfloat16, by the larger of feature and value size, and by the decay; "mapped" has none, but a feature map
or a denominator.

Measured on an H200 (torch 2.11.0, Triton 3.6.0, bf16, B=1, N=16384, H·D=2048): (128, none) and (128, mapped) are the
fastest of 8 shapes each, (128, token) of 3, (128, channel) of 4 with chunks of 64; (64, none) ran alone. The others are
right there, and were not timed against other shapes. Whole chunks with gates a channel, forward and backward in ms:
0.744 and 2.054 for 0.841 and 2.749 by pieces at D = 128, 0.484 and 1.434 for 0.562 and 1.824 at D = 64; with 8 warps
0.863 and 2.295, 0.553 and 1.643.

Rows of every tile are 128 bytes or more: with narrower ones beside them, which have another swizzle, the assembler of
CUDA 12.8 builds wrong matrix descriptors (seen as wrong sums and illegal accesses with walks of 32 columns).
"""
