"""What linear attention costs: quadratic inside a chunk, and a state `[Dφ, Dv]` between chunks.

With chunks of C tokens a token costs `2·C·(Dφ + Dv)` FLOPs for the scores inside its chunk (half of it causal) and
`4·Dφ·Dv` for reading and updating the state; nothing grows with N. A decoding step is the state's part alone.

Sources: Katharopoulos et al., "Transformers are RNNs" (2020); Yang et al., "Gated linear attention" (2023), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewise import errors
from tilewise.cost.counts import Traffic, traffic_of
from tilewise.spec import AttentionSpec

CHUNK = 64


@dataclass(frozen=True, slots=True)
class LinearCounts:
    """One layer, all batches and heads."""

    intra_flops: int
    """Scores inside the chunks and their products with V."""
    state_flops: int
    """Queries times state, and the states' updates."""
    traffic: Traffic
    state_bytes: int
    """The state and the normaliser that decoding keeps, for every sequence and head."""

    @property
    def flops(self) -> int:
        return self.intra_flops + self.state_flops


def feature_dim(head_dim: int, feature_map: str = "elu") -> int:
    """Dφ of a feature map: D for elu, relu, identity; `1 + D + D²` for the second-order Taylor map."""
    if feature_map == "taylor":
        return 1 + head_dim + head_dim**2
    return head_dim


def linear_counts(spec: AttentionSpec, *, chunk: int = CHUNK, features: int | None = None) -> LinearCounts:
    """The chunked form for self-attention over `spec.q_len` tokens; `features` is Dφ, D unless given.

    Traffic: Q, K, V read and O written once, and each chunk's state written and read once in the accumulator dtype.

    Raises ValueError for `chunk < 1`.
    """
    if chunk < 1:
        raise errors.bad_value("chunk", chunk, "at least 1")
    dphi = spec.head_dim if features is None else features
    heads, n, dv = spec.batch * spec.heads, spec.q_len, spec.v_head_dim
    whole, rest = divmod(n, chunk)
    pairs = whole * _pairs(chunk, spec.causal) + _pairs(rest, spec.causal)
    states = heads * (whole + (rest > 0)) * dphi * (dv + 1)
    traffic = traffic_of(
        spec,
        heads * n * (2 * spec.head_dim + dv),
        heads * n * dv,
        wide_read=states,
        wide_written=states,
    )
    return LinearCounts(
        2 * heads * pairs * (dphi + dv),
        4 * heads * n * dphi * dv,
        traffic,
        heads * dphi * (dv + 1) * traffic.wide_itemsize,
    )


def _pairs(tokens: int, causal: bool) -> int:
    return tokens * (tokens + 1) // 2 if causal else tokens**2


def decode_flops(spec: AttentionSpec, features: int | None = None) -> int:
    """One token of every sequence: update the state and multiply with it, `4·Dφ·Dv` a head, whatever came before."""
    dphi = spec.head_dim if features is None else features
    return 4 * spec.batch * spec.heads * dphi * spec.v_head_dim


def crossover_length(head_dim: int, *, causal: bool = True, chunk: int = CHUNK, features: int | None = None) -> int:
    """The N from which the chunked form does fewer FLOPs than exact attention.

    A token of exact attention costs `4·N·D` (half of it causal) and of the chunked form `4·C·D + 4·Dφ·D` (the first
    half causal) for Dv = D: they meet at `N = C + Dφ`, or at `C + 2·Dφ` causal. Fewer FLOPs are less time only where
    both run at the same rate; exact attention's larger products run nearer to the peak.
    """
    dphi = head_dim if features is None else features
    share = (dphi + head_dim) / (2 * head_dim)
    return round(chunk * share + dphi * (2 if causal else 1))
