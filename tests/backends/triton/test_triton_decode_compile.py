"""Ahead-of-time compilation of the decoding kernels, without a GPU: what the tables choose fits the chip."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from aot import Report, compiling, resources
from compile_cases import SHARED_MEMORY
from machine_code import unset_uniform_registers

from tilewise.backends.decoding import DecodeOperands
from tilewise.backends.triton.decode_configs import DecodeTile, choose_splits, tile_for
from tilewise.backends.triton.decoding import TRITON_DECODE
from tilewise.spec import DecodeSpec


class DecodeTarget(NamedTuple):
    """One compilation: `contents` is a dtype, "int8" or "latent"; `page_size` 0 is a dense cache."""

    arch: int
    contents: str
    dim: int
    tokens: int = 1
    page_size: int = 0
    features: frozenset[str] = frozenset()

    def __str__(self) -> str:
        extras = "+".join(sorted(self.features)) or "plain"
        place = f"page {self.page_size}" if self.page_size else "dense"
        return f"sm_{self.arch}-{self.contents}-{self.dim}-T{self.tokens}-{place}-{extras}"


FEATURES = ("window", "tree", "softcap", "alibi", "sink", "padding", "packed", "ring")
MAIN = [
    *(DecodeTarget(90, "bfloat16", dim) for dim in (64, 128, 256, 512)),
    DecodeTarget(90, "bfloat16", 128, page_size=64),
    DecodeTarget(90, "bfloat16", 128, page_size=16),
    DecodeTarget(90, "bfloat16", 128, tokens=4),
    *(DecodeTarget(90, "int8", dim) for dim in (64, 128)),
    *(DecodeTarget(90, "float32", dim, tokens=40) for dim in (128, 512)),
    DecodeTarget(90, "latent", 512),
    DecodeTarget(90, "latent", 512, page_size=64),
    DecodeTarget(90, "latent", 512, features=frozenset({"few heads"})),
]
LADEN = [
    DecodeTarget(arch, contents, dim, tokens, page, frozenset(random.Random(n).sample(FEATURES[:-1], 4)))
    for n, (arch, contents, dim, tokens, page) in enumerate(
        [
            (90, "bfloat16", 128, 4, 17),
            (80, "bfloat16", 128, 2, 64),
            (120, "int8", 64, 1, 16),
            (100, "float32", 64, 3, 0),
        ]
    )
]
LADEN.append(DecodeTarget(90, "bfloat16", 24, 40, features=frozenset({"narrow values"})))
"""Wide keys, narrow values, 64 rows: with two swizzles the assembler of CUDA 12.8 reads what nobody wrote."""
SPILLS = {"int8": 72, "latent": 408, "float32": 8}
"""Bytes a thread that the measured configurations may spill under Triton 3.9 (latent with pages 128 under 3.6, int8 and
latent without pages none there, float32 none under 3.6 and 3.7); the others spill none."""


def compile_decode(target: DecodeTarget) -> list[Report]:
    """Compile the split kernel and the merge as their launcher launches them."""
    has = target.features.__contains__
    latent, int8 = target.contents == "latent", target.contents == "int8"
    dtype = torch.float32 if target.contents == "float32" else torch.bfloat16
    batch, kv_heads, length = 4, 1 if latent else 2, 4096
    heads, dim_v = (128 if latent and not has("few heads") else 8), target.dim
    dim = dim_v + 64 if latent else dim_v + 16 if has("narrow values") else dim_v

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pages, size = (batch, length) if not target.page_size else (batch * length // target.page_size, target.page_size)
    stored = torch.int8 if int8 else dtype
    scales = meta(pages, kv_heads, size, dtype=torch.float32) if int8 else None
    integers = torch.int32
    operands = DecodeOperands(
        meta(1 if has("packed") else batch, heads, target.tokens * (batch if has("packed") else 1), dim),
        meta(pages, kv_heads, size, dim, dtype=stored),
        None if latent else meta(pages, kv_heads, size, dim_v, dtype=stored),
        meta(batch, dtype=integers),
        meta(batch, -(-length // size), dtype=integers) if target.page_size else None,
        scales,
        scales,
        meta(batch, dtype=integers) if has("padding") else None,
        meta(heads) if has("sink") else None,
        meta(1, heads, dtype=torch.float32) if has("alibi") else None,
        meta(1, target.tokens, target.tokens, dtype=torch.bool) if has("tree") else None,
        meta(batch + 1, dtype=integers) if has("packed") else None,
    )
    spec = DecodeSpec(
        batch, heads, kv_heads, target.tokens, length, dim, dim_v, length, str(dtype).removeprefix("torch."),
        f"sm_{target.arch}", dim**-0.5, window=(500, None) if has("window") or has("ring") else (None, None),
        page_size=target.page_size or None, ring=has("ring"), latent=latent, int8=int8, padded=has("padding"),
        tree=has("tree"), alibi=has("alibi"), softcap=30.0 if has("softcap") else None, sink=has("sink"),
        packed=has("packed"), num_splits=3,
    )  # fmt: skip
    assert TRITON_DECODE.why_not(spec) is None
    with compiling(target.arch) as compiled:
        TRITON_DECODE.forward(operands, spec, TRITON_DECODE.configure(spec))
    return [resources(kernel) for kernel in compiled]


@pytest.mark.parametrize("target", [*MAIN, *LADEN], ids=lambda t: f"compile-{t}")
def test_target(target: DecodeTarget, compiler: None) -> None:
    reports = compile_decode(target)
    assert [report.kernel for report in reports] == ["attention_decode", "merge_splits"]
    for report in reports:
        assert report.shared <= SHARED_MEMORY[target.arch], report[:4]
        if target.arch == 90:
            assert not unset_uniform_registers(report.compiled)
        if target in MAIN:
            assert report.spills <= SPILLS.get(target.contents, 0), report[:4]


@pytest.mark.parametrize("page_size", [0, 64], ids=lambda size: f"compile-sm_90-{size}")
def test_loads_are_wide(page_size: int, compiler: None) -> None:
    """Keys and values come into shared memory 16 bytes at a time, past the registers."""
    ptx = compile_decode(DecodeTarget(90, "bfloat16", 128, page_size=page_size))[0].compiled.asm["ptx"]
    assert ptx.count("cp.async.cg.shared.global") >= 16
    assert "cp.async.ca.shared.global" not in ptx


@pytest.mark.parametrize(
    ("batch", "tokens", "page", "splits"),
    [
        (1, 8192, None, 16),
        (1, 8192, 64, 16),  # 32 programs of 4 blocks a multiprocessor would be slower
        (2, 8192, 64, 8),
        (1, 16384, 64, 16),
        (16, 8192, None, 1),
        (16, 8192, 64, 2),  # two programs hide each other's look-ups
        (1, 131072, 64, 32),
    ],
)
def test_splits_fill_the_device(batch: int, tokens: int, page: int | None, splits: int) -> None:
    spec = DecodeSpec(batch, 32, 8, 1, tokens, 128, 128, tokens, "bfloat16", "sm_90", 128**-0.5, page_size=page)
    assert choose_splits(spec, tile_for(spec), 1, 132) == splits


def test_programs_without_company_are_never_more() -> None:
    tile = DecodeTile(64, 4, 4, resident=2, company=16)
    for batch in range(1, 40):
        for tokens in (64, 300, 1024, 2048, 2752, 4800, 16384):
            spec = DecodeSpec(batch, 8, 8, 1, tokens, 128, 128, tokens, "bfloat16", "sm_90", 0.1, page_size=64)
            assert choose_splits(spec, tile, 1, 132) <= choose_splits(spec, tile._replace(company=0), 1, 132)
