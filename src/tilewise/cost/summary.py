"""All that the model says of one problem, from plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.cost.counts import (
    Flops,
    Traffic,
    backward_flops,
    forward_flops,
    ideal_traffic,
    six_step_traffic,
    standard_traffic,
)
from tilewise.cost.memory import METHODS, AttentionMemory, Method, attention_memory
from tilewise.cost.tiles import TiledCounts, flash_backward_counts, flash_v1_counts, flash_v2_counts
from tilewise.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class Estimate:
    """FLOPs, HBM traffic and memory of one attention layer."""

    spec: AttentionSpec
    forward: Flops
    backward: Flops
    ideal: Traffic
    standard: Traffic
    six_step: Traffic
    flash_v1: TiledCounts
    flash_v2: TiledCounts
    flash_backward: TiledCounts
    memory: dict[Method, AttentionMemory]


def estimate(
    *,
    batch: int = 1,
    heads: int = 1,
    seq: int,
    head_dim: int,
    kv_heads: int | None = None,
    k_seq: int | None = None,
    v_head_dim: int | None = None,
    dtype: str = "bfloat16",
    causal: bool = False,
    block_m: int = 128,
    block_n: int = 128,
) -> Estimate:
    """Costs of attention over `k_seq` keys (`seq` unless given), with tiles of `block_m` queries by `block_n` keys.

    Example:
        >>> estimate(batch=1, heads=32, seq=8192, head_dim=128).forward.matmul / 1e12
        1.099511627776
    """
    spec = AttentionSpec(
        batch=batch,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        q_len=seq,
        k_len=seq if k_seq is None else k_seq,
        head_dim=head_dim,
        v_head_dim=head_dim if v_head_dim is None else v_head_dim,
        dtype=dtype,
        scale=head_dim**-0.5,
        causal=causal,
    )
    return Estimate(
        spec,
        forward_flops(spec),
        backward_flops(spec),
        ideal_traffic(spec),
        standard_traffic(spec),
        six_step_traffic(spec),
        flash_v1_counts(spec, block_m, block_n),
        flash_v2_counts(spec, block_m, block_n),
        flash_backward_counts(spec, block_m, block_n),
        {method: attention_memory(spec, method) for method in METHODS},
    )
