"""Peak memory of one call, backend by backend: what each allocates beyond its inputs, from sizes alone.

The forward's peak counts from before the call, its result included. The backward's counts from before the forward of
the same call, with dO there already: out and lse, which wait for it, and the gradients are included. What cannot be
known from sizes (the allocator's rounding, a library's workspace) is left out.
"""

from __future__ import annotations

from typing import Literal

from tilewise import errors
from tilewise.cost.counts import accumulator_itemsize, itemsize
from tilewise.spec import AttentionSpec

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
BACKENDS = ("standard", "tiled", "sdpa", "triton", "hopper")

TILE = 128
PLAIN_SCORES = 2**24
"""Scores that a tile of `tiled` written out may hold; tests compare it with the backend's own constant."""
PLAIN_ROWS = 512
PLAIN_KEYS = 4096
HOPPER_ROWS = 128
"""Rows that the Hopper backward works on as one pair of tiles."""


class _Sizes:
    """Bytes of the tensors that every backend has."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.narrow, self.wide = itemsize(spec.dtype), accumulator_itemsize(spec.dtype)
        self.rows = spec.batch * spec.heads * spec.q_len
        self.keys = spec.batch * spec.kv_heads * spec.k_len
        self.q, self.out = self.rows * spec.head_dim, self.rows * spec.v_head_dim
        self.k, self.v = self.keys * spec.head_dim, self.keys * spec.v_head_dim
        self.lse = self.rows * self.wide
        self.result = self.out * self.narrow + self.lse
        self.gradients = (self.q + self.k + self.v) * self.narrow
        self.casts = self.narrow != self.wide
        """Whether working in the accumulator dtype copies the operands."""

    def cast(self, elements: int) -> int:
        return elements * self.wide if self.casts else 0


def peak_bytes(spec: AttentionSpec, backend: str, direction: Pass = "forward") -> int:
    """Bytes at the peak of one call of `backend`, or of its forward and backward.

    Full, causal and windowed problems; a mask's bits and biases are not counted.

    Raises ValueError for an unknown backend or direction.
    """
    if backend not in BACKENDS:
        raise errors.bad_value("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    if direction not in PASSES:
        raise errors.bad_value("direction", repr(direction), f"one of {', '.join(PASSES)}")
    sizes = _Sizes(spec)
    if backend == "standard":
        return _standard(spec, sizes, direction)
    if backend == "tiled" and spec.device != "cpu":
        return _plain_tiles(spec, sizes, direction)
    if spec.device == "cpu":
        return _fused_on_cpu(spec, sizes, direction)
    if direction == "forward":
        return sizes.result
    widest = max(spec.head_dim, spec.v_head_dim)
    if backend == "hopper" and spec.dtype in ("float16", "bfloat16") and widest <= 128:
        # dQ is summed in float32 by many programs, in rows that are filled up to whole pairs of tiles.
        padded = spec.batch * spec.heads * -(-spec.q_len // HOPPER_ROWS) * HOPPER_ROWS
        width = 64 if widest <= 64 else 128
        return sizes.result + sizes.gradients + padded * (width + 2) * sizes.wide
    return sizes.result + sizes.gradients + 2 * sizes.rows * sizes.wide


def _fused_on_cpu(spec: AttentionSpec, sizes: _Sizes, direction: Pass) -> int:
    """ATen's kernel on one thread: a tile of scores and its output; bfloat16 also packs K and V, as it does where
    the CPU multiplies bfloat16 matrices itself.

    Its backward writes gradients as [B, N, H, D], which are then copied into the order of the inputs.
    """
    if direction == "backward":
        return sizes.result + 2 * sizes.gradients
    rows = 256 if spec.q_len >= 768 else 64 if spec.q_len >= 192 else 32
    keys = min(512, spec.k_len)
    tile = rows * keys * (sizes.wide + (sizes.narrow if sizes.casts else 0)) + rows * (spec.v_head_dim + 2) * sizes.wide
    packed = (sizes.k + sizes.v) * sizes.narrow if spec.dtype == "bfloat16" else 0
    return sizes.result + tile + packed


def _standard(spec: AttentionSpec, sizes: _Sizes, direction: Pass) -> int:
    """S, which becomes P in place; the backward holds dP beside it. Operands are copied where they must be widened."""
    scores = spec.batch * spec.heads * spec.q_len * spec.k_len * sizes.wide
    allowed = 2 * spec.q_len * spec.k_len if spec.causal or spec.windowed else 0
    if direction == "forward":
        at_scores = sizes.cast(sizes.k) + allowed
        at_output = sizes.cast(sizes.v) + sizes.out * sizes.wide + allowed // 2
        at_division = 2 * sizes.out * sizes.wide + 4 * sizes.lse + allowed // 2
        return sizes.result + sizes.cast(sizes.q) + scores + max(at_scores, at_output, at_division)
    held = sizes.cast(sizes.q) + sizes.out * sizes.wide + sizes.cast(sizes.k) + (sizes.k + sizes.v) * sizes.wide
    products = (sizes.v + max(sizes.k, sizes.q)) * sizes.wide
    return sizes.result + sizes.q * sizes.narrow + held + 2 * scores + products + allowed // 2


def plain_tile(spec: AttentionSpec) -> tuple[int, int, int]:
    """(batch entries, rows, keys) of the tiles of scores that `tiled` writes out without a fused kernel."""
    tall = min(PLAIN_ROWS, max(1, spec.q_len))
    batch = max(1, min(spec.batch, PLAIN_SCORES // (max(1, spec.heads) * tall * TILE)))
    fitting = PLAIN_SCORES // (tall * max(1, spec.heads) * batch) // TILE * TILE
    rows = tall if spec.reach == (None, None) else min(TILE, spec.q_len)
    return batch, rows, min(max(TILE, min(PLAIN_KEYS, fitting)), spec.k_len)


def _plain_tiles(spec: AttentionSpec, sizes: _Sizes, direction: Pass) -> int:
    """Tiles of scores written out, as `tiled` does without a fused kernel.

    While a tile is worked on, the result of the one before is still held, and with several key tiles its scores are.
    Under causality or a window a tile is one of the tile map, and each of up to 16 kept masks takes as much as a row.
    """
    batch, block_m, block_n = plain_tile(spec)
    several = spec.k_len > block_n
    score_tile = batch * spec.heads * block_m * block_n * sizes.wide
    q_rows, k_rows = batch * spec.heads * block_m, batch * spec.kv_heads * block_n
    d, dv = spec.head_dim, spec.v_head_dim
    held = 1 + (spec.q_len > block_m)
    masks = 8 * block_m * block_n * sizes.wide if spec.reach != (None, None) else 0
    if direction == "forward":
        # The second key tile, the shorter one where there are two, has the first one's scores beside its own.
        second = min(block_n, spec.k_len - block_n) if several else 0
        at_first = score_tile + sizes.cast(k_rows * d)
        at_second = score_tile + (score_tile + sizes.cast(k_rows * d)) * second // max(1, block_n)
        each = sizes.cast(q_rows * d) + (1 + held) * q_rows * dv * sizes.wide
        return sizes.result + masks + each + max(at_first, at_second)
    tiles = 2 * score_tile + (held * q_rows * d + q_rows * dv + k_rows * dv + max(k_rows, q_rows) * d) * sizes.wide
    casts = sizes.cast(q_rows * (d + dv) + k_rows * d)
    return sizes.result + masks + sizes.q * sizes.narrow + (sizes.k + sizes.v) * sizes.wide + tiles + casts
