"""Bad input: an error that names the argument, what it got, what it wants and the likely fix, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tilewise
from tilewise.backends.base import BACKEND_NAMES
from tilewise.errors import UnsupportedError

Q = torch.zeros(2, 4, 10, 8)
INTS = torch.zeros(2, 4, 10, 8, dtype=torch.int64)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, r"q: got list; wants a torch\.Tensor"),
    ({"q": INTS}, TypeError, r"q: got dtype torch\.int64; wants float32.*Fix: q = q\.float\(\)"),
    ({"v": INTS}, TypeError, r"v: got dtype torch\.int64"),
    ({"q": Q[0]}, ValueError, r"q: got shape \[4, 10, 8\]; wants 4 dimensions.*Fix: unsqueeze"),
    ({"k": Q.double()}, TypeError, r"k: got dtype torch\.float64; wants q's dtype torch\.float32.*k\.to\(q\.dtype\)"),
    ({"k": Q.to("meta")}, ValueError, r"k: got device meta; wants q's device cpu"),
    ({"k": Q[:1]}, ValueError, r"k: got batch 1; wants q's batch 2"),
    ({"k": Q[..., :6]}, ValueError, r"k: got head dim 6; wants q's head dim 8"),
    ({"v": Q[:, :2]}, ValueError, r"v: got 2 heads; wants k's 4 heads"),
    ({"v": Q[:, :, :9]}, ValueError, r"v: got length 9; wants k's length 10"),
    ({"k": Q[:, :3], "v": Q[:, :3]}, ValueError, r"k: got 3 heads; wants a number of heads that divides q's 4"),
    ({"layout": "bnhd"}, ValueError, r"layout: got 'bnhd'; wants 'bhsd'"),
    ({"window": (-1, 0)}, ValueError, r"window: got \(-1, 0\).*Fix: None, not -1"),
    ({"window": 4}, ValueError, r"window: got 4; wants a pair"),
    ({"window": (1.5, 0)}, TypeError, r"window: got float"),
    ({"mask": torch.ones(9, 10, dtype=torch.bool)}, ValueError, r"mask: got shape \[9, 10\]; wants .*\[2, 4, 10, 10\]"),
    ({"mask": torch.ones(2, 10, dtype=torch.bool)}, ValueError, r"Fix: a key-padding mask is mask\[:, None, None, :\]"),
    ({"mask": torch.ones(10, 10)}, TypeError, r"mask: got dtype torch\.float32.*additive mask goes in bias="),
    ({"mask": torch.ones(10, 10, dtype=torch.int32)}, TypeError, r"mask: got dtype torch\.int32.*mask\.bool\(\)"),
    ({"mask": "causal"}, TypeError, r"mask: got .*causal.*mask value"),
    ({"bias": torch.zeros(3, 10, 10)}, ValueError, r"bias: got shape \[3, 10, 10\]"),
    ({"bias": INTS}, TypeError, r"bias: got dtype torch\.int64"),
    ({"bias": tilewise.biases.Relative(torch.zeros(3, 5))}, ValueError, r"bias: got values for 3 heads; wants q's 4"),
    ({"alibi": torch.zeros(3)}, ValueError, r"alibi: got shape \[3\]; wants shape \[H\] = \[4\] or \[B, H\]"),
    ({"alibi": torch.zeros(4, requires_grad=True)}, ValueError, r"alibi: got a tensor that requires grad.*Relative"),
    ({"mask": tilewise.masks.Causal([0, 1, 2])}, ValueError, r"mask: got a mask of 3 sequences; wants .* B = 2"),
    ({"mask": tilewise.masks.PerHead([tilewise.masks.Causal()] * 3)}, ValueError, r"mask: got a mask of 3 heads"),
    ({"mask": tilewise.masks.Documents([0] * 9)}, ValueError, r"ids"),
    ({"sink": torch.zeros(2, 4)}, ValueError, r"sink: got shape \[2, 4\]; wants shape \[H\] = \[4\]"),
    ({"scale": float("nan")}, ValueError, r"scale: got nan; wants a finite number"),
    ({"scale": torch.tensor(1.0)}, TypeError, r"scale: got Tensor; wants a number.*scale\.item\(\)"),
    ({"scale": 1e39}, ValueError, r"scale: got 1e\+39; wants a finite number within float32's range"),
    ({"softcap": 0.0}, ValueError, r"softcap: got 0\.0; wants a number above 0"),
    ({"dropout": 1.0}, ValueError, r"dropout: got 1\.0; wants a probability in \[0, 1\)"),
    ({"dropout": None}, TypeError, r"dropout: got NoneType; wants a number"),
    ({"causal": "no"}, TypeError, r"causal: got no; wants True or False"),
    ({"window": (2**31, 0)}, ValueError, r"window: .*up to 2147483647"),
    ({"q_offset": 2**40}, ValueError, r"q_offset: got 1099511627776; wants an int within"),
    ({"q": Q.to_sparse()}, TypeError, r"q: got layout torch\.sparse_coo; wants a strided tensor"),
    ({"dropout": -0.1}, ValueError, r"dropout: got -0\.1"),
    ({"q_offset": 1.0}, TypeError, r"q_offset: got float"),
    ({"q_offset": torch.zeros(2)}, ValueError, r"q_offset: got torch\.float32 of shape \[2\]; wants an int, or int32"),
    ({"q_offset": torch.zeros(3, dtype=torch.int32)}, ValueError, r"q_offset: .*shape \[3\]"),
    ({"backend": "flash"}, ValueError, rf"backend: got 'flash'; wants 'auto' or one of {', '.join(BACKEND_NAMES)}"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": Q, "k": Q, "v": Q, **change}
    for function in (tilewise.attention, tilewise.explain):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_transposed_layout_is_recognised() -> None:
    q, k = torch.zeros(2, 100, 8, 64), torch.zeros(2, 120, 8, 64)
    with pytest.raises(ValueError, match=r"pass layout='bshd' \(now 'bhsd'\) or transpose\(1, 2\)"):
        tilewise.attention(q, k, k)
    assert tilewise.attention(q, k, k, layout="bshd").shape == q.shape
    with pytest.raises(ValueError, match=r"pass layout='bhsd' \(now 'bshd'\)"):
        tilewise.attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), layout="bshd")


def test_relative_bias_checks_itself() -> None:
    with pytest.raises(ValueError, match=r"values: got shape \[4, 6\]; wants shape \[H, 2R\+1\]"):
        tilewise.biases.Relative(torch.zeros(4, 6))
    with pytest.raises(TypeError, match=r"values: got dtype torch\.int64"):
        tilewise.biases.Relative(torch.zeros(4, 5, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_kernels_for_gpus_say_why_not_and_who_can(backend: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"backend='{backend}' cannot run .*: .*backend='tiled' can"):
        tilewise.attention(Q, Q, Q, backend=backend)


def test_named_backend_never_falls_back() -> None:
    with pytest.raises(UnsupportedError, match=r"backend='sdpa' cannot run .*softcap.*backend='tiled' can"):
        tilewise.attention(Q, Q, Q, softcap=3.0, backend="sdpa")


def test_failed_call_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="mask"):
        tilewise.attention(Q, Q, Q, dropout=0.5, mask=torch.ones(9, 10, dtype=torch.bool))
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match=r"explain\(\) has no argument 'softmax_scale'"):
        tilewise.explain(Q, Q, Q, softmax_scale=1.0)  # type: ignore[call-arg]


def test_explain_draws_nothing_and_wants_a_real_device() -> None:
    before = torch.get_rng_state()
    tilewise.explain(Q, Q, Q, dropout=0.5)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="q: got device meta"):
        tilewise.explain(*[Q.to("meta")] * 3)


def test_merge_checks() -> None:
    o, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"o2: got shape \[2, 3, 5\]; wants o1's shape \[2, 3, 4\]"):
        tilewise.merge(o, lse, torch.zeros(2, 3, 5), lse)
    with pytest.raises(ValueError, match=r"lse2: got shape \[2, 4\]; wants o1's shape without its last dim, \[2, 3\]"):
        tilewise.merge(o, lse, o, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"o1: got a single number; wants shape \[\.\.\., Dv\]"):
        tilewise.merge(*[torch.tensor(1.0)] * 4)
