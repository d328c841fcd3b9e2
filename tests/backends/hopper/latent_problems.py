"""Latent caches to decode against, dense and paged, and exact results from float64 attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from hopper_cases import DEVICE
from torch import Tensor

from tilewise.backends.decoding import DecodeOperands
from tilewise.backends.hopper import decoding
from tilewise.spec import DecodeSpec

WIDTH, COLUMNS = 576, 512

CASES: dict[str, dict[str, Any]] = {
    "one": {"lengths": [1], "heads": 1},
    "ragged": {"lengths": [100, 300, 64, 0]},
    "many-heads": {"lengths": [64, 129], "heads": 128},
    "tokens": {"lengths": [70, 500], "tokens": 3},
    "more-tokens-than-length": {"lengths": [3, 130], "tokens": 5, "heads": 20, "page": 64},
    "splits": {"lengths": [500, 0, 129], "page": 128, "splits": 3},
    "splits-of-tokens": {"lengths": [333, 65], "tokens": 4, "heads": 24, "splits": 4},
    "packed": {"lengths": [100, 40, 200], "counts": [7, 1, 30], "page": 64},
    "not-causal": {"lengths": [70, 200], "tokens": 3, "causal": False},
    "far-below": {"lengths": [100], "shift": -6.0},
}


class Latent(NamedTuple):
    spec: DecodeSpec
    operands: DecodeOperands
    out: list[Tensor]
    """[H, T, 512] of each sequence, float64."""
    lse: list[Tensor]
    largest_sum: float
    """Of scale·Σ|q_i k_i| over all rows and keys: what the rounding of a score is measured by."""


def make(
    *,
    lengths: list[int],
    tokens: int = 1,
    heads: int = 16,
    page: int | None = None,
    splits: int | None = None,
    counts: list[int] | None = None,
    causal: bool = True,
    shift: float = 0.0,
    lost: tuple[int, int] | None = None,
    dtype: str = "float16",
    seed: int = 0,
) -> Latent:
    """A problem on the device. All that no sequence holds is NaN.

    Args:
        counts: query tokens of each sequence, packed; else `tokens` of each.
        shift: added to the keys; the queries are all positive then.
        lost: (sequence, page) whose entry in the table points outside the pool.
    """
    g = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    batch, capacity, scale = len(lengths), max(1, *lengths) + 37, WIDTH**-0.5
    sequences = [(torch.randn(n, WIDTH, generator=g) + shift).to(kind) for n in lengths]
    per = counts or [tokens] * batch
    q = torch.randn(1, heads, sum(per), WIDTH, generator=g)
    q = (q.abs() if shift else q).to(kind)
    parts = list(q[0].split(per, 1))
    table = None
    if page is None:
        pool = torch.full((batch, 1, capacity, WIDTH), math.nan, dtype=kind)
        for b, x in enumerate(sequences):
            pool[b, 0, : len(x)] = x
    else:
        pages = -(-capacity // page)
        capacity = pages * page
        order = torch.randperm(batch * pages + 3, generator=g)[: batch * pages].view(batch, pages)
        pool = torch.full((batch * pages + 3, 1, page, WIDTH), math.nan, dtype=kind)
        for b, x in enumerate(sequences):
            for i, rows in enumerate(x.split(page)):
                pool[order[b, i], 0, : len(rows)] = rows
        if lost is not None:
            order[lost] = len(pool) + 7
        table = order.to(DEVICE, torch.int32)
    ends = None if counts is None else torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)
    spec = DecodeSpec(
        batch, heads, 1, max(per), 1 << (max(1, *lengths) - 1).bit_length(), WIDTH, COLUMNS, capacity, dtype, "sm_90",
        scale, causal, page_size=page, latent=True, packed=counts is not None, q_total=sum(counts or ()),
        num_splits=splits,
    )  # fmt: skip
    given = q if counts is not None else torch.stack(parts)
    operands = DecodeOperands(
        given.to(DEVICE), pool.to(DEVICE), None, torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        page_table=table, cu_seqlens_q=ends,
    )  # fmt: skip
    exact = [_exact(*x, b, scale, causal, page, lost) for b, x in enumerate(zip(parts, sequences, strict=True))]
    sums = [
        (x.double().abs() @ k.double().abs().mT).amax().item() for x, k in zip(parts, sequences, strict=True) if len(k)
    ]
    return Latent(spec, operands, [out for out, _ in exact], [lse for _, lse in exact], scale * max(sums, default=0.0))


def _exact(
    q: Tensor,
    k: Tensor,
    b: int,
    scale: float,
    causal: bool,
    page: int | None,
    lost: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    s = q.double() @ k.double().mT * scale
    n, m = s.shape[1:]
    if causal:
        s = s.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), -math.inf)
    if page is not None and lost is not None and lost[0] == b:
        s[..., lost[1] * page : (lost[1] + 1) * page] = -math.inf
    lse = torch.logsumexp(s, -1) if m else torch.full(s.shape[:2], -math.inf, dtype=torch.float64)
    p = torch.exp(s - lse.clamp_min(-1e30)[..., None])
    return p @ k[:, :COLUMNS].double(), lse


def assert_right(problem: Latent) -> None:
    """Out and LSE of the Hopper kernel within the rounding of P and of the result.

    Tensor cores add 16 products at a time to the float32 sum and cut off what does not fit, so a score is off by up to
    576/16 units in the last place of its Σ|q_i k_i|.
    """
    spec, operands = problem.spec, problem.operands
    out, lse = decoding.forward(operands, decoding.plan(spec, 132), spec)
    assert out.shape == (*operands.q.shape[:3], COLUMNS)
    ends = operands.cu_seqlens_q
    cut_off = WIDTH / 16 * 2.0**-23 * problem.largest_sum
    epsilon = 2.0**-11 if spec.dtype == "float16" else 2.0**-8
    for b, (expected, expected_lse) in enumerate(zip(problem.out, problem.lse, strict=True)):
        rows = slice(None) if ends is None else slice(int(ends[b]), int(ends[b + 1]))
        found, found_lse = out[0 if ends is not None else b][:, rows].cpu(), lse[0 if ends is not None else b][:, rows]
        largest = max(expected.abs().max().item(), 1.0)
        assert (found.double() - expected).abs().max().item() <= 3 * epsilon * largest
        assert torch.allclose(found_lse.cpu().double(), expected_lse, rtol=1e-6, atol=1e-5 + cut_off)
