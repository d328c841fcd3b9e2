"""The figures that the field quotes, computed. Where one is imprecise, the test says what it really counts."""

from __future__ import annotations

import pytest

from tilewise.cost import (
    DEVICES,
    TileShape,
    attention_memory,
    flash_v1_counts,
    flash_v2_counts,
    forward_flops,
    ideal_traffic,
    self_attention,
    six_step_traffic,
    standard_traffic,
    visible_scores,
)
from tilewise.cost.memory import (
    kv_cache_elements,
    latent_cache_elements,
    qkvo_bytes,
    row_statistic_bytes,
    score_matrix_bytes,
)
from tilewise.cost.roofline import flash_step, standard_step, standard_steps
from tilewise.spec import AttentionSpec

KB, MB, GB = 2**10, 2**20, 2**30


def test_score_matrix_in_fp32() -> None:
    quoted = {256: MB // 4, 512: MB, 1024: 4 * MB, 2048: 16 * MB, 8192: 256 * MB, 16384: GB}
    assert {n: score_matrix_bytes(self_attention(n, dtype="float32")) for n in quoted} == quoted
    assert score_matrix_bytes(self_attention(8192, heads=32, dtype="float32")) == 8 * GB


def test_expected_time_of_standard_attention() -> None:
    """t, 4t, 16t, 64t with N; twice with batch or heads; head_dim changes the FLOPs but not the score buffer."""
    base = self_attention(256, 64)
    times = [forward_flops(self_attention(n, 64)).total / forward_flops(base).total for n in (256, 512, 1024, 2048)]
    assert times == [1, 4, 16, 64]
    for twice in (self_attention(256, 64, batch=2), self_attention(256, 64, heads=2)):
        assert forward_flops(twice).total == 2 * forward_flops(base).total
        assert score_matrix_bytes(twice) == 2 * score_matrix_bytes(base)
    assert score_matrix_bytes(self_attention(256, 128)) == score_matrix_bytes(base)
    assert forward_flops(self_attention(256, 128)).matmul == 2 * forward_flops(base).matmul


def test_share_of_the_scores() -> None:
    quoted = {
        512: (256 * KB, MB, 80),
        1024: (512 * KB, 4 * MB, 89),
        2048: (MB, 16 * MB, 94),
        4096: (2 * MB, 64 * MB, 97),
        8192: (4 * MB, 256 * MB, 98),
        16384: (8 * MB, GB, 99),
    }
    for n, (qkvo, s_and_p, percent) in quoted.items():
        memory = attention_memory(self_attention(n, 64), "standard")
        assert (memory.qkvo, memory.working) == (qkvo, s_and_p)
        assert round(100 * memory.share_beyond_qkvo) == percent


def test_multi_head_scores() -> None:
    quoted = {
        (1, 2048): 192 * MB,
        (1, 4096): 768 * MB,
        (1, 8192): 3 * GB,
        (8, 2048): 3 * GB // 2,
        (8, 4096): 6 * GB,
    }
    for (batch, n), size in quoted.items():
        assert attention_memory(self_attention(n, 64, batch=batch, heads=12), "standard").working == size


def test_standard_against_flash_memory_4x_to_64x() -> None:
    """The quoted ratio is of one fp16 score matrix to *two* of the four N×D tensors: N / 2D. It is not the memory of
    the two methods: beyond Q, K, V, O standard attention holds two such matrices, and flash one float32 number a row,
    which is a ratio of N, from 512 at N = 512."""
    for n, ratio in {512: 4, 1024: 8, 2048: 16, 4096: 32, 8192: 64}.items():
        spec = self_attention(n, 64)
        assert score_matrix_bytes(spec) / (qkvo_bytes(spec) / 2) == ratio == n / (2 * 64)
        standard, flash = attention_memory(spec, "standard"), attention_memory(spec, "flash_v2")
        assert standard.working / flash.working == n
    spec = self_attention(8192, 64)
    assert (score_matrix_bytes(spec), qkvo_bytes(spec) // 2) == (128 * MB, 2 * MB)
    assert (score_matrix_bytes(self_attention(512)), qkvo_bytes(self_attention(512)) // 2) == (512 * KB, 128 * KB)


def test_six_kernels_against_one() -> None:
    """Six trips through HBM against one, in launches; in elements the six move eight N×M matrices, a fused one none."""
    spec = self_attention(2048, 64)
    n = 2048
    beyond = six_step_traffic(spec).elements - ideal_traffic(spec).elements
    assert beyond == 8 * n**2 + 4 * n
    assert six_step_traffic(spec).elements / ideal_traffic(spec).elements == pytest.approx(1 + 2 * n / 64, rel=1e-3)


def test_a_tile_against_the_matrix() -> None:
    assert TileShape(64, 64, 64, 64, "float32").s == 16 * KB
    assert score_matrix_bytes(self_attention(512, dtype="float32")) == MB


def test_on_chip_budget_is_56_kb() -> None:
    """Without the output accumulator (16 KB), which v2 keeps on chip as well, and m and l (512 bytes)."""
    shape = TileShape(64, 64, 64, 64, "float16")
    assert (shape.q, shape.k, shape.v, shape.s) == (8 * KB, 8 * KB, 8 * KB, 16 * KB)
    assert shape.tiles == 56 * KB
    assert shape.total == 72 * KB + 512


def test_flops() -> None:
    flops = forward_flops(self_attention(1000, 64, batch=2, heads=3))
    assert flops.matmul == 4 * 1000**2 * 64 * 2 * 3
    assert flops.softmax == 5 * 1000 * 1000 * 2 * 3


def test_traffic_of_standard_attention() -> None:
    """N·(3D + 2N) leaves out O, and counts two of the four trips of S and P; all of it is 4·N·D + 4·N²."""
    n, d = 1024, 64
    spec = self_attention(n, d)
    assert standard_traffic(spec).elements == 4 * n * d + 4 * n**2
    assert standard_traffic(spec).elements - n * (3 * d + 2 * n) == n * d + 2 * n**2
    assert ideal_traffic(spec).elements == 4 * n * d
    # K and V come again for each Q tile but the first, and lse is written.
    tiled = flash_v2_counts(spec, 128, 64).traffic.elements
    assert tiled == 4 * n * d + (n // 128 - 1) * 2 * n * d + n


def test_the_theoretical_speed_up_of_76_is_none() -> None:
    """4.75·N/D = 76 compares on-chip with off-chip bytes. By HBM traffic alone, 1 + N/D = 17 is the most there is."""
    n, d = 1024, 64
    assert 4.75 * n / d == 76
    assert standard_traffic(self_attention(n, d)).elements / ideal_traffic(self_attention(n, d)).elements == 1 + n / d


def test_memory_hierarchy_of_an_a100() -> None:
    a100 = DEVICES["A100 80GB"]
    assert a100.registers_per_sm == 256 * KB
    assert a100.shared_per_sm == 164 * KB
    # 32 banks of 4 bytes a clock and multiprocessor, at the boost clock of 1.41 GHz: 19.5 TB/s.
    on_chip = a100.sms * 32 * 4 * 1.41e9
    assert on_chip == pytest.approx(19e12, rel=0.03)
    # "10 to 12 times" the HBM: 9.6 with 80 GB, 12.5 with 40 GB.
    assert on_chip / a100.bandwidth == pytest.approx(9.6, abs=0.05)
    assert on_chip / DEVICES["A100 40GB"].bandwidth == pytest.approx(12.5, abs=0.05)


def test_intensity_per_step_is_in_flop_per_byte_and_whole_is_in_flop_per_element() -> None:
    """QKᵀ ≈ D, softmax 1.25 and PV ≈ D are FLOP a *byte* in 16 bits. The quoted 2D of the whole and N of flash are
    FLOP an *element*, and 2D with only two of the four trips of S and P; in bytes they are D/2 and N/2."""
    n, d = 16384, 64
    spec = self_attention(n, d)
    qk, softmax, pv = standard_steps(spec)
    assert qk.intensity == pv.intensity == pytest.approx(d, rel=0.01)
    assert softmax.intensity == 1.25
    flops = forward_flops(spec).matmul
    assert flops / (n * (3 * d + 2 * n)) == pytest.approx(2 * d, rel=0.01)
    assert flops / standard_traffic(spec).elements == pytest.approx(d, rel=0.01)
    assert standard_step(spec).intensity == pytest.approx(d / 2, rel=0.01)
    assert flops / ideal_traffic(spec).elements == n
    assert flash_step(spec).intensity == n / 2


def test_machine_balance() -> None:
    """156 is 312 / 2.0, and 153 with the datasheet's 2.039 TB/s; 296 is 990 / 3.35, and 295 with 989.4 TFLOP/s."""
    assert 312 / 2.0 == 156
    assert round(990 / 3.35) == 296
    assert round(DEVICES["A100 80GB"].balance()) == 153
    assert round(DEVICES["H100 SXM"].balance()) == 295
    for head_dim in (64, 128):
        for device in (DEVICES["A100 80GB"], DEVICES["H100 SXM"]):
            long = self_attention(8192, head_dim)
            assert standard_step(long).intensity < device.balance() < flash_step(long).intensity


def test_hbm_accesses_of_flash_are_n2_d2_over_m() -> None:
    """K and V come once a Q tile, and a chip with M_sram elements has room for `block_m ~ M_sram / D` rows: N²·D²/M.
    The form N²·D/M forgets that longer rows make the tile shorter."""

    def reads(n: int, d: int, sram: int) -> int:
        spec = self_attention(n, d)
        return flash_v2_counts(spec, sram // (4 * d), 64).traffic.read - n * d

    base = reads(4096, 64, 2**15)
    assert reads(8192, 64, 2**15) == 4 * base
    assert reads(4096, 64, 2**16) * 2 == base
    assert reads(4096, 128, 2**15) == 4 * base
    # v1 moves O instead, a tile of K and V at a time: the same order.
    v1 = {d: flash_v1_counts(self_attention(4096, d), 64, 2**15 // (4 * d)).traffic.elements for d in (64, 128)}
    assert v1[128] / v1[64] == pytest.approx(4, rel=0.1)


def test_training_memory() -> None:
    """ "Storing S and P doubles what the forward holds" is true of kernels that keep both; autograd keeps P, so a layer
    holds half of its forward's peak until the backward. Recomputation keeps N numbers instead."""
    spec = self_attention(4096, 64, heads=12)
    standard, flash = attention_memory(spec, "standard"), attention_memory(spec, "flash_v2")
    assert standard.working == 2 * standard.saved == 2 * score_matrix_bytes(spec)
    assert flash.saved == row_statistic_bytes(spec) == 12 * 4096 * 4
    # v1 keeps m and l, two numbers a row.
    assert attention_memory(spec, "flash_v1").saved == 2 * flash.saved


def test_sparse_window_is_linear() -> None:
    window = 512
    counts = {n: visible_scores(AttentionSpec(1, 1, 1, n, n, 64, 64, window=(window, 0))) for n in (2**14, 2**15)}
    for n, count in counts.items():
        assert count == pytest.approx(n * (window + 1), rel=0.02)


def test_v1_and_v2() -> None:
    """Same products and rescalings; v1 divides at every step and rewrites O, m, l in HBM, v2 divides once a Q tile."""
    spec = self_attention(4096, 64)
    v1, v2 = flash_v1_counts(spec, 64, 64), flash_v2_counts(spec, 64, 64)
    assert v1.matmul_flops == v2.matmul_flops
    assert v1.rescalings == v2.rescalings == 64 * 64
    assert (v1.divisions, v2.divisions) == (64 * 64, 64)
    assert v1.traffic.bytes_written > 60 * v2.traffic.bytes_written


def test_kv_cache() -> None:
    """A token and layer: MHA 2·H·D, GQA 2·Hkv·D, MQA 2·D, MLA r_kv + d_rope."""
    heads, groups, d = 32, 8, 128
    assert kv_cache_elements(heads, d) == 2 * heads * d
    assert kv_cache_elements(groups, d) == 2 * groups * d
    assert kv_cache_elements(1, d) == 2 * d
    assert latent_cache_elements(512, 64) == 576
