"""Linear attention: the contract of its backends, and the two in PyTorch.

`standard` is the parallel form, with all N×M weights. `tiled` walks segments of tokens in the chunked form and hands a
state from one to the next; its backward walks them back, recomputing one segment at a time, so that nothing but the
states between segments is ever kept: O(N) memory with a small constant on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tilewise.backends.base import empty_ordered
from tilewise.reference.features import FIXED
from tilewise.reference.linear import LEAST_LOG_DECAY, LinearState, Result, chunked, fold, parallel
from tilewise.reference.softmax import accumulator_dtype
from tilewise.spec import LinearSpec

SEGMENT = 2048
"""Tokens that `tiled` differentiates at once."""


class LinearOperands(NamedTuple):
    """The tensors of one call. q [B, H, N, K], k [B, H, M, K], v [B, H, M, Dv], any strides.

    Packed: B = 1 and N = M the token total; `cu_seqlens` [sequences + 1] int32 delimits the sequences, and states have
    one row a sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    """Log decay, [B, H, N] or [B, H, N, K]."""
    beta: Tensor | None = None
    """[B, H, N] of the delta rule."""
    s: Tensor | None = None
    """[B, H, K, Dv], the state before the first token."""
    z: Tensor | None = None
    """[B, H, K]"""
    cu_seqlens: Tensor | None = None


class LinearResult(NamedTuple):
    """out [B, H, N, Dv] in v's dtype; den [B, H, N], s [B, H, K, Dv] and z [B, H, K] in the accumulator dtype.

    den and z are there where the problem is normalised.
    """

    out: Tensor
    den: Tensor | None
    s: Tensor | None
    z: Tensor | None


class LinearGradients(NamedTuple):
    """Gradients of the differentiable operands, None where not asked for."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    decay: Tensor | None = None
    beta: Tensor | None = None
    s: Tensor | None = None
    z: Tensor | None = None


class LinearBackend(Protocol):
    """One implementation of linear attention."""

    name: str

    def why_not(self, spec: LinearSpec) -> str | None:
        """One true sentence on why this backend cannot serve `spec` here, or None if it can."""
        ...

    def configure(self, spec: LinearSpec) -> Any: ...

    def forward(self, operands: LinearOperands, spec: LinearSpec, config: Any, *, state: bool) -> LinearResult:
        """The result; the final state may be left out unless asked for."""
        ...

    def backward(
        self,
        dout: Tensor,
        ds: Tensor | None,
        dz: Tensor | None,
        operands: LinearOperands,
        out: Tensor,
        den: Tensor | None,
        spec: LinearSpec,
        config: Any,
        decay_gradient: bool,
    ) -> LinearGradients:
        """Gradients of everything that is there, of the decay only if asked for."""
        ...


class Segments(NamedTuple):
    """How `tiled` cuts the tokens: one at a time is differentiated."""

    tokens: int
    chunk: int

    def __str__(self) -> str:
        return f"chunks of {self.chunk} in segments of {self.tokens} tokens"


class TorchLinear:
    """`LinearBackend` in PyTorch operations: parallel, or chunked in segments."""

    def __init__(self, name: str) -> None:
        self.name = name

    def why_not(self, spec: LinearSpec) -> str | None:
        return None

    def configure(self, spec: LinearSpec) -> Segments | None:
        return None if self.name == "standard" else Segments(SEGMENT, 64)

    def forward(
        self, operands: LinearOperands, spec: LinearSpec, config: Segments | None, *, state: bool
    ) -> LinearResult:
        q, v = operands.q, operands.v
        out, den = empty_ordered(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=accumulator_dtype(q.dtype))
        lasts = []
        for part, rows in _sequences(operands):
            last = _first_state(part)
            for segment in _cuts(part.q.shape[2], spec, config):
                result = _run(_narrowed(part, segment), last, spec, config)
                last = _State(result.state.s, last.z if result.state.z is None else result.state.z)
                out[:, :, rows][:, :, segment] = result.out.to(out.dtype)
                if result.den is not None:
                    den[:, :, rows][:, :, segment] = result.den
            lasts.append(last)
        s, z = _joined(lasts)
        return LinearResult(out, den, s, z) if spec.normalize else LinearResult(out, None, s, None)

    def backward(
        self,
        dout: Tensor,
        ds: Tensor | None,
        dz: Tensor | None,
        operands: LinearOperands,
        out: Tensor,
        den: Tensor | None,
        spec: LinearSpec,
        config: Segments | None,
        decay_gradient: bool,
    ) -> LinearGradients:
        tokens = [empty_ordered(x, x.shape[-1]) for x in operands[:3]]
        tokens += [torch.empty_like(x) for x in operands[3:5] if x is not None]
        state = _first_state(operands)
        after = _State(torch.zeros_like(state.s) if ds is None else ds, torch.zeros_like(state.z) if dz is None else dz)
        firsts = []
        for row, (part, rows) in enumerate(_sequences(operands)):
            own = slice(None) if operands.cu_seqlens is None else slice(row, row + 1)
            last = _State(after.s[own], after.z[own])
            firsts.append(_walk_back(dout[:, :, rows], last, part, [x[:, :, rows] for x in tokens], spec, config))
        s, z = _joined(firsts)
        ddecay = tokens[3] if operands.decay is not None and decay_gradient else None
        dbeta = tokens[-1] if operands.beta is not None else None
        return LinearGradients(tokens[0], tokens[1], tokens[2], ddecay, dbeta, s, z)


class _State(NamedTuple):
    """Both halves of a state, needed or not."""

    s: Tensor
    z: Tensor


def _walk_back(
    dout: Tensor,
    dlast: _State,
    part: LinearOperands,
    grads: list[Tensor],
    spec: LinearSpec,
    config: Segments | None,
) -> _State:
    """Fill `grads`, those of one sequence's q, k, v, decay and beta; returns the gradient of its first state."""
    cuts = _cuts(part.q.shape[2], spec, config)
    entries = [_first_state(part)]
    for segment in cuts[:-1]:
        entries.append(_folded(_narrowed(part, segment), entries[-1], spec, config))
    for segment, entry in zip(reversed(cuts), reversed(entries), strict=True):
        cut = _narrowed(part, segment)
        # Below an operator autograd does not record, unless it is let in again.
        with (
            torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False),
            torch.enable_grad(),
        ):
            tokens = [None if x is None else x.detach().requires_grad_() for x in cut[:5]]
            state = _State(*(x.detach().requires_grad_() for x in entry))
            result = _run(LinearOperands(*tokens), state, spec, config)  # type: ignore[arg-type]
            leaves = [x for x in (*tokens, *state) if x is not None]
            outputs, cotangents = [result.out, result.state.s], [dout[:, :, segment].to(result.out.dtype), dlast.s]
            if result.state.z is not None:
                outputs.append(result.state.z)
                cotangents.append(dlast.z)
            found = torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
        for target, grad in zip(grads, found, strict=False):
            target[:, :, segment] = grad
        dlast = _State(*found[-2:])
    return dlast


def _joined(states: list[_State]) -> _State:
    """The states of all sequences, one row each."""
    return states[0] if len(states) == 1 else _State(torch.cat([x.s for x in states]), torch.cat([x.z for x in states]))


def _sequences(operands: LinearOperands) -> Iterator[tuple[LinearOperands, slice]]:
    """Each packed sequence as a problem of its own with its rows; a dense problem as it is.

    Waits for a GPU's `cu_seqlens`.
    """
    if operands.cu_seqlens is None:
        yield operands, slice(None)
        return
    for row, (begin, end) in enumerate(pairwise(operands.cu_seqlens.tolist())):
        part = _narrowed(operands, slice(begin, end))
        s, z = (None if x is None else x[row : row + 1] for x in (operands.s, operands.z))
        yield part._replace(s=s, z=z, cu_seqlens=None), slice(begin, end)


def _cuts(tokens: int, spec: LinearSpec, config: Segments | None) -> list[slice]:
    """The segments of a sequence, at least one; everything at once without a causal order to cut along."""
    if config is None or not spec.causal:
        return [slice(None)]
    return [slice(begin, min(begin + config.tokens, tokens)) for begin in range(0, max(tokens, 1), config.tokens)]


def _narrowed(part: LinearOperands, rows: slice) -> LinearOperands:
    return LinearOperands(*(None if x is None else x[:, :, rows] for x in part[:5]), *part[5:])  # type: ignore[arg-type]


def _first_state(part: LinearOperands) -> _State:
    dtype = accumulator_dtype(part.q.dtype)
    rows = part.k.shape[0] if part.cu_seqlens is None else part.cu_seqlens.shape[0] - 1
    shape = (rows, part.k.shape[1], part.k.shape[3], part.v.shape[3])
    s = part.q.new_zeros(shape, dtype=dtype) if part.s is None else part.s
    return _State(s, part.q.new_zeros(shape[:3], dtype=dtype) if part.z is None else part.z)


def _run(part: LinearOperands, state: _State, spec: LinearSpec, config: Segments | None) -> Result:
    """One segment, differentiable."""
    dtype = accumulator_dtype(part.q.dtype)
    q, k = (FIXED[spec.feature_map](x.to(dtype)) for x in (part.q, part.k))
    options = {
        "causal": spec.causal, "decay": part.decay, "beta": part.beta, "exclusive": spec.exclusive,
        "normalize": spec.normalize,
    }  # fmt: skip
    if config is not None:
        options["chunk"] = config.chunk
    form = parallel if config is None else chunked
    return form(q, k, part.v.to(dtype), **options, scale=spec.scale, state=LinearState(*state))


def _folded(part: LinearOperands, state: _State, spec: LinearSpec, config: Segments | None) -> _State:
    """The state after a segment, without its outputs where those can be left out."""
    if part.beta is not None:
        return _State(_run(part, state, spec, config).state.s, state.z)
    dtype = accumulator_dtype(part.k.dtype)
    k = FIXED[spec.feature_map](part.k.to(dtype))
    to_key = None if part.decay is None else part.decay.to(dtype).clamp(min=LEAST_LOG_DECAY).cumsum(2)
    return _State(*fold(k, part.v.to(dtype), to_key, state.s, state.z))


STANDARD_LINEAR = TorchLinear("standard")
TILED_LINEAR = TorchLinear("tiled")
