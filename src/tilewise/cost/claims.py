"""What the literature and the teaching material quote, computed beside the quotation; `tilewise cost --tables`.

A row is equal to what is quoted, or it carries the derivation of why it is not. 1 KB = 1024 bytes, as the quotations
have it. What can only be measured stands in `MEASURED`, with the command that measures it here.
"""

from __future__ import annotations

from tilewise.cost.claims_work import (
    accesses_claim,
    backward_claim,
    flops_claim,
    hierarchy_claim,
    intensity_claim,
    kernels_claim,
    patterns_claim,
    traffic_claim,
    versions_claim,
)
from tilewise.cost.counts import forward_flops, self_attention
from tilewise.cost.memory import (
    attention_memory,
    cache_bytes,
    kv_cache_elements,
    latent_cache_elements,
    qkvo_bytes,
    row_statistic_bytes,
    score_matrix_bytes,
)
from tilewise.cost.on_chip import TileShape
from tilewise.cost.quoted import Claim, Measured, Row, size
from tilewise.cost.tiles import flash_v2_counts
from tilewise.spec import AttentionSpec


def computed_claims() -> list[Claim]:
    """Every computed claim, in the order in which they are usually told."""
    return [
        _scores(),
        _scaling(),
        _share(),
        _heads(),
        _against_flash(),
        kernels_claim(),
        _on_chip(),
        flops_claim(),
        traffic_claim(),
        hierarchy_claim(),
        intensity_claim(),
        accesses_claim(),
        _training(),
        patterns_claim(),
        backward_claim(),
        versions_claim(),
        _caches(),
    ]


def _scores() -> Claim:
    quoted = {256: "256 KB", 512: "1 MB", 1024: "4 MB", 2048: "16 MB", 8192: "256 MB", 16384: "1 GB"}
    rows = [Row(f"N = {n}", q, size(score_matrix_bytes(self_attention(n, dtype="float32")))) for n, q in quoted.items()]
    rows[0] = rows[0]._replace(note="quoted as 0.25 MB")
    layer = score_matrix_bytes(self_attention(8192, heads=32, dtype="float32"))
    return Claim("score matrix in fp32, B = H = 1", (*rows, Row("N = 8192, 32 heads, one layer", "8 GB", size(layer))))


def _scaling() -> Claim:
    base = self_attention(256, 64)

    def time(spec: AttentionSpec) -> str:
        ratio = forward_flops(spec).total / forward_flops(base).total
        return "t" if ratio == 1 else f"{ratio:g}t"

    rows = [
        Row(f"N = {n}", q, time(self_attention(n, 64))) for n, q in zip((256, 512, 1024, 2048), _TIMES, strict=True)
    ]
    rows += [
        Row("batch × 2", "2t", time(self_attention(256, 64, batch=2))),
        Row("heads × 2", "2t", time(self_attention(256, 64, heads=2))),
        Row(
            "head_dim × 2: score buffer",
            "1×",
            f"{score_matrix_bytes(self_attention(256, 128)) / score_matrix_bytes(base):g}×",
            "the FLOPs of the products double; only the buffer stays",
        ),
        Row("N × 2: Q, K, V, O", "2×", f"{qkvo_bytes(self_attention(512, 64)) / qkvo_bytes(base):g}×"),
        Row("N × 2: scores", "4×", f"{score_matrix_bytes(self_attention(512, 64)) / score_matrix_bytes(base):g}×"),
        Row(
            "accesses a query; a head",
            "N·d; N²·d",
            "N·d; N²·d" if _unshared_reads(512, 64) == 2 * 512**2 * 64 else "other",
            "times 2, K and V, where each query reads them for itself",
        ),
    ]
    return Claim("expected time of standard attention", tuple(rows))


_TIMES = ("t", "4t", "16t", "64t")


def _unshared_reads(n: int, d: int) -> int:
    """Elements of K and V that a head reads when every query is a tile of its own."""
    return flash_v2_counts(self_attention(n, d), 1, 64).traffic.read - n * d


def _share() -> Claim:
    quoted = {
        512: "256 KB vs 1 MB (80 %)",
        1024: "512 KB vs 4 MB (89 %)",
        2048: "1 MB vs 16 MB (94 %)",
        4096: "2 MB vs 64 MB (97 %)",
        8192: "4 MB vs 256 MB (98 %)",
        16384: "8 MB vs 1 GB (99 %)",
    }
    rows: list[Row] = []
    for n, said in quoted.items():
        memory = attention_memory(self_attention(n, 64), "standard")
        share = round(100 * memory.share_beyond_qkvo)
        rows.append(Row(f"N = {n}", said, f"{size(memory.qkvo)} vs {size(memory.working)} ({share} %)"))
    return Claim("Q, K, V, O against S and P, d = 64, fp16", tuple(rows))


def _heads() -> Claim:
    quoted = {
        (1, 2048): "192 MB",
        (1, 4096): "768 MB",
        (1, 8192): "3 GB",
        (8, 2048): "1.5 GB",
        (8, 4096): "6 GB",
    }
    rows = [
        Row(
            f"B = {b}, N = {n}", q, size(attention_memory(self_attention(n, 64, batch=b, heads=12), "standard").working)
        )
        for (b, n), q in quoted.items()
    ]
    return Claim("S and P of 12 heads, fp16", tuple(rows))


def _against_flash() -> Claim:
    rows: list[Row] = []
    for n, ratio in {512: 4, 1024: 8, 2048: 16, 4096: 32, 8192: 64}.items():
        spec = self_attention(n, 64)
        scores, half = score_matrix_bytes(spec), qkvo_bytes(spec) // 2
        quoted = {512: "512 KB vs 128 KB (4×)", 8192: "128 MB vs 2 MB (64×)"}.get(n, f"{ratio}×")
        found = f"{size(scores)} vs {size(half)} ({scores / half:g}×)" if n in (512, 8192) else f"{scores / half:g}×"
        real = attention_memory(spec, "standard").working / attention_memory(spec, "flash_v2").working
        rows.append(Row(f"N = {n}", quoted, found, f"beyond Q, K, V, O: S and P against the LSE, {real:g}×"))
    note = (
        "The ratio compares one fp16 score matrix with two of the four N×d tensors: N / 2D. Beyond Q, K, V, O, which "
        "both methods have, standard attention holds S and P and flash one fp32 number a row."
    )
    return Claim("standard against flash memory", tuple(rows), note)


def _on_chip() -> Claim:
    tile, shape = TileShape(64, 64, 64, 64, "float32"), TileShape(64, 64, 64, 64, "float16")
    matrix = score_matrix_bytes(self_attention(512, dtype="float32"))
    extra = f"v2 also keeps the output accumulator, {size(shape.acc)}, and m and l: {size(shape.total)} in all"
    return Claim(
        "on-chip tiles",
        (
            Row(
                "a 64×64 fp32 tile against the matrix at N = 512", "16 KB vs 1 MB", f"{size(tile.s)} vs {size(matrix)}"
            ),
            Row("Q, K, V tiles, 64×64×64, fp16", "8 KB each", f"{size(shape.q)} each"),
            Row("S and P tiles, fp32", "16 KB each", f"{size(shape.s)} each"),
            Row("all five", "56 KB", size(shape.tiles), extra),
        ),
    )


def _training() -> Claim:
    spec = self_attention(4096, 64, heads=12)
    standard, flash = attention_memory(spec, "standard"), attention_memory(spec, "flash_v2")
    numbers = flash.saved / row_statistic_bytes(self_attention(1, 64, heads=12))
    return Claim(
        "training memory, N = 4096, 12 heads",
        (
            Row(
                "storing S and P doubles it",
                "2×",
                f"{standard.saved / score_matrix_bytes(spec):g}×",
                "true of kernels that keep both; the softmax gradient needs P alone, and autograd keeps P alone",
            ),
            Row("recomputation stores, numbers a head", "N", "N" if numbers == 4096 else f"{numbers:g}"),
        ),
    )


def _caches() -> Claim:
    heads, groups, d = 32, 8, 128
    kinds = {
        "MHA": (f"{2 * heads * d}", kv_cache_elements(heads, d)),
        "GQA, 8 groups": (f"{2 * groups * d}", kv_cache_elements(groups, d)),
        "MQA": (f"{2 * d}", kv_cache_elements(1, d)),
        "MLA": ("576", latent_cache_elements(512, 64)),
    }
    rows = [
        Row(
            f"{name}, elements a token",
            q,
            f"{n}",
            f"{size(cache_bytes(n, tokens=8192, layers=32))} for 8192 tokens, 32 layers, fp16",
        )
        for name, (q, n) in kinds.items()
    ]
    return Claim("KV cache, H = 32, D = 128; MLA 512 + 64", tuple(rows))


MEASURED: tuple[Measured, ...] = (
    Measured("flash against a naive baseline by N", "128: 2× · 512: 5× · 2048: 15× · 4096: 40×", "tilewise lab run 04"),
    Measured(
        "flash against standard PyTorch",
        "512: 2.0× · 1024: 2.9× · 2048: 4.7× · 4096: 7.0×",
        "tilewise compare --lengths 512,1024,2048,4096",
    ),
    Measured(
        "GPT-2 medium step time, standard / v1 / v2",
        "512: 18/10/8 ms … 4096: OOM/180/120 ms",
        "tilewise cost --model gpt2-medium --batch 4 --device 'A100 80GB' (the least there is); tilewise bench",
    ),
    Measured(
        "GPT-2 medium memory, standard / flash",
        "512: 2.1/1.8 GB … 8192: OOM/18 GB",
        "tilewise cost --model gpt2-medium --batch 4 --lengths 512,1024,2048,4096,8192",
    ),
    Measured(
        "training 2–4×, inference 1.5–2× faster, 30–50 % less memory",
        "",
        "tilewise compare; tilewise predict --backward",
    ),
    Measured(
        "8K+ training in under 16 GB with flash",
        "",
        "tilewise cost --model gpt2-medium --batch 1 --lengths 8192 --checkpoint --chunked-loss 2048",
    ),
    Measured("a minimal kernel reaches 50–70 % of a full one", "", "tilewise lab run 04"),
    Measured("v1 2–3× over standard, v2 2–4× over v1", "5–8× in all", "tilewise lab run 04"),
    Measured("attention matrices are mostly sparse", "", "tilewise lab run 07"),
    Measured("sparse can be slower than dense", "", "tilewise lab run 07; python -m tilewise.bench.sparsity"),
    Measured("linear attention loses accuracy and can be unstable", "", "tilewise lab run 06"),
    Measured("block size 64×64 or 128×128", "typical", "tilewise lab run 04"),
    Measured("accuracy", "under 1e-3 in fp16, 1e-5 in fp32", "tilewise compare"),
    Measured("FlashAttention up to 7.6× over standard", "", "tilewise compare"),
    Measured("linear attention decodes in O(1) a token, loses recall", "", "tilewise lab run 06"),
    Measured("masking dense scores saves nothing; gathering does; fused is best", "", "tilewise lab run 07"),
)
