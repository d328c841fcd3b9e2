"""What `bench` measures, as data: named suites of cases. No torch: `tilewise bench --list` needs none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from tilewise.cost.counts import backward_flops, conventional_scores, forward_flops, ideal_traffic, visible_scores
from tilewise.errors import bad_value
from tilewise.spec import AttentionSpec

BLOCK = 128
"""Rows and columns of a block of a sparse case."""

PASSES = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Case:
    """One self-attention problem, N = M, D = Dv.

    At most one of `window`, `sparsity`, `dense_mask` and `packed` is set. `packed` holds the lengths of sequences that
    lie one after another, with `batch` = 1 and `length` = their sum.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str
    causal: bool = False
    window: int | None = None
    """Keys before the row itself that it sees; implies causal."""
    sparsity: float | None = None
    """The share of 128×128 blocks, drawn at random for each row of blocks, that nobody sees."""
    dense_mask: bool = False
    """A boolean [N, N] tensor in which half of the entries, at random, are True."""
    packed: tuple[int, ...] = ()

    @property
    def pattern(self) -> str:
        """What a row sees: "full", "causal", "window 1024", "90 % sparse", "mask", "64 sequences"."""
        if self.packed:
            return f"{len(self.packed)} sequences{', causal' if self.causal else ''}"
        if self.sparsity is not None:
            return f"{self.sparsity:.0%} sparse".replace("%", " %")
        if self.dense_mask:
            return "dense mask"
        if self.window is not None:
            return f"window {self.window}"
        return "causal" if self.causal else "full"

    @property
    def name(self) -> str:
        """Tells a case from every other one, across suites and runs."""
        heads = f"H={self.heads}" if self.heads == self.kv_heads else f"H={self.heads}/{self.kv_heads}"
        return f"{self.pattern} D={self.head_dim} N={self.length} B={self.batch} {heads} {self.dtype}"

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """The dense problems that it consists of: one, or one a packed sequence."""
        return tuple(
            AttentionSpec(
                batch=self.batch,
                heads=self.heads,
                kv_heads=self.kv_heads,
                q_len=length,
                k_len=length,
                head_dim=self.head_dim,
                v_head_dim=self.head_dim,
                dtype=self.dtype,
                causal=self.causal,
                window=(self.window, 0 if self.window is not None else None),
            )
            for length in self.packed or (self.length,)
        )

    def flops(self, which: str) -> float:
        """Of the matrix products, as benchmarks count them: `4·B·H·N²·D` forward, halved when causal, 2.5× backward.

        With a window, with blocks and with packed sequences only what is seen counts, a causal sequence as half; a
        dense boolean mask counts as all, since half of each tile cannot be skipped.
        """
        count = forward_flops if which == "forward" else backward_flops
        return sum(count(spec, self._scores(spec)).matmul for spec in self.specs)

    def least_bytes(self, which: str) -> float:
        """What any method moves: Q, K, V read and O written; backward also O, dO read and dQ, dK, dV written."""
        once = sum(ideal_traffic(spec).bytes for spec in self.specs)
        return once if which == "forward" else 2 * once

    def seen_blocks(self) -> int:
        """Key blocks that a row of blocks sees in a sparse case."""
        return max(1, round(self.length // BLOCK * (1 - (self.sparsity or 0.0))))

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"packed": list(self.packed), "pattern": self.pattern}

    def _scores(self, spec: AttentionSpec) -> float:
        if self.sparsity is not None:
            return self.length // BLOCK * self.seen_blocks() * BLOCK * BLOCK
        return visible_scores(spec) if self.window is not None else conventional_scores(spec)


@dataclass(frozen=True, slots=True)
class Suite:
    """Cases by their axes: every pattern × head dim × length, in that order.

    `tokens` is B·N where the batch follows the length (one sequence at least), `width` is H·D.
    """

    about: str
    head_dims: tuple[int, ...]
    lengths: tuple[int, ...]
    patterns: tuple[Case, ...]
    tokens: int
    width: int
    group: int = 1
    """Query heads that share a key/value head."""

    def cases(self, dtype: str, head_dims: Sequence[int] = (), lengths: Sequence[int] = ()) -> list[Case]:
        """The cases in `dtype`; other head dims and lengths replace the suite's own.

        Packed sequences bring their own length.

        Raises:
            ValueError: a length that is no multiple of 128, for blocks.
        """
        return [
            self._case(pattern, dtype, head_dim, length)
            for pattern in self.patterns
            for head_dim in head_dims or self.head_dims
            for length in lengths or self.lengths
        ]

    def _case(self, pattern: Case, dtype: str, head_dim: int, length: int) -> Case:
        if pattern.sparsity is not None and length % BLOCK:
            raise bad_value("length", length, f"a multiple of {BLOCK}, the block of a sparse case")
        heads = max(self.group, self.width // head_dim // self.group * self.group)
        batch = 1 if pattern.packed else max(1, self.tokens // length)
        return replace(
            pattern,
            batch=batch,
            heads=heads,
            kv_heads=heads // self.group,
            length=sum(pattern.packed) or length,
            head_dim=head_dim,
            dtype=dtype,
        )


def _pattern(**features: object) -> Case:
    """A case whose sizes the suite fills in."""
    return Case(1, 1, 1, 1, 1, "", **features)  # type: ignore[arg-type]


def mixed_lengths(count: int, total: int, seed: int) -> tuple[int, ...]:
    """`count` lengths of very different size that sum to `total`: exponentially distributed, as documents are."""
    draw = random.Random(seed)
    shares = [draw.expovariate(1.0) + 0.02 for _ in range(count)]
    lengths = [max(1, int(total * share / sum(shares))) for share in shares]
    lengths[lengths.index(max(lengths))] += total - sum(lengths)
    return tuple(lengths)


FULL, CAUSAL = _pattern(), _pattern(causal=True)
_MIXED = mixed_lengths(64, 32768, seed=2)  # Σn² / Σn = 1008: about the work of 32 × 1024

SUITES: dict[str, Suite] = {
    "dense": Suite(
        "the shapes of the FlashAttention papers: 16k tokens, model width 2048",
        head_dims=(64, 128, 256),
        lengths=(1024, 2048, 4096, 8192, 16384),
        patterns=(FULL, CAUSAL),
        tokens=16384,
        width=2048,
    ),
    "window": Suite(
        "each row sees itself and the 1024 keys before it",
        head_dims=(64, 128, 256),
        lengths=(16384,),
        patterns=(CAUSAL, _pattern(causal=True, window=1024)),
        tokens=16384,
        width=2048,
    ),
    "sparse": Suite(
        "random 128×128 blocks, beside the same size without a mask",
        head_dims=(128,),
        lengths=(16384,),
        patterns=(FULL, *(_pattern(sparsity=share) for share in (0.0, 0.5, 0.9))),
        tokens=16384,
        width=2048,
    ),
    "varlen": Suite(
        "64 packed sequences of mixed length, 32k tokens in all, beside a dense batch of about as many operations",
        head_dims=(64, 128),
        lengths=(1024,),
        patterns=(FULL, CAUSAL, _pattern(packed=_MIXED), _pattern(packed=_MIXED, causal=True)),
        tokens=32768,
        width=2048,
    ),
    "gqa": Suite(
        "32 query heads on 8 key/value heads, plain and under a boolean mask",
        head_dims=(128,),
        lengths=(8192,),
        patterns=(FULL, CAUSAL, _pattern(dense_mask=True)),
        tokens=8192,
        width=4096,
        group=4,
    ),
    "quick": Suite(
        "small enough for a CPU",
        head_dims=(64,),
        lengths=(512, 1024, 2048),
        patterns=(FULL, CAUSAL, _pattern(causal=True, window=128)),
        tokens=2048,
        width=256,
    ),
}


def select(
    suites: Sequence[str],
    dtype: str,
    *,
    head_dims: Sequence[int] = (),
    lengths: Sequence[int] = (),
    causal: bool | None = None,
) -> list[Case]:
    """The cases of `suites`, each once; `causal` keeps those that are or are not causal.

    Raises:
        ValueError: a length that a suite cannot have.
    """
    found = [case for name in suites for case in SUITES[name].cases(dtype, head_dims, lengths)]
    return [case for case in dict.fromkeys(found) if causal is None or case.causal == causal]
