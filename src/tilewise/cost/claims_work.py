"""Quoted figures of work: FLOPs, traffic, intensity, the memory hierarchy, complexity. `claims.py` joins them."""

from __future__ import annotations

from tilewise.cost.counts import (
    backward_flops,
    forward_flops,
    ideal_traffic,
    self_attention,
    six_step_traffic,
    standard_traffic,
    visible_scores,
)
from tilewise.cost.hardware import DEVICES
from tilewise.cost.quoted import Claim, Row, size
from tilewise.cost.roofline import flash_step, standard_step, standard_steps
from tilewise.cost.tiles import flash_v1_counts, flash_v2_counts
from tilewise.spec import AttentionSpec

SIX_STEPS = ("scores", "row max", "exp", "row sum", "normalise", "times V")
"""The kernels of standard attention, each from global memory to global memory."""


def kernels_claim() -> Claim:
    n, d = 2048, 64
    spec = self_attention(n, d)
    six, one = six_step_traffic(spec), ideal_traffic(spec)
    note = f"in elements {six.elements / one.elements:.0f}× at N = {n}, D = {d}: the N×M matrix moves 8 times, not 6"
    return Claim(
        "six kernels against one", (Row("trips through global memory", "6× vs 1×", f"{len(SIX_STEPS)}× vs 1×", note),)
    )


def flops_claim() -> Claim:
    n, d, heads = 1000, 64, 6
    flops = forward_flops(self_attention(n, d, batch=2, heads=3))
    matmul = flops.matmul / (n * n * d * heads)
    softmax = flops.softmax / (n * n * heads)
    return Claim(
        "FLOPs of the forward",
        (Row("products", "4·N²·D·B·H", f"{matmul:g}·N²·D·B·H"), Row("softmax", "5·M·N", f"{softmax:g}·M·N")),
        "softmax a head: shift, max, exp, sum, divide",
    )


def traffic_claim() -> Claim:
    n, d = 1024, 64
    spec = self_attention(n, d)
    standard, ideal = standard_traffic(spec).elements, ideal_traffic(spec).elements
    tiled = flash_v2_counts(spec, 128, 64).traffic.elements
    quoted, whole = n * (3 * d + 2 * n), 4 * n * d + 4 * n * n
    return Claim(
        f"HBM traffic in elements, N = {n}, D = {d}",
        (
            Row(
                "standard, N·(3D + 2N)",
                f"{quoted:,}",
                f"{standard:,}",
                f"that leaves out O and half of the trips: S and P are each written and read, 4·N·D + 4·N² = {whole:,}",
            ),
            Row("flash, ideal, 4·N·D", f"{4 * n * d:,}", f"{ideal:,}"),
            Row(
                "flash, 128×64 tiles, no cache",
                f"{4 * n * d + (n // 128 - 1) * 2 * n * d + n:,}",
                f"{tiled:,}",
                "K and V again for each Q tile but the first, and the LSE",
            ),
            Row(
                "theoretical speed-up, 4.75·N/D",
                "76×",
                f"{standard / ideal:g}×",
                f"76 compares on-chip with off-chip bytes; by HBM traffic 1 + N/D = {1 + n / d:g} is the most",
            ),
        ),
    )


def hierarchy_claim() -> Claim:
    a100, small = DEVICES["A100 80GB"], DEVICES["A100 40GB"]
    # 32 banks of 4 bytes a clock and multiprocessor, at the boost clock of 1.41 GHz.
    on_chip = a100.sms * 32 * 4 * 1.41e9
    return Claim(
        "memory hierarchy of an A100",
        (
            Row("registers a multiprocessor", "256 KB", size(a100.registers_per_sm)),
            Row("shared memory a multiprocessor", "164 KB", size(a100.shared_per_sm), "192 KB with the L1"),
            Row(
                "shared memory, bandwidth",
                "19 TB/s",
                f"{on_chip / 1e12:.0f} TB/s",
                f"{on_chip / 1e12:.1f}: 128 B × SMs × 1.41 GHz",
            ),
            Row(
                "shared memory over HBM",
                "10–12×",
                f"{on_chip / a100.bandwidth:.0f}–{on_chip / small.bandwidth:.0f}×",
                f"{on_chip / a100.bandwidth:.1f} with 80 GB, {on_chip / small.bandwidth:.1f} with 40 GB",
            ),
        ),
        "latencies (1, about 20, about 400 cycles) are measured: tilewise lab run 04",
    )


def intensity_claim() -> Claim:
    n, d = 16384, 64
    spec = self_attention(n, d)
    qk, softmax, pv = standard_steps(spec)
    flops = forward_flops(spec).matmul
    a100, h100 = DEVICES["A100 80GB"], DEVICES["H100 SXM"]
    two_trips = flops / (n * (3 * d + 2 * n))
    bound = all(
        standard_step(self_attention(8192, x)).intensity < g.balance() < flash_step(self_attention(8192, x)).intensity
        for x in (64, 128)
        for g in (a100, h100)
    )
    return Claim(
        f"arithmetic intensity, N = {n}, D = {d}, fp16",
        (
            Row(
                "QKᵀ, FLOP/byte",
                "d",
                "d" if round(qk.intensity / d, 2) == 0.99 else f"{qk.intensity:.1f}",
                f"{qk.intensity:.1f}: d for N ≫ d",
            ),
            Row("softmax, FLOP/byte", "1.25", f"{softmax.intensity:g}"),
            Row(
                "PV, FLOP/byte",
                "d",
                "d" if round(pv.intensity / d, 2) == 0.99 else f"{pv.intensity:.1f}",
                f"{pv.intensity:.1f}: d for N ≫ d",
            ),
            Row(
                "whole standard",
                "2D",
                "D/2 FLOP/byte",
                f"2D = {two_trips:.0f} is FLOP an element with two of the four trips; all four are D an element, "
                f"{standard_step(spec).intensity:.1f} a byte",
            ),
            Row(
                "whole flash",
                "N",
                "N/2 FLOP/byte",
                f"N is FLOP an element; a byte {flash_step(spec).intensity:g}",
            ),
            Row("balance of an A100, 312 / 2.0", "156", f"{312 / 2.0:.0f}", f"{a100.balance():.0f} with 2.039 TB/s"),
            Row(
                "balance of an H100, 990 / 3.35", "296", f"{990 / 3.35:.0f}", f"{h100.balance():.0f} with 989.4 TFLOP/s"
            ),
            Row(
                "standard memory-bound, flash compute-bound",
                "yes",
                "yes" if bound else "no",
                "at N = 8192 on both; flash from N = 2 × balance on",
            ),
        ),
    )


def accesses_claim() -> Claim:
    def reads(n: int, d: int, sram: int) -> int:
        spec = self_attention(n, d)
        return flash_v2_counts(spec, sram // (4 * d), 64).traffic.read - n * d

    base = reads(4096, 64, 2**15)
    powers = (reads(8192, 64, 2**15) / base, reads(4096, 128, 2**15) / base, base / reads(4096, 64, 2**16))
    exponents = [f"{p:g}" for p in powers]
    n, d = 4096, 64
    standard = standard_traffic(self_attention(n, d)).elements
    return Claim(
        "HBM accesses",
        (
            Row("standard", "N·d + N²", "N·d + N²" if standard == 4 * (n * d + n * n) else f"{standard:,}", "times 4"),
            Row(
                "flash",
                "N²·d²/M",
                "N²·d²/M" if exponents == ["4", "4", "2"] else "; ".join(exponents),
                "re-reads grow 4× with N × 2, 4× with d × 2, and halve with M × 2; N²·d/M is a slip, as longer rows "
                "also make the tile shorter",
            ),
        ),
    )


def patterns_claim() -> Claim:
    w = 512
    counts = [visible_scores(AttentionSpec(1, 1, 1, n, n, 64, 64, window=(w, 0))) / n for n in (2**16, 2**17)]
    linear = all(abs(count - (w + 1)) / w < 0.01 for count in counts)
    return Claim(
        "complexity of sparse patterns",
        (
            Row(
                "window",
                "O(N·w)",
                "O(N·w)" if linear else "no",
                f"{counts[0]:.1f} and {counts[1]:.1f} keys a row at w = {w}",
            ),
            Row(
                "itself and the keys 1, 2, 4, … before",
                "O(N log N)",
                "O(N log N)" if _doubling_keys(2**12) == 12 * 2**12 + 1 else "other",
                "scores; as with a stride, the tiles that hold them are most of them",
            ),
            Row(
                "strided by √N",
                "O(N√N)",
                "O(N√N)" if _strided_keys(2**12) == 2**12 * 2**6 else "other",
                "scores; the tiles that hold them may be all of them: see `tilewise mask 'strided(64)'`",
            ),
        ),
    )


def _doubling_keys(n: int) -> int:
    """Visible pairs of n rows that see themselves and the keys 1, 2, 4, … before."""
    return sum(1 + i.bit_length() for i in range(n))


def _strided_keys(n: int) -> int:
    """Visible pairs of n rows whose keys are those at multiples of √n from the row."""
    step = round(n**0.5)
    return sum((n - 1 - i) // step + i // step + 1 for i in range(n))


def backward_claim() -> Claim:
    spec = self_attention(1024, 64)
    ratio = backward_flops(spec).matmul / forward_flops(spec).matmul
    return Claim(
        "backward",
        (
            Row(
                "dS",
                "P∘(1−P)",
                "P∘(dP − rowsum(dP∘P))",
                "P∘(1−P) is the diagonal of the softmax Jacobian diag(P) − PPᵀ; lesson 00 shows the difference",
            ),
            Row("FLOPs of the backward", "2.5×", f"{ratio:g}×", "five products for two"),
        ),
    )


def versions_claim() -> Claim:
    spec = self_attention(4096, 64)
    v1, v2 = flash_v1_counts(spec, 64, 64), flash_v2_counts(spec, 64, 64)
    written = v1.traffic.bytes_written / v2.traffic.bytes_written
    return Claim(
        "FlashAttention v1 against v2",
        (
            Row(
                "outer loop",
                "sequence vs heads",
                "K/V tiles vs Q tiles",
                "both run over all heads in parallel; v2 over Q tiles too",
            ),
            Row(
                "divisions by l, N = 4096, 64×64 tiles",
                "fewer",
                "fewer" if v2.divisions < v1.divisions else "not fewer",
                f"{v1.divisions} and {v2.divisions}",
            ),
            Row(
                "bytes written, v1 over v2",
                "more",
                "more" if written > 1 else "not more",
                f"{written:.0f}×: O, m, l at every step",
            ),
        ),
    )
