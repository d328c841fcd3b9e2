"""Packed sequences against the oracle, one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import tilewise
from budget import Case, budgets, worst
from cases import SEED
from tilewise.errors import UnsupportedError

LENGTHS = [(5, 7), (0, 4), (64, 64), (3, 0), (65, 130), (1, 1), (129, 40)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (9, 4)},
    {"causal": True, "softcap": 2.0},
    {"q_offset": 2, "causal": True},
    {"q_offset": "tensor", "causal": True},
    {"alibi": "head"},
    {"alibi": "batch"},
    {"relative": True},
    {"sink": True, "causal": True},
    {"mask": "per head"},
    {"dropout": 0.25, "short": True},
]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("backend", ["standard", "tiled", "tiles"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_sequence_alone(options: dict[str, Any], backend: str) -> None:
    options = dict(options)
    lengths = [(n % 17, m % 19) for n, m in LENGTHS] if options.pop("short", False) else LENGTHS
    g = torch.Generator().manual_seed(1)
    heads, kv_heads, dim, count = 4, 2, 24, len(lengths)
    cu_q, cu_k = cumulative([n for n, _ in lengths]), cumulative([m for _, m in lengths])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).requires_grad_()

    tensors = {"q": normal(int(cu_q[-1]), heads, dim), "k": normal(int(cu_k[-1]), kv_heads, dim)}
    tensors["v"] = normal(int(cu_k[-1]), kv_heads, dim)
    given: dict[str, Any] = dict(options)
    per_sequence: list[dict[str, Any]] = [dict(options) for _ in lengths]
    if options.get("q_offset") == "tensor":
        given["q_offset"] = torch.arange(count, dtype=torch.int32) * 3 - 4
        for s, own in enumerate(per_sequence):
            own["q_offset"] = int(given["q_offset"][s])
    if "alibi" in options:
        slopes = (
            torch.rand(count, heads, generator=g) if options["alibi"] == "batch" else torch.rand(heads, generator=g)
        )
        given["alibi"] = slopes
        for s, own in enumerate(per_sequence):
            own["alibi"] = slopes[s] if slopes.dim() == 2 else slopes
    if "mask" in options:
        given["mask"] = torch.tensor([True, False, True, True]).view(heads, 1, 1)
        for own in per_sequence:
            own["mask"] = given["mask"]
    shared = {}
    if given.pop("relative", False):
        shared["relative"] = normal(heads, 11)
        given["bias"] = tilewise.biases.Relative(shared["relative"])
    if given.pop("sink", False):
        shared["sink"] = given["sink"] = normal(heads)
    torch.manual_seed(SEED)
    longest = max(n for n, _ in lengths), max(m for _, m in lengths)
    args = tensors["q"], tensors["k"], tensors["v"], cu_q, cu_k, *longest
    out, lse = tilewise.attention_varlen(*args, return_lse=True, backend=backend, **given)
    dout, dlse = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    leaves = {**tensors, **shared}
    grads = dict(zip(leaves, torch.autograd.grad([out, lse], list(leaves.values()), [dout, dlse]), strict=True))

    torch.manual_seed(SEED)
    drawn = int(torch.randint(2**62, (1,)).item())
    totals = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in shared.items()}
    allowances = dict.fromkeys(shared, 0.0)
    for s, own in enumerate(per_sequence):
        rows, keys = slice(int(cu_q[s]), int(cu_q[s + 1])), slice(int(cu_k[s]), int(cu_k[s + 1]))
        own = {name: x for name, x in own.items() if name not in ("relative", "sink")}
        parts = {"q": tensors["q"][rows], "k": tensors["k"][keys], "v": tensors["v"][keys]}
        parts = {name: x.detach().transpose(0, 1)[None] for name, x in parts.items()} | shared
        if "dropout" in own:
            kept = oracle.philox_keep(
                drawn, own["dropout"], s + 1, heads, *(len(x) for x in (out[rows], tensors["k"][keys]))
            )
            own["keep"] = kept[s:]
        keep = own.pop("keep", None)
        case = Case(parts, own, keep)
        cotangents = dout[rows].transpose(0, 1)[None], dlse[:, rows][None]
        exact, allowed = budgets(case, torch.float32, *cotangents)
        assert worst(out[rows].transpose(0, 1)[None], exact.out) <= allowed["out"], s
        assert worst(lse[:, rows][None], exact.lse) <= allowed["lse"], s
        for name, place in (("q", rows), ("k", keys), ("v", keys)):
            assert worst(grads[name][place].transpose(0, 1)[None], exact.grads[name]) <= allowed[name], (name, s)
        for name in shared:
            totals[name] += exact.grads[name]
            allowances[name] += allowed[name]
    for name, total in totals.items():
        assert worst(grads[name], total) <= allowances[name], name


def test_equals_dense_for_equal_lengths() -> None:
    q, k, v = (torch.randn(2, 3, 40, 16) for _ in range(3))
    packed = [x.transpose(1, 2).reshape(80, 3, 16) for x in (q, k, v)]
    cu = torch.tensor([0, 40, 80], dtype=torch.int32)
    out, lse = tilewise.attention_varlen(packed[0], packed[1], packed[2], cu, cu, 40, 40, causal=True, return_lse=True)
    dense, dense_lse = tilewise.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out.view(2, 40, 3, 16).transpose(1, 2), dense)
    torch.testing.assert_close(lse.view(3, 2, 40).transpose(0, 1), dense_lse)


def test_a_matrix_has_no_place_on_a_packed_batch() -> None:
    q = torch.randn(8, 2, 4)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    for option in ({"mask": torch.ones(8, 8, dtype=torch.bool)}, {"bias": torch.zeros(8, 8)}):
        with pytest.raises(UnsupportedError, match="per-head"):
            tilewise.attention_varlen(q, q, q, cu, cu, 5, 5, **option)


@pytest.mark.parametrize(
    ("cu", "longest", "error", "message"),
    [
        (torch.tensor([0, 3, 8]), 5, TypeError, "cu_seqlens_q: got dtype torch.int64; wants int32"),
        (torch.tensor([0, 6, 3, 8], dtype=torch.int32), 6, ValueError, "cu_seqlens_q.*never fall"),
        (torch.tensor([1, 3, 8], dtype=torch.int32), 5, ValueError, "cu_seqlens_q: got first value 1; wants 0"),
        (torch.tensor([0, 3, 7], dtype=torch.int32), 5, ValueError, "cu_seqlens_q: got last value 7; wants .* 8"),
        (torch.tensor([[0, 8]], dtype=torch.int32), 8, ValueError, "cu_seqlens_q: got shape"),
        (torch.tensor([0, 3, 8], dtype=torch.int32), 4, ValueError, "max_seqlen_q: got 4; wants at least .* 5"),
        (torch.tensor([0, 3, 8], dtype=torch.int32), 5.0, TypeError, "max_seqlen_q: got float"),
        ([0, 3, 8], 5, TypeError, "cu_seqlens_q: got list"),
    ],
)
def test_bad_lengths(cu: Any, longest: Any, error: type[Exception], message: str) -> None:
    q = torch.randn(8, 2, 4)
    good = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(error, match=message):
        tilewise.attention_varlen(q, q, q, cu, good, longest, 5)
