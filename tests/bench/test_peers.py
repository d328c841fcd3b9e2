"""Each peer computes what its case says, in the layout that everybody uses; whoever cannot, says why."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from test_judge import CASES, by_oracle

from tilewise.bench import peers as peers_module
from tilewise.bench.judge import Judge
from tilewise.bench.peers import by_name, compiler_settings, refusal
from tilewise.bench.suites import Case
from tilewise.bench.workload import Workload
from tilewise.errors import UnsupportedError

CPU = torch.device("cpu")


@pytest.mark.parametrize("peer", ["sdpa", "math"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.packed])
def test_pytorchs_attention_is_asked_for_the_same_problem(name: str, peer: str) -> None:
    work = Workload.of(CASES[name], CPU)
    out = by_name()[peer].prepare(work)()
    exact, *grads = by_oracle(work)
    torch.testing.assert_close(out.detach().double(), exact, atol=1e-5, rtol=0)
    for found, grad in zip(torch.autograd.grad(out, work.leaves, work.dout), grads, strict=True):
        torch.testing.assert_close(found.double(), grad, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_ours_is_asked_for_the_same_problem(name: str) -> None:
    work = Workload.of(CASES[name], CPU)
    out = work.ours("standard")()
    exact, *grads = by_oracle(work)
    torch.testing.assert_close(out.detach().double(), exact, atol=1e-5, rtol=0)
    for found, grad in zip(torch.autograd.grad(out, work.leaves, work.dout), grads, strict=True):
        torch.testing.assert_close(found.double(), grad, atol=1e-4, rtol=0)
    assert work.plan("standard").backend == "standard"
    assert work.plan("auto").backend == "tiled"


@pytest.mark.parametrize("name", CASES)
def test_flexattentions_mask_is_that_of_the_case(name: str) -> None:
    work = Workload.of(CASES[name], CPU)
    case, length = work.case, work.case.length
    block_mask = peers_module._block_mask(work)
    if block_mask is None:
        assert case.pattern == "full"
        return
    i, j = torch.arange(length)[:, None], torch.arange(length)
    zero = torch.zeros((), dtype=torch.long)
    seen = block_mask.mask_mod(zero, zero, i, j).expand(length, length)
    if case.packed:
        ids = torch.repeat_interleave(torch.arange(len(case.packed)), torch.tensor(case.packed))
        wanted = (ids[:, None] == ids) & ((j <= i) if case.causal else torch.tensor(True))
    else:
        wanted = work.allowed(0, length, length)
    assert torch.equal(seen, wanted)
    blocks = block_mask.to_dense()[0, 0].bool()
    assert torch.equal(blocks, _any_by_block(wanted))


def _any_by_block(seen: torch.Tensor) -> torch.Tensor:
    extra = -len(seen) % 128
    padded = torch.nn.functional.pad(seen, (0, extra, 0, extra))
    count = len(padded) // 128
    return padded.view(count, 128, count, 128).any(dim=3).any(dim=1)


def flash_package(calls: list[dict]) -> ModuleType:
    """A package like flash_attn: [B, N, H, D] or packed, computed by SDPA; it also returns an LSE, as some do."""
    module = ModuleType("flash_attn")

    def flash_attn_func(q, k, v, **options):
        calls.append(options)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        attention = torch.nn.functional.scaled_dot_product_attention
        out = attention(*heads_first, is_causal=options["causal"], enable_gqa=True)
        return out.transpose(1, 2), None

    def flash_attn_varlen_func(q, k, v, **options):
        calls.append(options)
        bounds = options["cu_seqlens_q"].tolist()
        assert options["max_seqlen_k"] == max(b - a for a, b in pairwise(bounds))
        parts = [
            flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], causal=options["causal"])[0][0]
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


@pytest.mark.parametrize("name", ["full", "causal", "packed", "packed causal"])
def test_a_flash_package_is_called_in_its_own_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", flash_package([]))
    work = Workload.of(CASES[name], CPU)
    out = by_name()["flash_attn"].prepare(work)()
    exact, *grads = by_oracle(work)
    torch.testing.assert_close(out.detach().double(), exact, atol=1e-5, rtol=0)
    for found, grad in zip(torch.autograd.grad(out, work.leaves, work.dout), grads, strict=True):
        torch.testing.assert_close(found.double(), grad, atol=1e-4, rtol=0)


def test_a_flash_package_gets_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    monkeypatch.setitem(sys.modules, "flash_attn", flash_package(calls))
    by_name()["flash_attn"].prepare(Workload.of(CASES["window"], CPU))()
    assert calls == [{"causal": True, "window_size": (63, 0)}]


def test_fla_is_plain_causal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fla.ops.attn")
    module.parallel_attn = lambda q, k, v: flash_package([]).flash_attn_func(q, k, v, causal=True)[0]
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, "fla.ops.attn", module)
    work = Workload.of(CASES["causal"], CPU)
    out = by_name()["fla"].prepare(work)()
    torch.testing.assert_close(out.detach().double(), by_oracle(work)[0], atol=1e-5, rtol=0)
    for name in ("full", "window", "packed causal"):
        with pytest.raises(UnsupportedError, match="plain causal attention only"):
            by_name()["fla"].prepare(Workload.of(CASES[name], CPU))


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface", "flash_attn.cute", "fla"])
def test_a_package_that_is_not_there_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (name, name.partition(".")[0]):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=f"{name.partition('.')[0]}.* cannot be imported"):
        by_name()[name].prepare(Workload.of(CASES["causal"], CPU))


def test_unfused_attention_stops_where_its_matrices_get_too_large() -> None:
    case = Case(1, 64, 64, 8192, 1, "bfloat16")
    with pytest.raises(UnsupportedError, match="would take 16 GiB"):
        by_name()["math"].prepare(Workload.of(case, CPU))


def test_packed_sequences_are_not_for_sdpa() -> None:
    with pytest.raises(UnsupportedError, match="no packed sequences"):
        by_name()["sdpa"].prepare(Workload.of(CASES["packed"], CPU))


def test_a_refusal_is_one_line_with_the_reason() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.warn("Flash attention kernel not used because: (Triggered internally at a.cpp:1.)", stacklevel=1)
        warnings.warn("Flash Attention has no masks. (Triggered internally at b.cpp:2.)\n  return f()", stacklevel=1)
        warnings.warn("cuDNN attention has been runtime disabled. (Triggered internally at c.cpp:3.)", stacklevel=1)
    said = refusal(RuntimeError("No available kernel. Aborting execution."), told)
    assert said == "Flash Attention has no masks."
    assert refusal(RuntimeError("No available kernel.")) == "No available kernel."
    assert refusal(ValueError("first\nsecond")) == "first"
    assert refusal(KeyError()) == "KeyError"


def test_the_compilers_setting_is_put_back() -> None:
    import torch._functorch.config as functorch

    before = functorch.donated_buffer
    with compiler_settings():
        assert not functorch.donated_buffer
    assert functorch.donated_buffer == before


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("peer", ["flash", "efficient", "cudnn", "math", "flex"])
def test_peers_on_a_gpu(peer: str, name: str) -> None:
    """Those that take the case are right; FlexAttention takes every one."""
    case = replace(CASES[name], dtype="bfloat16", head_dim=64)
    work = Workload.of(case, torch.device("cuda"))
    judge = Judge(work, backward=True)
    try:
        with compiler_settings(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = by_name()[peer].prepare(work)()
            grads = torch.autograd.grad(out, work.leaves, work.dout, retain_graph=True)
    except (RuntimeError, UnsupportedError):
        assert peer != "flex"
        pytest.skip("this peer refuses the case")
    assert judge.out(out.detach()).passed
    assert judge.gradients(*grads).passed
