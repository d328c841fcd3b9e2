"""Every computed claim is equal or explained; the tables say what the model says; advice follows from numbers."""

from __future__ import annotations

import re

import pytest

from tilewise.cli.main import VERBS
from tilewise.cost.advice import TASKS, advise, attention_share
from tilewise.cost.claims import MEASURED, computed_claims
from tilewise.cost.counts import self_attention
from tilewise.cost.hardware import DEVICES
from tilewise.cost.model import MODELS
from tilewise.cost.quoted import size
from tilewise.cost.tables import caches, comparison, devices, hierarchy, kernels, mechanisms, model_memory
from tilewise.spec import AttentionSpec

WRONG = {
    "standard, N·(3D + 2N)",
    "theoretical speed-up, 4.75·N/D",
    "shared memory over HBM",
    "whole standard",
    "whole flash",
    "storing S and P doubles it",
    "dS",
    "outer loop",
}
"""What is quoted otherwise than it comes out; everything else is equal."""


def test_claims_are_equal_or_explained() -> None:
    rows = [row for claim in computed_claims() for row in claim.rows]
    assert {row.what for row in rows if not row.equal} == WRONG
    assert all(row.note for row in rows if not row.equal)
    assert len(rows) > 60


def test_figures_that_anyone_can_check() -> None:
    computed = {(claim.title, row.what): row.computed for claim in computed_claims() for row in claim.rows}
    assert computed["score matrix in fp32, B = H = 1", "N = 8192, 32 heads, one layer"] == "8 GB"
    assert computed["on-chip tiles", "all five"] == "56 KB"
    assert computed["Q, K, V, O against S and P, d = 64, fp16", "N = 4096"] == "2 MB vs 64 MB (97 %)"
    assert computed["HBM traffic in elements, N = 1024, D = 64", "theoretical speed-up, 4.75·N/D"] == "17×"


def test_measured_claims_name_commands_that_exist() -> None:
    assert len(MEASURED) >= 16
    for claim in MEASURED:
        verbs = re.findall(r"tilewise (\w+)", claim.command)
        assert verbs or "python -m tilewise" in claim.command
        assert set(verbs) <= set(VERBS), claim.command


def test_sizes_as_people_quote_them() -> None:
    quoted = {1: "1 B", 1024: "1 KB", 1536: "1.5 KB", 2**20: "1 MB", 3 * 2**29: "1.5 GB", 2**42: "4096 GB"}
    assert {count: size(count) for count in quoted} == quoted


def test_every_table_is_a_rectangle() -> None:
    medium = MODELS["gpt2-medium"]
    grids = [mechanisms(), comparison(), caches(), kernels(), hierarchy(DEVICES["H200"]), devices()]
    grids.append(model_memory("gpt2-medium", medium, 4, (512, 8192), checkpoint=True, chunked_loss=1024))
    for grid in grids:
        assert all(len(row) == len(grid.columns) for row in grid.rows), grid.title
        assert all(cell for row in grid.rows for cell in row[:1])
    assert len(devices().rows) == len(DEVICES)
    assert caches().rows[3][2] == "576"
    assert 1 in kernels().text_columns
    assert 1 not in devices().text_columns or devices().columns[1] == "arch"


def test_attention_is_a_small_part_of_short_sequences() -> None:
    for n, heads in ((512, 16), (8192, 16)):
        width = heads * 64
        exact = 14 * n * width / (14 * n * width + 72 * width**2)
        assert attention_share(self_attention(n, 64, heads=heads), 24) == pytest.approx(exact, rel=0.01)
    h100 = DEVICES["H100 SXM"]
    assert not advise(self_attention(512, 64, heads=16), h100, "train").bother
    long = advise(self_attention(32768, 64, heads=16), h100, "train")
    assert long.bother
    assert "24 GiB" not in long.reasons[0]
    assert "768 GiB" in long.reasons[0], "24 layers of 16 heads of 32768² scores in 16 bits"


def test_advice_for_decoding_speaks_of_bytes() -> None:
    spec = AttentionSpec(1, 32, 8, 1, 131072, 128, 128, dtype="bfloat16", device="sm_90")
    advice = advise(spec, DEVICES["H200"], "decode", layers=32)
    assert advice.backend == "triton"
    assert "memory-bound" in advice.reasons[0]
    assert "16 GiB" in advice.reasons[1]
    assert "split-KV" in advice.reasons[2]
    assert any("K/V heads" in sentence for sentence in advice.instead)


def test_advice_names_a_backend_that_exists_there() -> None:
    for name, portable, best in (
        ("T4", "tiled", "tiled"), ("A100 80GB", "triton", "triton"), ("H200", "triton", "hopper, else triton"),
    ):  # fmt: skip
        device = DEVICES[name]
        spec = self_attention(1024, 64, dtype="float16")
        for task in TASKS:
            assert advise(spec, device, task).backend == (portable if task == "decode" else best)
    with pytest.raises(ValueError, match="task: got 'sleep'; wants one of train, prefill, decode"):
        advise(self_attention(8), DEVICES["T4"], "sleep")  # type: ignore[arg-type]
