"""Which mechanism for which workload, with the reason, the crossover lengths, and when not to bother.

Rules of arithmetic, not of taste: each sentence follows from a number of the model, and says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tilewise import errors
from tilewise.cost.counts import forward_flops, visible_scores
from tilewise.cost.hardware import Device
from tilewise.cost.linear import crossover_length, linear_counts
from tilewise.cost.memory import attention_memory, cache_bytes, kv_cache_elements
from tilewise.cost.model import GPT, step_flops
from tilewise.cost.roofline import flash_step, place
from tilewise.spec import AttentionSpec

Task = Literal["train", "prefill", "decode"]
TASKS: tuple[Task, ...] = ("train", "prefill", "decode")
WORTH_IT = 0.1
"""A mechanism that cannot shorten the whole step by this much is not worth a change of the model."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to use and why; `instead` are the alternatives with the condition under which each wins."""

    mechanism: str
    backend: str
    reasons: tuple[str, ...]
    instead: tuple[str, ...]
    bother: bool
    """False where attention is so small a part of the step that no mechanism matters."""


def advise(spec: AttentionSpec, device: Device, task: Task = "prefill", *, layers: int = 24) -> Advice:
    """Advice for `spec`: one layer's attention in a model of `layers` layers of width H·D.

    Raises ValueError for an unknown task.
    """
    if task not in TASKS:
        raise errors.bad_value("task", repr(task), f"one of {', '.join(TASKS)}")
    if task == "decode":
        return _decode(spec, device, layers)
    share = attention_share(spec, layers)
    scores = attention_memory(spec, "standard")
    held = (scores.saved if task == "train" else scores.working) * (layers if task == "train" else 1)
    kept = "kept for the backward by all layers" if task == "train" else "held while one layer runs"
    step = place(flash_step(spec), device, spec.dtype)
    reasons = [
        f"exact and O(N): standard attention would have {_size(held)} of scores {kept}, flash has "
        f"{_size(attention_memory(spec, 'flash_v2').saved)} a layer",
        f"{step.step.intensity:,.0f} FLOP a byte against a balance of {step.balance:.0f}: {step.bound}-bound on "
        f"{device.name}, at least {1e3 * step.seconds:.3g} ms",
    ]
    if spec.windowed:
        part = visible_scores(spec) / (spec.q_len * spec.k_len)
        reasons.append(f"the window leaves {100 * part:.1f} % of the scores, and only their tiles are visited")
    bother = share >= WORTH_IT
    if not bother:
        reasons.append(
            f"attention's products are {100 * share:.0f} % of the model's: no other mechanism can shorten a step by "
            f"more than that; look at the feed-forward part, the logits and the batch first"
        )
    return Advice("flash", _backend(spec, device), tuple(reasons), tuple(_alternatives(spec, share)), bother)


def attention_share(spec: AttentionSpec, layers: int) -> float:
    """The part of a model's training FLOPs that are scores and their products with V.

    `14·N·d` of `14·N·d + 72·d²` a token and layer of width d, so about N / (N + 5·d); half the first if causal.
    """
    model = GPT(layers, spec.heads * spec.head_dim, spec.heads, vocab=0, context=0)
    whole = step_flops(model, spec.batch, spec.q_len, causal=spec.causal)
    dense = 6 * spec.batch * spec.q_len * model.parameters
    return 1 - dense / whole if whole else 0.0


def _alternatives(spec: AttentionSpec, share: float) -> list[str]:
    crossover = crossover_length(spec.head_dim, causal=spec.causal)
    dense = forward_flops(spec).total
    less = dense / linear_counts(spec).flops if spec.q_len else 1.0
    found = [
        f"linear attention does fewer FLOPs from N ≈ {crossover:,} (chunks of 64, D = {spec.head_dim}); here "
        f"{less:.1f}× fewer. It is another function: it has to be trained so, and recalls single tokens less well"
    ]
    if not spec.windowed and spec.q_len > 1024:
        window = max(256, spec.q_len // 16)
        gain = visible_scores(spec) / (spec.q_len * window)
        found.append(
            f"a window of {window:,} does {gain:.0f}× fewer: worth it where what is further back does not matter, and "
            f"only if attention's {100 * share:.0f} % of the step does"
        )
    if spec.q_len <= 512:
        found.append("standard attention is as good at this length: its scores fit a cache, and nothing needs tiles")
    return found


def _decode(spec: AttentionSpec, device: Device, layers: int) -> Advice:
    step = place(flash_step(spec), device, spec.dtype)
    cache = cache_bytes(
        kv_cache_elements(spec.kv_heads, spec.head_dim, spec.v_head_dim),
        tokens=spec.k_len,
        layers=layers,
        batch=spec.batch,
        dtype=spec.dtype,
    )
    reasons = [
        f"{step.step.intensity:.1f} FLOP a byte against a balance of {step.balance:.0f}: {step.bound}-bound; reading "
        f"the cache is all the time there is, {1e6 * step.seconds:.3g} µs a layer at best",
        f"the cache is {_size(cache)} for {layers} layers: {100 * cache / device.memory:.0f} % of {device.name}",
    ]
    programs = spec.batch * spec.kv_heads
    if device.sms and programs < device.sms:
        reasons.append(
            f"{programs} sequences × K/V heads for {device.sms} multiprocessors or cores: split the keys (split-KV), "
            "or most of them wait"
        )
    alternatives: list[str] = []
    if spec.group < 8 and spec.kv_heads > 1:
        alternatives.append(
            f"fewer K/V heads: each halving of {spec.kv_heads} halves cache and time, until {step.balance:.0f} query "
            "heads share one"
        )
    alternatives += [
        "an int8 cache halves what is read, where the error is allowed",
        f"linear attention keeps a state of {spec.head_dim}×{spec.v_head_dim} a head whatever the length",
    ]
    return Advice("flash", _portable(device), tuple(reasons), tuple(alternatives), bother=True)


def _backend(spec: AttentionSpec, device: Device) -> str:
    """What `auto` would prefer on such a device; what really runs is for `tilewise explain` to say."""
    hopper = device.arch == "sm_90" and spec.dtype in ("float16", "bfloat16")
    return "hopper, else triton" if hopper else _portable(device)


def _portable(device: Device) -> str:
    """Of the two that decode, too, what runs there."""
    return "tiled" if device.arch in ("cpu", "sm_70", "sm_75") else "triton"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.3g} {unit}"
        count /= 1024
    raise AssertionError(count)
