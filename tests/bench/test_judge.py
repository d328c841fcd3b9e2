"""The judge against the oracle: its float64 results are the oracle's, and its budget lets nothing but rounding pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
from tilewise.bench import judge as judge_module
from tilewise.bench.judge import Judge
from tilewise.bench.suites import Case
from tilewise.bench.workload import Workload

CPU = torch.device("cpu")
CASES = {
    "full": Case(2, 4, 2, 300, 24, "float32"),
    "causal": Case(1, 3, 3, 257, 40, "float32", causal=True),
    "window": Case(1, 2, 1, 300, 16, "float32", causal=True, window=63),
    "sparse": Case(1, 2, 2, 512, 16, "float32", sparsity=0.5),
    "mask": Case(1, 4, 1, 129, 16, "float32", dense_mask=True),
    "packed": Case(1, 4, 2, 178, 16, "float32", packed=(1, 64, 113)),
    "packed causal": Case(1, 2, 2, 178, 16, "float32", causal=True, packed=(113, 1, 64)),
}


def by_oracle(work: Workload, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of `work` through tests/oracle.py, a dense problem at a time; the mask is built from scratch."""
    case = work.case
    leaves = [x.detach().to(dtype).requires_grad_() for x in work.leaves]
    if case.packed:
        outs: list[Tensor] = []
        start = 0
        for length in case.packed:
            q, k, v = (x[start : start + length].transpose(0, 1)[None] for x in leaves)
            outs.append(oracle.attention(q, k, v, causal=case.causal)[0][0].transpose(0, 1))
            start += length
        out = torch.cat(outs)
    else:
        rows, columns = torch.arange(case.length)[:, None], torch.arange(case.length)
        mask = torch.ones(case.length, case.length, dtype=torch.bool)
        if case.causal:
            mask &= columns <= rows
        if case.window is not None:
            mask &= rows - columns <= case.window
        if case.sparsity is not None:
            mask &= work.blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
        if case.dense_mask:
            mask &= work.dense_mask
        out = oracle.attention(*leaves, mask=mask)[0]
    return (out.detach(), *torch.autograd.grad(out, leaves, work.dout.to(dtype)))


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_oracles(name: str) -> None:
    work = Workload.of(CASES[name], CPU)
    judge = Judge(work, backward=True)
    out, *grads = by_oracle(work)
    for finding in (judge.out(out), judge.gradients(*grads)):
        assert finding.error < 1e-12
        assert 1e-8 < finding.budget < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_passes(dtype: str) -> None:
    work = Workload.of(Case(1, 3, 3, 257, 40, dtype, causal=True), CPU)
    judge = Judge(work, backward=True)
    out, *grads = by_oracle(work, getattr(torch, dtype))
    assert judge.out(out).passed
    assert judge.gradients(*grads).passed


def test_an_error_in_small_rows_is_seen() -> None:
    """Off by 5 % in the last, smallest rows: less than the rounding of row 0 in bfloat16, which is as large as v."""
    work = Workload.of(Case(1, 3, 3, 1000, 40, "bfloat16", causal=True), CPU)
    judge = Judge(work, backward=False)
    out = by_oracle(work)[0]
    off = out.clone()
    off[:, :, 900:] *= 1.05
    finding = judge.out(off)
    assert not finding.passed
    assert finding.where == "out, rows 896 to 999"
    assert finding.error < 2 * torch.finfo(torch.bfloat16).eps * out.abs().max()


@pytest.mark.parametrize(("index", "name"), [(1, "dq"), (2, "dk"), (3, "dv")])
def test_each_gradient_is_looked_at(index: int, name: str) -> None:
    work = Workload.of(CASES["full"], CPU)
    results = [x.float() for x in by_oracle(work)]
    judge = Judge(work, backward=True)
    assert judge.gradients(*results[1:]).passed
    results[index][1, 1, 130] *= 1.01
    finding = judge.gradients(*results[1:])
    assert not finding.passed
    assert finding.where == f"{name}, rows 128 to 255"


def test_nan_and_missing_rows_fail() -> None:
    work = Workload.of(CASES["packed"], CPU)
    judge = Judge(work, backward=False)
    out = by_oracle(work)[0]
    for value in (float("nan"), 0.0):
        bad = out.clone()
        bad[0, 3] = value
        assert not judge.out(bad).passed
    assert judge.out(out).passed


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("full", "window", "packed"):
        work = Workload.of(CASES[name], CPU)
        whole = Judge(work, backward=True)
        monkeypatch.setitem(judge_module._CHUNK_BYTES, "cpu", 1)
        chunked = Judge(work, backward=True)
        monkeypatch.undo()
        for a, b in zip(whole._pieces, chunked._pieces, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x.exact, y.exact, rtol=0, atol=1e-12)
                torch.testing.assert_close(x.size, y.size, rtol=1e-12, atol=0)


def test_beyond_the_limit_evenly_spread_heads_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["full"]
    monkeypatch.setitem(judge_module._MOST_SCORES, "cpu", case.batch * case.heads * case.length**2 // 2)
    work = Workload.of(case, CPU)
    judge = Judge(work, backward=True)
    out, *grads = by_oracle(work)
    assert judge.out(out).passed
    assert judge.gradients(*grads).passed
    for batch, head, seen in ((0, 0, True), (0, 3, False), (1, 0, False), (1, 3, True)):
        off = out.clone()
        off[batch, head] += 1
        assert judge.out(off).passed is not seen
