"""Who stands beside tilewise in `bench`: PyTorch's attention by kernel, FlexAttention, and packages where installed.

A peer either prepares a call for a workload or says in one sentence why not. It may also refuse when the call is made;
then the reason is what it raised (`refusal`).
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tilewise.bench.workload import Call, Workload
from tilewise.errors import UnsupportedError

_MATH_MATRICES = 8
"""float32 score matrices that PyTorch's unfused attention holds at most, backward included."""
_MATH_SCORES = 2**31
"""Beyond these its time would be all that a run waits for."""


@dataclass(frozen=True)
class Peer:
    """`prepare` returns the forward pass on a workload, or raises UnsupportedError with the reason."""

    name: str
    about: str
    devices: frozenset[str]
    prepare: Callable[[Workload], Call]


def by_name() -> dict[str, Peer]:
    """Every peer, in the order in which results list them."""
    gpu, cpu, both = frozenset({"cuda"}), frozenset({"cpu"}), frozenset({"cuda", "cpu"})
    peers = [
        Peer("sdpa", "scaled_dot_product_attention as PyTorch dispatches it", cpu, partial(_sdpa, None)),
        Peer("flash", "its FlashAttention-2", gpu, _flash),
        Peer("efficient", "its memory-efficient attention", gpu, partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION)),
        Peer("cudnn", "its cuDNN attention", gpu, partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
        Peer("math", "its unfused attention", both, _math),
        Peer("flex", "FlexAttention, compiled for each shape, with a block mask", gpu, _flex),
    ]
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        about = f"the package {module}"
        peers += [Peer(module, about, gpu, partial(_flash_package, module))]
    peers += [Peer("fla", "flash-linear-attention's softmax attention", gpu, _fla)]
    return {peer.name: peer for peer in peers}


@contextmanager
def compiler_settings() -> Iterator[None]:
    """What FlexAttention needs of the compiler: a backward that can run again on the same graph."""
    import torch._functorch.config as functorch

    with functorch.patch(donated_buffer=False):
        yield


def refusal(problem: Exception, told: Sequence[warnings.WarningMessage] = ()) -> str:
    """Why a call failed, in one line: SDPA says "no available kernel" and gives the reasons as warnings."""
    reasons = [re.sub(r"\s*\(Triggered internally.*", "", str(warning.message), flags=re.DOTALL) for warning in told]
    reasons = [r for r in reasons if "not used because" not in r and "runtime disabled" not in r]
    lines = str(problem).strip().splitlines()
    said = lines[0] if lines else type(problem).__name__
    return " ".join(dict.fromkeys([*reasons, said] if "No available kernel" not in said else reasons)) or said


def _sdpa(kernel: SDPBackend | None, work: Workload) -> Call:
    """The choice of kernel is in force during the forward only; the graph remembers it for the backward."""
    case = work.case
    if case.packed:
        raise UnsupportedError("scaled_dot_product_attention takes no packed sequences")
    plain = case.window is None and case.sparsity is None and not case.dense_mask
    mask = None if plain else work.allowed(0, case.length, case.length)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": plain and case.causal}
    if case.heads != case.kv_heads:
        options["enable_gqa"] = True
    if kernel is None:
        return lambda: scaled_dot_product_attention(*work.leaves, **options)

    def call() -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(*work.leaves, **options)

    return call


def _flash(work: Workload) -> Call:
    if not work.case.packed:
        return _sdpa(SDPBackend.FLASH_ATTENTION, work)
    from torch.nn.attention.varlen import varlen_attn

    longest = max(work.case.packed)
    sizes = (work.cu_seqlens, work.cu_seqlens, longest, longest)
    if "is_causal" in inspect.signature(varlen_attn).parameters:
        causal: dict[str, Any] = {"is_causal": work.case.causal}
    else:
        causal = {"window_size": (-1, 0 if work.case.causal else -1)}
    return lambda: _first(varlen_attn(*work.leaves, *sizes, **causal))


def _math(work: Workload) -> Call:
    case = work.case
    scores = case.batch * case.heads * case.length**2
    if scores > _MATH_SCORES:
        raise UnsupportedError(f"each of its score matrices would take {scores * 4 / 2**30:.0f} GiB")
    if work.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(work.device)
        if scores * 4 * _MATH_MATRICES > free:
            need = scores * 4 * _MATH_MATRICES / 2**30
            raise UnsupportedError(f"needs about {need:.0f} GiB for score matrices, {free / 2**30:.0f} GiB are free")
    return _sdpa(SDPBackend.MATH, work)


def _flex(work: Workload) -> Call:
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # Every case is compiled for its own shape: what earlier ones left would count towards the limit of recompilations.
    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"block_mask": _block_mask(work), "enable_gqa": work.case.heads != work.case.kv_heads}
    if not work.case.packed:
        return lambda: _first(compiled(*work.leaves, **options))
    return lambda: _first(compiled(*(x.transpose(0, 1)[None] for x in work.leaves), **options))[0].transpose(0, 1)


def _block_mask(work: Workload) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    from tilewise.masks.tensors import to_block_mask

    case = work.case
    if case.sparsity is not None:
        return to_block_mask(work.block_mask, case.length, case.length, device=work.device)
    seen = _pair_seen(work)
    if seen is None:
        return None
    return create_block_mask(seen, None, None, case.length, case.length, device=str(work.device))


def _pair_seen(work: Workload) -> Callable[[Any, Any, Any, Any], Any] | None:
    """FlexAttention's `mask_mod` of a case: (batch, head, row, key) to whether the row sees the key."""
    case, window = work.case, work.case.window
    if case.packed:
        lengths = torch.tensor(case.packed, device=work.device)
        ids = torch.arange(len(case.packed), device=work.device).repeat_interleave(lengths)
        if case.causal:
            return lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)
        return lambda b, h, i, j: ids[i] == ids[j]
    if case.dense_mask:
        dense = work.dense_mask
        return lambda b, h, i, j: dense[i, j]
    if window is not None:
        return lambda b, h, i, j: (i >= j) & (i - j <= window)
    return (lambda b, h, i, j: i >= j) if case.causal else None


def _flash_package(module: str, work: Workload) -> Call:
    """FlashAttention 2, 3 or 4, whose functions take [B, N, H, D] and agree on the names used here."""
    package, case = _imported(module), work.case
    options: dict[str, Any] = {"causal": case.causal}
    if case.sparsity is not None or case.dense_mask:
        raise UnsupportedError(f"{module} takes no mask")
    if case.window is not None:
        options["window_size"] = (case.window, 0)
    if case.packed:
        options |= {f"cu_seqlens_{side}": work.cu_seqlens for side in "qk"}
        options |= {f"max_seqlen_{side}": max(case.packed) for side in "qk"}
        return lambda: _first(package.flash_attn_varlen_func(*work.leaves, **options))
    return lambda: _first(package.flash_attn_func(*_rows_first(work), **options)).transpose(1, 2)


def _fla(work: Workload) -> Call:
    case, parallel_attn = work.case, _imported("fla.ops.attn").parallel_attn
    if not case.causal or case.window is not None or case.packed:
        raise UnsupportedError("plain causal attention only")
    return lambda: _first(parallel_attn(*_rows_first(work))).transpose(1, 2)


def _rows_first(work: Workload) -> list[Tensor]:
    return [x.transpose(1, 2) for x in work.leaves]


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as problem:
        raise UnsupportedError(f"{module} cannot be imported: {problem}") from problem


def _first(result: Any) -> Tensor:
    """The output, where a function may also return an LSE."""
    return result[0] if isinstance(result, tuple) else result
