"""Attention problems for tests: any combination of the features of SPEC 1.5, and tilewise called like the oracle."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import oracle
import tilewise
from budget import Attention, Case

FEATURES = (
    "causal", "window", "q_offset", "offsets", "gqa", "dv", "bias", "relative", "alibi", "softcap", "sink", "dropout",
    "mask", "empty",
)  # fmt: skip
EXCLUSIVE = {frozenset({"q_offset", "offsets"}), frozenset({"bias", "relative"})}
"""Features that one call cannot have together."""
PAIRS = [pair for pair in combinations(FEATURES, 2) if frozenset(pair) not in EXCLUSIVE]
SIZES = [(1, 1), (2, 1), (1, 63), (63, 64), (64, 65), (65, 113), (113, 40), (129, 257), (140, 128)]
DROPOUT_SIZES = [(1, 1), (2, 1), (1, 13), (33, 30), (20, 33)]
"""Smaller, because the oracle draws each element in Python."""
SEED = 1234
"""What `torch.manual_seed` gets before a call with dropout."""


def sizes_for(features: set[str], seed: int) -> tuple[int, int]:
    """Odd sizes (N, M), another pair for each seed."""
    sizes = DROPOUT_SIZES if "dropout" in features else SIZES
    return sizes[seed % len(sizes)]


def random_features(seed: int) -> set[str]:
    """Many features at once, without contradictions."""
    g = torch.Generator().manual_seed(seed)
    features = {name for name in FEATURES if torch.rand(1, generator=g) < 0.4}
    for pair in EXCLUSIVE:
        if pair <= features:
            features.discard(min(pair))
    return features


def make_case(
    features: set[str],
    *,
    n: int = 70,
    m: int = 90,
    batch: int = 2,
    heads: int = 4,
    dim: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Unit-normal q, k, v in float64 and the tensors and options that `features` ask for.

    Everything lies on the CPU; `device` is where the call under test will draw its dropout seed.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    kv_heads = heads // 2 if "gqa" in features else heads
    dim_v = dim + 9 if "dv" in features else dim
    tensors = {"q": normal(batch, heads, n, dim), "k": normal(batch, kv_heads, m, dim)}
    tensors["v"] = normal(batch, kv_heads, m, dim_v)
    options: dict[str, Any] = {}
    if "causal" in features:
        options["causal"] = True
    if "window" in features:
        options["window"] = (21, 5)
    if "q_offset" in features:
        options["q_offset"] = 3
    if "offsets" in features:
        options["q_offset"] = torch.randint(-5, m, (batch,), generator=g, dtype=torch.int32)
    if "bias" in features:
        tensors["bias"] = normal(batch, 1, n, m) if seed % 2 else normal(1, heads, n, m)
    if "relative" in features:
        tensors["relative"] = normal(heads, 2 * 17 + 1)
    if "alibi" in features:
        slopes = normal(heads).abs() if seed % 2 else normal(batch, heads).abs()
        tensors["alibi"] = slopes.to(torch.float32).to(torch.float64)
    if "softcap" in features:
        options["softcap"] = 1.7
    if "sink" in features:
        tensors["sink"] = normal(heads)
    keep = None
    if "dropout" in features:
        options["dropout"] = 0.3
        torch.manual_seed(SEED)
        drawn = int(torch.randint(2**62, (1,), device=device).item())
        keep = oracle.philox_keep(drawn, 0.3, batch, heads, n, m)
    mask = torch.rand(batch, 1, n, m, generator=g) < 0.6
    if "empty" in features:
        mask[:, :, ::7] = False
        mask[:, :, :, : m // 2] = False
    if "mask" in features or "empty" in features:
        options["mask"] = mask
    return Case(tensors, options, keep)


def ours(backend: str, layout: str = "bhsd", device: str = "cpu") -> Attention:
    """tilewise.attention on `device` with the oracle's signature, for tensors on the CPU."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, relative: Tensor | None = None, keep: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.to(device), k.to(device), v.to(device)
        rest = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in rest.items()}
        if relative is not None:
            rest["bias"] = tilewise.biases.Relative(relative.to(device))
        torch.manual_seed(SEED)
        if layout == "bshd":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse = tilewise.attention(q, k, v, **rest, layout=layout, return_lse=True, backend=backend)
        return (out.transpose(1, 2) if layout == "bshd" else out).cpu(), lse.cpu()

    return call


def cotangents(case: Case, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit-normal dout and dlse."""
    g = torch.Generator().manual_seed(seed)
    q, v = case.tensors["q"], case.tensors["v"]
    dout = torch.randn(*q.shape[:3], v.shape[-1], generator=g, dtype=torch.float64)
    return dout, torch.randn(*q.shape[:3], generator=g, dtype=torch.float64)
