"""Linear attention on Triton: from operands to launches.

Forward: what segments add (`segment_sums`), what they begin with (`scan_segments`), and one walk for the outputs; the
first two only where there is more than one segment. Backward: the forward states again, the gradients of the states the
same way from the other end, and one walk each for dq, dk and dv. A decay per channel adds the running sums of its logs
and what happens within chunks. A few tokens go through the recurrent kernel instead.

Segments divide the tokens so that the walks fill the device, and no further: each costs a second read of its keys and
values. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewise.backends.base import empty_ordered
from tilewise.backends.linear import LinearGradients, LinearOperands, LinearResult
from tilewise.backends.triton import device_obstacle, made_current
from tilewise.backends.triton.launch import unit_last
from tilewise.backends.triton.linear_configs import (
    RECURRENT_PACKED,
    RECURRENT_TOKENS,
    Shape,
    Walk,
    largest_state,
    shape_for,
)
from tilewise.spec import LinearSpec

DECAYS = {"none": 0, "token": 1, "channel": 2}
FEATURES = {"identity": 0, "elu": 1, "relu": 2}
OUT, DQ, DV, DK = 0, 1, 2, 3


class LinearPlan(NamedTuple):
    """What a spec decides before any tensor is seen."""

    shape: Shape
    recurrent: bool
    length: int
    """Tokens a segment, whole chunks."""
    compiled: dict[Any, Any]
    """Compiled kernels by what they were compiled for; see `_launch`."""

    def __str__(self) -> str:
        if self.recurrent:
            return "recurrent, token by token"
        return f"{self.shape}, segments of {self.length} tokens"


class Cut(NamedTuple):
    """The segments of all sequences, and where to find them: the arguments from cu_ptr and from segments on."""

    slots: int
    tables: tuple[Tensor | None, Tensor | None, Tensor | None]
    segments: int
    tokens: int
    length: int


_REMEMBERED = 4096
"""Launches that a plan remembers; other lengths are other launches."""


def _launch(
    config: LinearPlan,
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
) -> None:
    """Run `kernel` on a grid of `programs` with `arguments`, which its compile-time parameters follow.

    As in the dense engine's `launch`, what Triton answered is remembered, since looking a kernel up takes longer than a
    few thousand tokens do: here by every number and every type, where all tensors are aligned.
    """
    values = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    key = None
    if not any(x.data_ptr() & 15 for x in tensors):
        numbers = (x.dtype if isinstance(x, Tensor) else x for x in arguments)
        key = (kernel, tensors[0].device.index, num_warps, num_stages, *values, *numbers)
        compiled = config.compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*arguments, *values)
            return
    compiled = kernel[(programs,)](
        *arguments, *values, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
    )
    if key is not None and compiled is not None:
        if len(config.compiled) >= _REMEMBERED:
            config.compiled.clear()
        config.compiled[key] = compiled


class TritonLinear:
    """`LinearBackend` on Triton kernels."""

    name = "triton"

    def why_not(self, spec: LinearSpec) -> str | None:
        if spec.dtype not in ("float32", "float16", "bfloat16"):
            return f"its kernels compute in float32 at most, not in {spec.dtype}"
        if spec.delta:
            return "it has no kernel for the delta rule"
        largest = largest_state(spec.device)
        if max(spec.head_dim, spec.v_head_dim) > largest:
            return f"it keeps states of up to {largest} features and value columns in registers on {spec.device}"
        return device_obstacle(spec)

    def configure(self, spec: LinearSpec) -> LinearPlan:
        shape = shape_for(spec)
        few = spec.q_len <= (RECURRENT_PACKED if spec.packed else RECURRENT_TOKENS)
        tokens = max(spec.q_len, spec.k_len)
        blocks = -(-spec.v_head_dim // shape.out.block_b)
        walks = spec.heads * blocks * (1 if spec.packed else spec.batch)
        wanted = max(1, -(-shape.programs // max(1, walks)))
        length = max(4 * shape.chunk, 1 << max(0, (-(-tokens // wanted) - 1).bit_length()))
        return LinearPlan(shape, few and spec.causal, length, {})

    def forward(self, operands: LinearOperands, spec: LinearSpec, config: LinearPlan, *, state: bool) -> LinearResult:
        with made_current(operands.q):
            return _Call(operands, spec, config).forward(state)

    def backward(
        self,
        dout: Tensor,
        ds: Tensor | None,
        dz: Tensor | None,
        operands: LinearOperands,
        out: Tensor,
        den: Tensor | None,
        spec: LinearSpec,
        config: LinearPlan,
        decay_gradient: bool,
    ) -> LinearGradients:
        with made_current(operands.q):
            return _Call(operands, spec, config).backward(dout, ds, dz, out, den, decay_gradient)


class _States(NamedTuple):
    """What every segment begins with (or, going back, the gradient of what it ends with), and what follows the last."""

    s: Tensor | None
    z: Tensor | None
    end_s: Tensor | None
    end_z: Tensor | None
    crossing: Tensor | None


class _Call:
    """One call: the operands, ready for the kernels, and the launches that forward and backward share."""

    def __init__(self, operands: LinearOperands, spec: LinearSpec, config: LinearPlan) -> None:
        self.spec, self.config = spec, config
        self.q, self.k, self.v = (unit_last(x) for x in operands[:3])
        self.decay = operands.decay
        if self.decay is not None and self.decay.dim() == 4:
            self.decay = unit_last(self.decay)
        self.first_s = None if operands.s is None else operands.s.contiguous()
        self.first_z = None if operands.z is None else operands.z.contiguous()
        self.cu_seqlens = operands.cu_seqlens
        self.queries = self._cut(self.q.shape[2])
        self.keys = self.queries if spec.causal else self._cut(self.k.shape[2])
        self.sizes = (self.q.shape[3], self.v.shape[3])
        self.least = min(64, config.shape.out.block_b)
        self.flags: dict[str, Any] = {
            "DECAY": DECAYS[spec.decay],
            "EXCLUSIVE": spec.exclusive,
            "FEATURE": FEATURES[spec.feature_map],
            "SCALED": spec.scale != 1.0,
            "NORMALIZE": spec.normalize,
            "PACKED": spec.packed,
            "PRECISION": "tf32" if spec.dtype == "float16" else "tf32x3" if max(self.sizes) <= 64 else "ieee",
        }
        """Compile-time parameters that kernels share; each takes those it has."""
        self.gate: Tensor | None = self.decay

    def _cut(self, tokens: int) -> Cut:
        spec, length = self.spec, self.config.length
        if self.cu_seqlens is None:
            segments = -(-tokens // length)
            return Cut(spec.batch * segments, (None, None, None), segments, tokens, length)
        slots = tokens // length + spec.batch
        lengths = self.cu_seqlens.diff()
        counts = (lengths + (length - 1)).div(length, rounding_mode="floor").cumsum(0, dtype=torch.int32)
        first_slot = torch.nn.functional.pad(counts, (1, 0))
        every = torch.arange(slots, dtype=torch.int32, device=self.q.device)
        sequence = torch.searchsorted(first_slot, every, right=True, out_int32=True) - 1
        sequence = sequence.masked_fill(sequence >= spec.batch, -1)
        return Cut(slots, (self.cu_seqlens, sequence, first_slot), 0, tokens, length)

    def _gate_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.gate is None else self.gate.stride()[:3]

    def forward(self, state: bool) -> LinearResult:
        spec, q = self.spec, self.q
        out = empty_ordered(q, self.sizes[1])
        den = q.new_empty(q.shape[:3], dtype=torch.float32) if spec.normalize else None
        if self.config.recurrent:
            return self._recur(out, den, state)
        inner = self._inner_scores()
        states = self._forward_states(end=state)
        if self.queries.slots:
            self._walk(OUT, (q, self.k, self.v), out, None, states, self.queries, None, den, inner)
        if self.k.shape[2] == 0 and not spec.packed:
            out.zero_()
        return LinearResult(out, den, states.end_s, states.end_z)

    def backward(
        self,
        dout: Tensor,
        ds: Tensor | None,
        dz: Tensor | None,
        out: Tensor,
        den: Tensor | None,
        decay_gradient: bool,
    ) -> LinearGradients:
        spec = self.spec
        grads = [empty_ordered(x, x.shape[3]) for x in (self.q, self.k, self.v)]
        dq, dk, dv = grads
        gates = decay_gradient and spec.decay != "none"
        dout, e = self._denominator(unit_last(dout), out, den)
        inner = self._inner_scores()
        ahead = self._forward_states(end=gates or not spec.causal)
        back = self._backward_states(dout, e, ds, dz, ahead if gates else None)
        inner_q, inner_k = self._inner_gradients(dout, e)
        moved_q = self._moved(dq) if gates else None
        moved_k = self._moved(dk) if gates else None
        if self.queries.slots:
            self._walk(DQ, (dout, self.v, self.k), dq, self.q, ahead, self.queries, e, None, inner_q, moved_q)
        if self.keys.slots:
            self._walk(DV, (self.k, self.q, dout), dv, None, back, self.keys, None, None, inner)
            self._walk(DK, (self.v, dout, self.q), dk, self.k, back, self.keys, e, None, inner_k, moved_k)
        ddecay = None
        if moved_q is not None and moved_k is not None and back.crossing is not None:
            ddecay = self._decay_gradient(moved_q, moved_k, back.crossing)
        return LinearGradients(dq, dk, dv, ddecay, None, back.end_s, back.end_z)

    def _recur(self, out: Tensor, den: Tensor | None, state: bool) -> LinearResult:
        from tilewise.backends.triton.linear_recurrent import recur

        spec, (size, size_v) = self.spec, self.sizes
        end_s, end_z = self._empty_state(spec.batch, state)
        block_d, block_v = _power(size), min(16, _power(size_v))
        gate = self.q if self.decay is None else self.decay
        arguments = (
            self.q, self.k, self.v, out, den, gate, self.first_s, self.first_z, end_s, end_z, self.cu_seqlens,
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *out.stride()[:3], *gate.stride()[:3],
            spec.heads, self.q.shape[2], spec.scale,
        )  # fmt: skip
        constants = {
            "D": size, "DV": size_v, "BLOCK_D": block_d, "BLOCK_V": block_v, "BEGIN": self.first_s is not None,
            "BEGIN_Z": self.first_z is not None, "END": state, **self.flags,
        }  # fmt: skip
        _launch(self.config, recur, spec.batch * spec.heads * -(-size_v // block_v), arguments, constants, 4)
        return LinearResult(out, den, end_s, end_z)

    def _empty_state(self, rows: int, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        if not wanted:
            return None, None
        size, size_v = self.sizes
        s = self.q.new_empty((rows, self.spec.heads, size, size_v), dtype=torch.float32)
        return s, s.new_empty((rows, self.spec.heads, size)) if self.spec.normalize else None

    def _forward_states(self, end: bool) -> _States:
        """What segments begin with: nothing to compute for one segment a sequence, whose end nobody asks for."""
        cut = self.keys
        if self.spec.causal and not end and cut.segments == 1 and not self.spec.packed:
            return _States(self.first_s, self.first_z, None, None, None)
        begin = (self.first_s, self.first_z)
        return self._states(self.k, self.v, None, cut, begin, 1.0, end or not self.spec.causal, reverse=False)

    def _backward_states(
        self, dout: Tensor, e: Tensor | None, ds: Tensor | None, dz: Tensor | None, ahead: _States | None
    ) -> _States:
        begin = tuple(None if x is None else x.contiguous() for x in (ds, dz))
        return self._states(
            self.q, dout, e, self.queries, (begin[0], begin[1]), self.spec.scale, True, reverse=True, other=ahead
        )

    def _states(
        self,
        a: Tensor,
        b: Tensor,
        e: Tensor | None,
        cut: Cut,
        begin: tuple[Tensor | None, Tensor | None],
        scale: float,
        end: bool,
        *,
        reverse: bool,
        other: _States | None = None,
    ) -> _States:
        from tilewise.backends.triton.linear_states import scan_segments, segment_sums

        spec, shape, (size, size_v) = self.spec, self.config.shape, self.sizes
        s, z = self._empty_state(cut.slots, True)
        assert s is not None
        channel = spec.decay == "channel"
        total = s.new_empty((cut.slots, spec.heads, size if channel else 1)) if spec.decay != "none" else None
        crossing = s.new_empty((cut.slots, spec.heads, size)) if other is not None else None
        block_a, block_b = (
            min(shape.sums.block_b, _power(size, self.least)),
            min(shape.sums.block_b, _power(size_v, self.least)),
        )
        flags = {**self.flags, "SCALED": self.flags["SCALED"] and reverse}
        if cut.slots:
            arguments = (
                a, b, e, self.gate, *cut.tables, s, z, total,
                *a.stride()[:3], *b.stride()[:3], *self._gate_strides(),
                spec.heads, cut.segments, cut.tokens, cut.length, scale,
            )  # fmt: skip
            constants = {
                "DA": size, "DB": size_v, "BLOCK_A": block_a, "BLOCK_B": block_b, "CHUNK": shape.chunk,
                "REVERSE": reverse, **flags,
            }  # fmt: skip
            programs = cut.slots * spec.heads * -(-size // block_a) * -(-size_v // block_b)
            tile = shape.sums
            _launch(self.config, segment_sums, programs, arguments, constants, tile.num_warps, tile.num_stages)
        end_s, end_z = self._empty_state(spec.batch, end)
        rows, columns = 16, _power(size_v)
        arguments = (
            s, z, total, begin[0], begin[1], end_s, end_z,
            *((None,) * 4 if other is None else other[:4]), crossing, cut.tables[2],
            spec.heads, cut.segments,
        )  # fmt: skip
        constants = {
            "DA": size, "DB": size_v, "BLOCK_A": rows, "BLOCK_B": columns, "REVERSE": reverse, **self.flags,
            "BEGIN": begin[0] is not None, "BEGIN_Z": begin[1] is not None, "END": end, "CROSSING": other is not None,
        }  # fmt: skip
        _launch(self.config, scan_segments, spec.batch * spec.heads * -(-size // rows), arguments, constants, 4)
        if not spec.causal:
            return _States(end_s, end_z, end_s, end_z, None)
        return _States(s, z, end_s, end_z, crossing)

    def _walk(
        self,
        role: int,
        operands: tuple[Tensor, Tensor, Tensor],
        y: Tensor,
        source: Tensor | None,
        states: _States,
        cut: Cut,
        e: Tensor | None,
        den: Tensor | None,
        inner: Tensor | None,
        moved: Tensor | None = None,
    ) -> None:
        from tilewise.backends.triton.linear_walk import walk

        spec, shape = self.spec, self.config.shape
        tile: Walk = shape.out if role == OUT else shape.gradient
        x, a, b = operands
        size_a, size_b = x.shape[3], y.shape[3]
        block_b = min(tile.block_b, _power(size_b, self.least))
        strides = (0, 0, 0) if source is None else source.stride()[:3]
        arguments = (
            x, a, b, y, source, states.s, states.z, e, den, self.gate, inner, moved, *cut.tables,
            *x.stride()[:3], *a.stride()[:3], *b.stride()[:3], *y.stride()[:3], *strides, *self._gate_strides(),
            0 if moved is None else moved.stride(0),
            spec.heads, cut.segments, cut.tokens, cut.length, spec.scale,
        )  # fmt: skip
        constants = {
            "ROLE": role, "DA": size_a, "DB": size_b, "BLOCK_A": _power(size_a, self.least), "BLOCK_B": block_b,
            "CHUNK": shape.chunk, "CAUSAL": spec.causal, "STATE": states.s is not None, "GATES": moved is not None,
            **self.flags,
        }  # fmt: skip
        programs = cut.slots * spec.heads * -(-size_b // block_b)
        _launch(self.config, walk, programs, arguments, constants, tile.num_warps, tile.num_stages)

    def _denominator(self, dout: Tensor, out: Tensor, den: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """dout / den and the gradient of den. In float32 for float16, whose range 1/den may leave."""
        from tilewise.backends.triton.linear_rows import denominator_gradient

        if den is None:
            return dout, None
        out = unit_last(out)
        dtype = torch.float32 if dout.dtype == torch.float16 else dout.dtype
        dnum, e = torch.empty(dout.shape, dtype=dtype, device=dout.device), torch.empty_like(den)
        batch, heads, n, size = dout.shape
        if dout.numel():
            arguments = (dout, out, den, dnum, e, *dout.stride()[:3], *out.stride()[:3], heads, n)
            constants = {"DV": size, "BLOCK_V": _power(size), "BLOCK_M": 32}
            _launch(self.config, denominator_gradient, batch * heads * -(-n // 32), arguments, constants, 4)
        return dnum, e

    def _inner_scores(self) -> Tensor | None:
        """Of a decay per channel: its running sums, which replace it as `gate`, and the scores within chunks."""
        if self.spec.decay != "channel":
            return None
        from tilewise.backends.triton.linear_scores import inner_scores, running_sums

        spec, shape, cut, decay = self.spec, self.config.shape, self.queries, self.decay
        assert decay is not None
        size = self.sizes[0]
        sums = torch.empty(decay.shape, dtype=torch.float32, device=decay.device)
        scores = self.q.new_empty((*self.q.shape[:3], shape.chunk))
        self.gate = sums
        block = min(64, _power(size))
        where = (spec.heads, cut.segments, cut.tokens, cut.length)
        strides = (*self.q.stride()[:3], *self.k.stride()[:3])
        if cut.slots:
            constants = {"D": size, "BLOCK_D": block, "CHUNK": shape.chunk, "WHOLE": shape.whole, **self.flags}
            pieces = cut.slots * spec.heads * (cut.length // shape.chunk) * -(-size // block)
            arguments = (decay, sums, *cut.tables, *decay.stride()[:3], *where)
            _launch(self.config, running_sums, pieces, arguments, constants, 4)
            arguments = (self.q, self.k, sums, scores, *cut.tables, *strides, *where, spec.scale)
            pieces = cut.slots * spec.heads * (cut.length // shape.inner_rows)
            _launch(self.config, inner_scores, pieces, arguments, constants, shape.inner_warps)
        return scores

    def _inner_gradients(self, dout: Tensor, e: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What chunks give to dq and dk of a decay per channel."""
        if self.spec.decay != "channel":
            return None, None
        from tilewise.backends.triton.linear_scores import inner_gradients

        spec, shape, cut, (size, size_v) = self.spec, self.config.shape, self.queries, self.sizes
        dq = torch.empty(self.q.shape, dtype=torch.float32, device=self.q.device)
        dk = torch.empty_like(dq)
        q, k, v = self.q, self.k, self.v
        if cut.slots:
            arguments = (
                q, k, v, dout, e, self.gate, dq, dk, *cut.tables,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
                spec.heads, cut.segments, cut.tokens, cut.length, spec.scale,
            )  # fmt: skip
            constants = {
                "D": size, "DV": size_v, "BLOCK_D": min(64, _power(size)), "BLOCK_V": min(64, _power(size_v)),
                "CHUNK": shape.chunk, "WHOLE": shape.whole, **self.flags,
            }  # fmt: skip
            pieces = cut.slots * spec.heads * (cut.length // shape.inner_rows)
            _launch(self.config, inner_gradients, pieces, arguments, constants, shape.inner_warps)
        return dq, dk

    def _moved(self, grad: Tensor) -> Tensor:
        """Room for q∘dq or k∘dk: per channel, or summed over each walk's columns."""
        if self.spec.decay == "channel":
            return torch.empty((1, *grad.shape), dtype=torch.float32, device=grad.device)
        parts = -(-grad.shape[3] // min(self.config.shape.gradient.block_b, _power(grad.shape[3], self.least)))
        return torch.empty((parts, *grad.shape[:3]), dtype=torch.float32, device=grad.device)

    def _decay_gradient(self, moved_q: Tensor, moved_k: Tensor, crossing: Tensor) -> Tensor:
        from tilewise.backends.triton.linear_scores import decay_gradient

        spec, shape, cut = self.spec, self.config.shape, self.queries
        size = moved_q.shape[4] if spec.decay == "channel" else 1
        if size == 1 and spec.decay == "token":
            crossing = crossing.sum(-1)
        ddecay = torch.empty_like(moved_q[0])
        block = min(64, _power(size)) if size > 1 else 1
        if cut.slots:
            arguments = (
                moved_q, moved_k, crossing, ddecay, *cut.tables, moved_q.stride(0),
                spec.heads, cut.segments, cut.tokens, cut.length, moved_q.shape[0], moved_k.shape[0],
            )  # fmt: skip
            constants = {"D": size, "BLOCK_D": block, "CHUNK": shape.chunk, **self.flags}
            _launch(self.config, decay_gradient, cut.slots * spec.heads * -(-size // block), arguments, constants, 4)
        return ddecay


def _power(size: int, least: int = 16) -> int:
    """Columns of a tile that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


TRITON_LINEAR = TritonLinear()
