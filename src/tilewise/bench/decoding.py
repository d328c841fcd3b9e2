"""Decoding beside cuDNN on a GPU, all in CUDA graphs: the table of docs/decoding.md.

    python -m tilewise.bench.decoding

Every row is right first: its output is compared with that of cuDNN on the same tokens, or for latent caches with
attention over the whole. Then all that read the same tokens are timed in interleaved rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import tilewise
from tilewise.bench.calibrate import MachineRates, machine_rates
from tilewise.bench.captured import in_graphs, sets_beyond_cache
from tilewise.bench.timer import Timing
from tilewise.caches import KV, DenseCache, Int8, Latent
from tilewise.ops.views import KVView

HEADS, KV_HEADS, DIM = 32, 8, 128
RANK, ROPE, LATENT_HEADS = 512, 64, 128
PAGE = 64
DTYPE = torch.bfloat16
LARGEST_ERROR = {"int8": 1.5e-2}
"""Relative norm of the difference that a row may have; 5e-3 unless named here."""

SHAPES = ((1, 8192), (1, 131072), (16, 8192), (64, 8192), (16, 32768))
WITH_INT8 = ((16, 32768),)
LATENT_SHAPES = ((64, 8192),)


class Found(NamedTuple):
    """One row."""

    batch: int
    tokens: int
    name: str
    backend: str
    timing: Timing
    flops: float
    read: float
    """Bytes of keys and values."""
    error: float


def grouped_query(batch: int, tokens: int, device: torch.device) -> Iterator[Found]:
    """Dense, paged and, where asked for, int8 caches of the same tokens, and cuDNN."""
    size = 2 * batch * KV_HEADS * tokens * DIM * DTYPE.itemsize
    sets = sets_beyond_cache(size)
    calls: dict[str, list[Callable[[], Tensor]]] = {"cudnn": [], "dense": [], f"pages of {PAGE}": []}
    backends = {"cudnn": "cudnn"}
    if (batch, tokens) in WITH_INT8:
        calls["int8"] = []
    for index in range(sets):
        q = torch.randn(batch, HEADS, 1, DIM, device=device, dtype=DTYPE)
        k, v = (torch.randn(batch, KV_HEADS, tokens, DIM, device=device, dtype=DTYPE) for _ in range(2))
        calls["cudnn"].append(lambda q=q, k=k, v=v: _cudnn(q, k, v))
        for name, of_name in list(calls.items())[1:]:
            cache = _filled(name, batch, tokens, (k, v), device)
            of_name.append(lambda q=q, cache=cache: tilewise.attention_decode(q, cache))
            if index == 0:
                backends[name] = tilewise.explain_decode(q, cache).backend
    expected = calls["cudnn"][0]().float()
    errors = {name: _relative(several[0]().float(), expected) for name, several in calls.items()}
    flops = 4.0 * batch * HEADS * tokens * DIM
    for name, timing in in_graphs(calls, device).items():
        read = size * (1 + 4 / DIM) / 2 if name == "int8" else float(size)
        yield Found(batch, tokens, name, backends[name], timing, flops, read, errors[name])


def latent(batch: int, tokens: int, device: torch.device) -> Iterator[Found]:
    """Multi-head latent attention in its absorbed form, dense and paged, on every backend that decodes it fused."""
    q = torch.randn(batch, LATENT_HEADS, 1, RANK + ROPE, device=device, dtype=DTYPE)
    c = torch.randn(batch, 1, tokens, RANK + ROPE, device=device, dtype=DTYPE)
    calls: dict[tuple[str, str], list[Callable[[], Tensor]]] = {}
    for name in ("latent", f"latent, pages of {PAGE}"):
        cache = _filled(name, batch, tokens, (c,), device)
        for backend in dict.fromkeys((tilewise.explain_decode(q, cache).backend, "triton")):
            calls[name, backend] = [
                lambda cache=cache, backend=backend: tilewise.attention_decode(q, cache, backend=backend)
            ]
    exact = tilewise.attention(q, c, c[..., :RANK], scale=(RANK + ROPE) ** -0.5, backend="standard").float()
    errors = {key: _relative(several[0]().float(), exact) for key, several in calls.items()}
    flops = 2.0 * batch * LATENT_HEADS * tokens * (2 * RANK + ROPE)
    for key, timing in in_graphs(calls, device).items():
        yield Found(batch, tokens, *key, timing, flops, float(c.nbytes), errors[key])


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _filled(name: str, batch: int, tokens: int, contents: tuple[Tensor, ...], device: torch.device) -> KVView:
    """What holds the tokens: a cache's view, or pages of a pool that lie in no order."""
    latent = "latent" in name
    if "pages" not in name:
        kind = Latent(RANK, ROPE) if latent else Int8(KV_HEADS, DIM) if name == "int8" else KV(KV_HEADS, DIM)
        cache = DenseCache(kind, batch, tokens, dtype=DTYPE, device=device)
        cache.append(*contents)
        return cache.view()
    order = torch.randperm(batch * tokens // PAGE, device=device)
    table = torch.empty_like(order)
    table[order] = torch.arange(len(order), device=device)
    pools = [x.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)[order].contiguous() for x in contents]
    return KVView(
        pools[0],
        None if latent else pools[1],
        torch.full((batch,), tokens, dtype=torch.int32, device=device),
        page_table=table.view(batch, -1).int(),
        max_length=tokens,
        v_dim=RANK if latent else DIM,
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def shares(row: Found, rates: MachineRates) -> tuple[float, float]:
    """Of this machine's matrix rate and of its memory's: the larger is that of the nearer roof."""
    seconds = row.timing.median / 1e3
    return row.flops / seconds / rates.matmul, row.read / seconds / rates.copy


def main() -> None:
    import click

    device = torch.device("cuda")
    if not torch.cuda.is_available():
        raise SystemExit("decoding is timed on a GPU; on a CPU `tilewise compare` and `tilewise predict` have figures")
    torch.manual_seed(0)
    rates = machine_rates(device, DTYPE)
    click.echo(f"{torch.cuda.get_device_name()}: {rates.matmul / 1e12:.0f} TFLOP/s, {rates.copy / 1e12:.2f} TB/s")
    wrong = 0
    cells = [(grouped_query, shape) for shape in SHAPES] + [(latent, shape) for shape in LATENT_SHAPES]
    for rows_of, (batch, tokens) in cells:
        rows = list(rows_of(batch, tokens, device))
        base = rows[0].timing.median
        for row in rows:
            matmul, copy = shares(row, rates)
            right = row.error <= LARGEST_ERROR.get(row.name, 5e-3) and math.isfinite(row.error)
            wrong += not right
            click.echo(
                f"{batch:3} × {tokens:6}  {row.name:22} {row.backend:8} {1e3 * row.timing.median:8.1f} µs"
                f" ({1e3 * row.timing.least:.1f} to {1e3 * row.timing.most:.1f})  {base / row.timing.median:5.3f}"
                f"  {100 * matmul:3.0f} % of products, {100 * copy:3.0f} % of copies"
                f"  error {row.error:.1e}{'' if right else '  WRONG'}"
            )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
