"""Tables of attention that people look up: mechanisms, caches, kernels, GPT-2 medium. Figures come from the model."""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.cost.counts import forward_flops, self_attention
from tilewise.cost.hardware import DEVICES, Device
from tilewise.cost.linear import linear_counts
from tilewise.cost.memory import attention_memory, cache_bytes, kv_cache_elements, latent_cache_elements
from tilewise.cost.model import GPT, least_step_seconds, training_memory
from tilewise.cost.quoted import size
from tilewise.spec import AttentionSpec

SENTENCE = 24
"""Characters from which a cell is one rather than a figure with its units."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as text: a title, column names and rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def text_columns(self) -> frozenset[int]:
        """The columns to align left: the first, and those with a cell of words ("–" is no word, a sentence is many)."""

        def words(cell: str) -> bool:
            return bool(cell.strip("–")) and (len(cell) > SENTENCE or not any(map(str.isdigit, cell)))

        return frozenset({0, *(i for i in range(len(self.columns)) if any(words(row[i]) for row in self.rows))})


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def mechanisms() -> Grid:
    """Standard, flash, linear and sparse: what each is and who uses it."""
    return Grid(
        "Four mechanisms",
        ("mechanism", "idea", "equal to softmax attention", "time", "memory", "strong where", "weak where", "used by"),
        (
            (
                "standard",
                "scores, softmax, values, each whole",
                "yes, it is the definition",
                "O(N²·D)",
                "O(N²)",
                "short sequences; any change to the scores",
                "long sequences: memory, and time for moving scores",
                "everyone until 2022",
            ),
            (
                "flash",
                "the same in tiles that stay on chip, with an online softmax",
                "yes, to rounding",
                "O(N²·D)",
                "O(N)",
                "training and prefill at any length",
                "needs a kernel; still quadratic in time",
                "most models since 2022",
            ),
            (
                "linear",
                "φ(Q)(φ(K)ᵀV): a state instead of scores",
                "no",
                "O(N·D²)",
                "O(N), a constant state while decoding",
                "very long sequences, decoding",
                "recall of single tokens",
                "RetNet, GLA, RWKV, DeltaNet",
            ),
            (
                "sparse",
                "only some pairs: windows, global tokens, blocks",
                "on the visible pairs",
                "O(N·w)",
                "O(N)",
                "long documents, local structure",
                "what is outside the pattern is not seen",
                "Longformer, BigBird, Mistral",
            ),
        ),
    )


def comparison(seq: int = 8192, head_dim: int = 64, heads: int = 12, window: int = 512) -> Grid:
    """Work and memory of the four at one size, causal, fp16."""
    spec = self_attention(seq, head_dim, heads=heads, causal=True)
    local = AttentionSpec(
        1, heads, heads, seq, seq, head_dim, head_dim, dtype="float16", causal=True, window=(window, 0)
    )
    dense = forward_flops(self_attention(seq, head_dim, heads=heads)).total
    flops = {
        "standard": dense,
        "flash": forward_flops(spec).total,
        "linear": float(linear_counts(spec).flops),
        "sparse": forward_flops(local).total,
    }
    memory = {
        "standard": attention_memory(spec, "standard"),
        "flash": attention_memory(spec, "flash_v2"),
        "linear": attention_memory(spec, "linear"),
        "sparse": attention_memory(local, "sparse"),
    }
    rows = tuple(
        (
            name,
            f"{flops[name] / 1e9:.1f}",
            f"{dense / flops[name]:.1f}×",
            size(round(memory[name].working / 2**10) * 2**10),
            size(round(memory[name].saved / 2**10) * 2**10),
        )
        for name in flops
    )
    title = f"At N = {seq}, D = {head_dim}, {heads} heads, causal, fp16; sparse: a window of {window}"
    return Grid(title, ("mechanism", "GFLOP", "less work", "working memory", "saved for backward"), rows)


def caches(heads: int = 32, groups: int = 8, head_dim: int = 128, rank: int = 512, rope: int = 64) -> Grid:
    """What MHA, GQA, MQA and MLA keep for a token, and for a long context."""
    elements = {
        "MHA": (str(heads), kv_cache_elements(heads, head_dim)),
        "GQA": (str(groups), kv_cache_elements(groups, head_dim)),
        "MQA": ("1", kv_cache_elements(1, head_dim)),
        "MLA": ("a latent", latent_cache_elements(rank, rope)),
    }
    whole = elements["MHA"][1]
    rows = tuple(
        (
            name,
            groups_kept,
            f"{count:,}",
            f"{whole / count:.1f}×",
            size(cache_bytes(count, tokens=8192, layers=32)),
            size(cache_bytes(count, tokens=131072, layers=32)),
        )
        for name, (groups_kept, count) in elements.items()
    )
    title = f"KV cache, H = {heads}, D = {head_dim}, MLA {rank} + {rope}, 32 layers, fp16"
    return Grid(title, ("kind", "K/V heads", "elements a token and layer", "smaller", "8,192 tokens", "131,072"), rows)


def kernels() -> Grid:
    """What a textbook kernel leaves out."""
    return Grid(
        "A minimal kernel and a full one",
        ("part", "minimal", "full"),
        (
            ("tiles in shared memory", "yes", "yes, sizes by device and head dim"),
            ("online softmax", "yes", "yes, in base 2"),
            ("matrix units", "often none", "yes, asynchronous on Hopper"),
            ("shared-memory layout", "plain: bank conflicts", "swizzled"),
            ("copies", "load, wait, compute", "pipelined, or by a warp of their own"),
            ("causal", "masks every tile", "skips hidden tiles, masks the diagonal ones"),
            ("backward", "none", "recomputation, deterministic"),
            ("GQA, windows, masks, biases, packing", "none", "yes"),
        ),
    )


def hierarchy(device: Device) -> Grid:
    """Registers, shared memory, L2 and memory of a device: size and bandwidth. Latency is measured (lesson 04)."""
    return Grid(
        f"Memory of {device.name}",
        ("level", "size", "bandwidth"),
        (
            ("registers", f"{size(device.registers_per_sm)} × {device.sms}", "every operand, every cycle"),
            ("shared memory", f"{size(device.shared_per_sm)} × {device.sms}", "128 B a cycle and multiprocessor"),
            ("L2", size(device.l2), ""),
            ("memory", f"{device.memory / 1e9:.0f} GB", f"{device.bandwidth / 1e12:.2f} TB/s"),
        ),
    )


def devices() -> Grid:
    """The device table."""
    rows = tuple(
        (
            device.name,
            device.arch,
            f"{device.peak('float16') / 1e12:.0f}",
            f"{device.bandwidth / 1e9:,.0f}",
            f"{device.balance():.0f}",
            f"{device.memory / 1e9:.0f}",
            str(device.sms),
            size(device.shared_per_sm),
        )
        for device in DEVICES.values()
    )
    columns = ("device", "arch", "fp16 TFLOP/s", "GB/s", "FLOP/byte", "GB", "SMs", "shared/SM")
    return Grid("Devices; `tilewise cost --device NAME` shows sources", columns, rows)


def model_times(
    name: str, model: GPT, batch: int, lengths: tuple[int, ...], device: Device, *, dtype: str = "bfloat16"
) -> Grid:
    """The least that a device allows for one training step, by how attention is computed, and what memory allows."""
    rows: list[tuple[str, ...]] = []
    for seq in lengths:
        peak = training_memory(model, batch, seq, attention="standard").peak
        standard, v1, v2 = (
            1e3 * least_step_seconds(model, batch, seq, device, version, dtype=dtype)
            for version in ("standard", "flash_v1", "flash_v2")
        )
        fits = f"{standard:,.0f} ms" if peak < device.memory else f"out of memory ({gib(peak)})"
        rows.append((f"{seq:,}", fits, f"{v1:,.0f} ms", f"{v2:,.0f} ms", f"{standard / v2:.1f}×"))
    columns = ("N", "standard", "flash v1", "flash v2", "standard over v2")
    return Grid(f"{name}, batch {batch}: least time of a training step on {device.name}", columns, tuple(rows))


def model_memory(
    name: str,
    model: GPT,
    batch: int,
    lengths: tuple[int, ...],
    *,
    checkpoint: bool = False,
    chunked_loss: int | None = None,
) -> Grid:
    """One training step of a model by length: what holds the memory, with standard attention and without."""
    rows: list[tuple[str, ...]] = []
    for seq in lengths:
        checkpointing = "block" if checkpoint else "none"
        flash = training_memory(model, batch, seq, checkpointing=checkpointing, chunked_loss=chunked_loss)
        standard = training_memory(
            model, batch, seq, attention="standard", checkpointing=checkpointing, chunked_loss=chunked_loss
        )
        rows.append(
            (
                f"{seq:,}",
                gib(flash.fixed + flash.half_weights),
                gib(flash.activations),
                gib(standard.activations - flash.activations + standard.recomputed - flash.recomputed),
                gib(flash.recomputed),
                gib(flash.logits),
                gib(flash.peak),
                gib(standard.peak),
            )
        )
    columns = (
        "N",
        "weights, gradients, Adam",
        "activations",
        "+ scores if standard",
        "recomputed layer",
        "logits",
        "peak, flash",
        "peak, standard",
    )
    return Grid(f"{name}, batch {batch}: one training step under bf16 autocast", columns, tuple(rows))
