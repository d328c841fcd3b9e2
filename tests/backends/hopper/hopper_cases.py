"""The hopper backend's forward called like the oracle, and every selectable configuration by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import oracle
from budget import worst
from tilewise.backends.base import Operands
from tilewise.backends.hopper import configs
from tilewise.backends.hopper.configs import SELECTABLE, ForwardConfig
from tilewise.backends.hopper.launch import forward, plan
from tilewise.masks import Mask
from tilewise.masks.tensors import pack
from tilewise.spec import AttentionSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU the kernels can be emulated (emulator.py)."""

NAMED = {name: value for name, value in vars(configs).items() if isinstance(value, ForwardConfig)}
assert set(NAMED.values()) == set(SELECTABLE)


def problem(
    config: ForwardConfig | None,
    *,
    n: int = 300,
    m: int = 300,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dims: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    lengths: tuple[list[int], list[int]] | None = None,
    offset: int | list[int] | None = None,
    mask: Mask | None = None,
    sink: bool = False,
    bshd: bool = False,
    gain: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> tuple[Operands, AttentionSpec]:
    """Unit-normal operands in `dtype`, and their spec. `lengths` packs sequences of so many rows, keys."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    dim, v_dim = dims or ((192 if config.block_dv == 128 else 256) if config.block_d == 256 else config.block_d,) * 2
    if dims is None and config is not None:
        v_dim = config.block_dv

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE).to(dtype)

    def heads_of(count: int, tokens: int, width: int) -> Tensor:
        if bshd:
            return normal(leading, tokens, count, width).transpose(1, 2)
        return normal(leading, count, tokens, width)

    leading, more = batch, {}
    if lengths is not None:
        leading, batch, n, m = 1, len(lengths[0]), sum(lengths[0]), sum(lengths[1])
        ends = (torch.tensor([0, *part], device=DEVICE).cumsum(0).int() for part in lengths)
        more.update(zip(("cu_seqlens_q", "cu_seqlens_k"), ends, strict=True))
        options |= {"packed": True, "q_total": n, "k_total": m}
    tensors = heads_of(heads, n, dim) * gain, heads_of(kv_heads, m, dim), heads_of(kv_heads, m, v_dim)
    if lengths is not None:
        n, m = max(lengths[0]), max(lengths[1])
    if sink:
        more["sink"] = normal(heads)
    if isinstance(offset, list):
        more["q_offset"] = torch.tensor(offset, device=DEVICE, dtype=torch.int32)
    if mask is not None:
        options["mask"], arrays = pack(mask)
        more["mask_tensors"] = tuple(arrays)
    spec = AttentionSpec(
        batch, heads, kv_heads, n, m, dim, v_dim, str(dtype).removeprefix("torch."), "sm_90", dim**-0.5, sink=sink,
        q_offset="tensor" if isinstance(offset, list) else offset, **options,
    )  # fmt: skip
    return Operands(*tensors, **more), spec


def standard(operands: Operands, spec: AttentionSpec, dtype: torch.dtype, mask: Mask | None) -> tuple[Tensor, Tensor]:
    """The oracle in `dtype`, sequence by sequence."""
    with torch.device(DEVICE):
        q, k, v = (x.to(dtype) for x in operands[:3])
        offsets = operands.q_offset if spec.q_offset == "tensor" else spec.q_offset
        options = {"causal": spec.causal, "window": spec.window, "softcap": spec.softcap, "scale": spec.scale}
        options["sink"] = None if operands.sink is None else operands.sink.to(dtype)
        if operands.cu_seqlens_q is None or operands.cu_seqlens_k is None:
            allowed = None
            if mask is not None:
                host = offsets.cpu().numpy() if isinstance(offsets, Tensor) else offsets
                dense = mask.to_dense(spec.q_len, spec.k_len, offset=host, heads=spec.heads)
                allowed = torch.from_numpy(dense).to(DEVICE)
                allowed = allowed.reshape((1,) * (4 - allowed.dim()) + allowed.shape)
            return oracle.attention(q, k, v, mask=allowed, q_offset=offsets, **options)
        rows, keys = operands.cu_seqlens_q.tolist(), operands.cu_seqlens_k.tolist()
        parts = []
        for s in range(spec.batch):
            of_rows, of_keys = slice(rows[s], rows[s + 1]), slice(keys[s], keys[s + 1])
            offset = offsets[s : s + 1] if isinstance(offsets, Tensor) else offsets
            part = oracle.attention(q[:, :, of_rows], k[:, :, of_keys], v[:, :, of_keys], q_offset=offset, **options)
            parts.append(part)
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)


def assert_right(config: ForwardConfig | None, *, mask: Mask | None = None, **options: Any) -> None:
    """Out and LSE within the budget of tests/budget.py, standard attention in the same dtype on the same device being
    the measure; and no more than 1.5 times its error in the norm."""
    operands, spec = problem(config, mask=mask, **options)
    out, lse = forward(operands, spec, plan(spec, config))
    exact, exact_lse = standard(operands, spec, torch.float64, mask)
    usual, usual_lse = standard(operands, spec, operands.q.dtype, mask)
    eps = torch.finfo(operands.q.dtype).eps
    largest = exact.abs().max().item() if exact.numel() else 0.0
    finite = exact_lse[exact_lse.isfinite()].abs()
    largest_lse = max(1.0, finite.max().item()) if finite.numel() else 1.0
    assert worst(out, exact) <= 2 * worst(usual, exact) + eps * largest
    assert worst(lse, exact_lse) <= 2 * worst(usual_lse, exact_lse) + 2 * torch.finfo(torch.float32).eps * largest_lse
    error, usual_error = ((x.double() - exact).norm().item() for x in (out, usual))
    assert error <= 1.5 * usual_error + eps * 1e-3
