"""FLOPs of exact attention, and the HBM traffic of what does not tile it, from sizes alone (tiles.py has what does).

Conventions: one multiply-add is 2 FLOPs; softmax is 5 operations a visible score (shift, max, exp, sum, divide);
accumulators and row statistics are float32, or float64 where the inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tilewise import errors
from tilewise.spec import AttentionSpec

ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "tfloat32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
}
"""Bytes an element, by dtype name."""


def itemsize(dtype: str) -> int:
    """Bytes an element. Raises ValueError for an unknown dtype name."""
    if dtype not in ITEMSIZE:
        raise errors.bad_value("dtype", repr(dtype), f"one of {', '.join(ITEMSIZE)}")
    return ITEMSIZE[dtype]


def accumulator_itemsize(dtype: str) -> int:
    """Bytes of a score, a sum or a row statistic for inputs of `dtype`."""
    return 8 if dtype == "float64" else 4


def self_attention(
    seq: int,
    head_dim: int = 64,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    dtype: str = "float16",
    causal: bool = False,
) -> AttentionSpec:
    """The problem that most tables are about: N = M = seq, D = Dv = head_dim."""
    return AttentionSpec(
        batch=batch,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        q_len=seq,
        k_len=seq,
        head_dim=head_dim,
        v_head_dim=head_dim,
        dtype=dtype,
        scale=head_dim**-0.5,
        causal=causal,
    )


def diagonal(spec: AttentionSpec) -> int:
    """Position of row 0: row i stands at key `i + diagonal`. Bottom-right (`M − N`) unless the spec has an offset.

    Raises ValueError for a packed spec, and for an offset that only the device knows.
    """
    if spec.packed:
        raise errors.bad_value("spec", "a packed problem", "one dense problem", "sum the costs of its sequences")
    if spec.q_offset == "tensor":
        raise errors.bad_value("spec.q_offset", "a tensor", "an integer or None", "count at the offset that it holds")
    return spec.k_len - spec.q_len if spec.q_offset is None else spec.q_offset


def visible_scores(spec: AttentionSpec) -> int:
    """Scores of one head that are not forbidden by causality or the window; exact, and in constant time.

    A mask expression is not evaluated: all that the rest allows counts as visible.
    """
    offset = diagonal(spec)
    left, right = spec.window
    if spec.causal:
        right = 0 if right is None else min(right, 0)
    total = spec.q_len * spec.k_len
    upto_right = total if right is None else _at_or_left_of(offset + right, spec.q_len, spec.k_len)
    before_left = 0 if left is None else _at_or_left_of(offset - left - 1, spec.q_len, spec.k_len)
    return upto_right - before_left


def _at_or_left_of(diag: int, rows: int, cols: int) -> int:
    """Number of (i, j), 0 ≤ i < rows and 0 ≤ j < cols, with j ≤ i + diag."""

    def clamped_sum(last: int) -> int:
        """Σ min(x, cols) over 0 < x ≤ last."""
        if last <= 0:
            return 0
        ramp = min(last, cols)
        return ramp * (ramp + 1) // 2 + (last - ramp) * cols

    return clamped_sum(rows + diag) - clamped_sum(diag)


def conventional_scores(spec: AttentionSpec) -> float:
    """Scores of one head as benchmarks count them: N·M, halved when causal, whatever the diagonal takes exactly."""
    return spec.q_len * spec.k_len * (0.5 if spec.causal else 1.0)


class Flops(NamedTuple):
    matmul: float
    softmax: float

    @property
    def total(self) -> float:
        return self.matmul + self.softmax


def forward_flops(spec: AttentionSpec, scores: float | None = None) -> Flops:
    """`2·B·H·scores·(D + Dv)` for QKᵀ and PV, and `5·B·H·scores` for softmax.

    `scores` is their number in one head: `visible_scores` unless given (`conventional_scores`, or a tile map's count).
    With N = M, D = Dv and no mask this is `4·B·H·N²·D + 5·B·H·N²`.
    """
    each = spec.batch * spec.heads * (visible_scores(spec) if scores is None else scores)
    return Flops(2 * each * (spec.head_dim + spec.v_head_dim), 5 * each)


def backward_flops(spec: AttentionSpec, scores: float | None = None) -> Flops:
    """Five products, `2·B·H·scores·(3D + 2Dv)`: QKᵀ again, PᵀdO, dO·Vᵀ, dS·K, dSᵀQ. With D = Dv, 2.5× the forward's.

    Per score also scale, subtract lse, exp, subtract delta and multiply: 5 again.
    """
    each = spec.batch * spec.heads * (visible_scores(spec) if scores is None else scores)
    return Flops(2 * each * (3 * spec.head_dim + 2 * spec.v_head_dim), 5 * each)


@dataclass(frozen=True, slots=True)
class Traffic:
    """HBM traffic over all batches and heads, in elements of two kinds."""

    read: int
    """Elements in the inputs' dtype."""
    written: int
    wide_read: int = 0
    """Elements in the accumulator dtype: scores, partial outputs, row statistics."""
    wide_written: int = 0
    itemsize: int = 4
    wide_itemsize: int = 4

    @property
    def elements_read(self) -> int:
        return self.read + self.wide_read

    @property
    def elements_written(self) -> int:
        return self.written + self.wide_written

    @property
    def elements(self) -> int:
        return self.elements_read + self.elements_written

    @property
    def bytes_read(self) -> int:
        return self.read * self.itemsize + self.wide_read * self.wide_itemsize

    @property
    def bytes_written(self) -> int:
        return self.written * self.itemsize + self.wide_written * self.wide_itemsize

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


def traffic_of(spec: AttentionSpec, read: int, written: int, wide_read: int = 0, wide_written: int = 0) -> Traffic:
    wide = accumulator_itemsize(spec.dtype)
    return Traffic(read, written, wide_read, wide_written, itemsize(spec.dtype), wide)


def ideal_traffic(spec: AttentionSpec) -> Traffic:
    """What no exact method can beat: Q, K, V read once, O written once. `4·N·D` a head for MHA with N = M, D = Dv."""
    q_rows = spec.batch * spec.heads * spec.q_len
    k_rows = spec.batch * spec.kv_heads * spec.k_len
    return traffic_of(
        spec, q_rows * spec.head_dim + k_rows * (spec.head_dim + spec.v_head_dim), q_rows * spec.v_head_dim
    )


def standard_traffic(spec: AttentionSpec) -> Traffic:
    """Three kernels (QKᵀ, softmax, PV): Q, K, V and O once, S and P each written once and read once.

    `4·N·D + 4·N²` a head for N = M, D = Dv, with S and P in the inputs' dtype as frameworks keep them. Each query head
    reads its own K and V, as after a repeat. Causality saves nothing: the forbidden scores are computed and moved.
    """
    heads, n, m = spec.batch * spec.heads, spec.q_len, spec.k_len
    inputs = n * spec.head_dim + m * (spec.head_dim + spec.v_head_dim)
    return traffic_of(spec, heads * (inputs + 2 * n * m), heads * (n * spec.v_head_dim + 2 * n * m))


def six_step_traffic(spec: AttentionSpec) -> Traffic:
    """Six kernels (scores, row max, exp, row sum, normalise, times V), each from HBM to HBM.

    The N×M matrix is written 3 times and read 5 times, in the accumulator dtype; m and l are written once and read
    once. Equals the counters of `reference.standard.six_step_attention`.
    """
    heads, n, m = spec.batch * spec.heads, spec.q_len, spec.k_len
    inputs = n * spec.head_dim + m * (spec.head_dim + spec.v_head_dim)
    return traffic_of(
        spec,
        heads * inputs,
        heads * n * spec.v_head_dim,
        wide_read=heads * (5 * n * m + 2 * n),
        wide_written=heads * (3 * n * m + 2 * n),
    )
