"""Backward problems on the device: operands and cotangents of a spec, and exact gradients from a float64 N×M attention.

The forward's results come from the same float64 computation, so only the backward is under test.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from hopper_cases import DEVICE
from torch import Tensor

from tilewise.backends.base import Needs, Operands
from tilewise.backends.hopper.backward import backward
from tilewise.masks.tensors import unpack
from tilewise.spec import AttentionSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Problem(NamedTuple):
    """One backward call. `lengths` are the query and key lengths of packed sequences, `offsets` one a sequence."""

    spec: AttentionSpec
    operands: Operands
    dout: Tensor
    dlse: Tensor | None
    lengths: list[tuple[int, int]] | None = None
    offsets: list[int] | None = None


def make(
    *,
    n: int = 0,
    m: int = 0,
    dim: int = 64,
    v_dim: int | None = None,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: str = "bfloat16",
    dlse: bool = False,
    lengths: list[tuple[int, int]] | None = None,
    offsets: list[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Unit-normal tensors on the device; `options` are fields of the spec."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    v_dim = v_dim or dim
    leading, rows, keys = batch, n, m
    if lengths is not None:
        leading, rows, keys = 1, sum(x for x, _ in lengths), sum(y for _, y in lengths)
        batch, n, m = len(lengths), max(x for x, _ in lengths), max(y for _, y in lengths)
        options |= {"packed": True, "q_total": rows, "k_total": keys}
    if offsets is not None:
        options["q_offset"] = "tensor"

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE).to(DTYPES[dtype])

    def ends(which: int) -> Tensor | None:
        if lengths is None:
            return None
        sizes = torch.tensor([0, *(pair[which] for pair in lengths)])
        return sizes.cumsum(0).to(DEVICE, torch.int32)

    scale = options.pop("scale", dim**-0.5)
    spec = AttentionSpec(batch, heads, kv_heads, n, m, dim, v_dim, dtype, "sm_90", scale, **options)
    operands = Operands(
        normal(leading, heads, rows, dim),
        normal(leading, kv_heads, keys, dim),
        normal(leading, kv_heads, keys, v_dim),
        sink=torch.randn(heads, generator=g, device=DEVICE) if spec.sink else None,
        q_offset=None if offsets is None else torch.tensor(offsets, device=DEVICE, dtype=torch.int32),
        cu_seqlens_q=ends(0),
        cu_seqlens_k=ends(1),
    )
    dout = normal(leading, heads, rows, v_dim)
    return Problem(
        spec,
        operands,
        dout,
        torch.randn(leading, heads, rows, generator=g, device=DEVICE) if dlse else None,
        lengths,
        offsets,
    )


def _attend(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    n, m = q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(spec.group, 1), v.repeat_interleave(spec.group, 1)
    s = q @ k.mT * spec.scale
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    distance = torch.arange(m, device=DEVICE)[None] - torch.arange(n, device=DEVICE)[:, None] - offset
    left, right = spec.window
    seen = torch.ones_like(distance, dtype=torch.bool)
    if spec.causal:
        seen &= distance <= 0
    if left is not None:
        seen &= distance >= -left
    if right is not None:
        seen &= distance <= right
    if spec.mask is not None:
        dense = torch.from_numpy(unpack(spec.mask).to_dense(n, m, offset=offset, heads=spec.heads)).to(DEVICE)
        seen = seen & (dense if dense.dim() == 4 or dense.dim() == 2 else dense[None])
    s = s.masked_fill(~seen, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    empty = (s == -math.inf).all(-1)
    lse = torch.logsumexp(s.masked_fill(empty[..., None], 0.0), -1)
    p = torch.exp(s - lse[..., None]).masked_fill(empty[..., None], 0.0)[..., :m]
    return p @ v, lse.masked_fill(empty, -math.inf)


def exact(problem: Problem) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and the gradients of q, k, v (and sink), in float64."""
    spec, operands = problem.spec, problem.operands
    given = [x for x in (operands.q, operands.k, operands.v, operands.sink) if x is not None]
    leaves = [x.double().requires_grad_() for x in given]
    q, k, v = leaves[:3]
    sink = leaves[3] if spec.sink else None
    parts = []
    row = key = 0
    for b in range(spec.batch):
        if problem.lengths is None:
            part = q[b : b + 1], k[b : b + 1], v[b : b + 1]
            offset = spec.k_len - spec.q_len
        else:
            rows, keys = problem.lengths[b]
            part = q[:, :, row : row + rows], k[:, :, key : key + keys], v[:, :, key : key + keys]
            offset = keys - rows
            row, key = row + rows, key + keys
        if isinstance(spec.q_offset, int):
            offset = spec.q_offset
        if problem.offsets is not None:
            offset = problem.offsets[b]
        parts.append(_attend(spec, *part, sink, offset))
    along = 0 if problem.lengths is None else 2
    out, lse = (torch.cat(x, along) for x in zip(*parts, strict=True))
    outputs, cotangents = [out], [problem.dout.double()]
    if problem.dlse is not None:
        outputs.append(lse)
        cotangents.append(problem.dlse.double().masked_fill(lse == -math.inf, 0.0))
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    return out.detach(), lse.detach(), list(grads)


def ours(problem: Problem, out: Tensor, lse: Tensor) -> list[Tensor]:
    """The same gradients from the kernels, given the forward's results rounded as the forward rounds them."""
    needs = Needs(sink=problem.spec.sink)
    dtype = DTYPES[problem.spec.dtype]
    grads = backward(
        problem.dout, problem.dlse, problem.operands, out.to(dtype), lse.float(), problem.spec, None, needs
    )  # fmt: skip
    return [x for x in (grads.q, grads.k, grads.v, grads.sink) if x is not None]


def lowered(problem: Problem) -> Problem:
    """With all scores about 110 lower: e^-LSE, the weight of a key whose scores are 0, is ∞ in float32."""
    operands = problem.operands
    q, k = operands.q.clone(), operands.k.clone()
    q[..., 0], k[..., 0] = 30.0, -3.7 / problem.spec.scale
    return problem._replace(operands=operands._replace(q=q, k=k))


def with_exact_delta(problem: Problem, out: Tensor, lse: Tensor) -> Problem:
    """The problem with a gradient of the LSE that takes the rounding of `out` out of Δ = rowsum(dO∘O) − dLSE.

    Where dS nearly cancels (two keys, one of which has all the weight; a sink's gradient) that rounding is all of the
    error, and no kernel's.
    """
    lost = (problem.dout.double() * (out.to(DTYPES[problem.spec.dtype]).double() - out)).sum(-1)
    given = 0.0 if problem.dlse is None else problem.dlse.double()
    return problem._replace(dlse=(given + lost.masked_fill(lse == -math.inf, 0.0)).float())


def worst_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ‖error‖ / ‖exact‖ over the gradients; of an exact 0, the largest element. NaN counts as infinite."""
    worst = 0.0
    for x, y in zip(actual, expected, strict=True):
        if y.numel() == 0:
            continue
        size = y.norm().item()
        error = ((x.double() - y).norm() / size).item() if size > 0 else x.double().abs().max().item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


ROUNDING = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Largest relative error allowed: P, dS, and the result are each rounded once, by 2⁻⁹ or 2⁻¹² at most."""
