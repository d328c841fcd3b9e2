"""Decoding problems for tests: any cache filled with ragged sequences, and what the float64 oracle says of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import oracle
import tilewise
from budget import worst
from tilewise.caches import KV, Cache, DenseCache, Int8, Latent, PagedCache, RollingCache

LENGTHS = (70, 1, 0, 33, 64)
"""Tokens of each sequence: odd, none, fewer than the queries, and whole tiles."""
LAYOUTS = ("dense", "ring", "page 1", "page 16", "page 17", "page 64")
FEATURES = (
    "plain",
    "bidirectional",
    "window",
    "softcap",
    "sink",
    "alibi",
    "alibi batch",
    "tree",
    "padding",
    "everything",
)
WINDOW = (21, None)
HEADS, KV_HEADS, DIM, DIM_V = 6, 2, 24, 40


def make_cache(layout: str, contents: KV, batch: int, dtype: torch.dtype, device: str, capacity: int = 100) -> Cache:
    """A cache of `contents` for sequences of up to `capacity` tokens."""
    if layout == "dense":
        return DenseCache(contents, batch, capacity, dtype=dtype, device=device)
    if layout == "ring":
        return RollingCache(contents, batch, WINDOW[0], slack=9, dtype=dtype, device=device)
    size = int(layout.removeprefix("page "))
    pages = -(-capacity // size)
    return PagedCache(contents, batch, pages * batch, size, capacity, dtype=dtype, device=device)


def fill(cache: Cache, k: Tensor, v: Tensor | None, lengths: tuple[int, ...], device: str, step: int = 9) -> None:
    """Append the first `lengths[b]` of the tokens k [B, Hkv, N, D], v [B, Hkv, N, Dv] to each sequence, in chunks."""
    for start in range(0, max(lengths), step):
        stop = min(start + step, max(lengths))
        counts = [max(0, min(length, stop) - start) for length in lengths]
        part = slice(start, stop)
        given = None if v is None else v[:, :, part].to(device)
        cache.append(k[:, :, part].to(device), given, counts=counts)


def options_for(feature: str, tokens: int, batch: int, g: torch.Generator) -> dict[str, Any]:
    """Arguments of `attention_decode`, on the CPU."""
    slopes = torch.rand(batch, HEADS, generator=g)
    parents = [-1, 0, 0, 1, 1, 2, 0, *range(6, 40)][:tokens]
    table: dict[str, dict[str, Any]] = {
        "plain": {},
        "padding": {},
        "bidirectional": {"causal": False},
        "window": {"window": WINDOW},
        "softcap": {"softcap": 1.5},
        "sink": {"sink": torch.randn(HEADS, generator=g)},
        "alibi": {"alibi": slopes[0]},
        "alibi batch": {"alibi": slopes},
        "tree": {"mask": tilewise.masks.Tree(parents)},
    }
    everything = {key: value for options in table.values() for key, value in options.items() if key != "causal"}
    return everything if feature == "everything" else table[feature]


def expected(
    q: Tensor, k: Tensor, v: Tensor, row: int, start: int, options: dict[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out [1, H, T, Dv] and lse of one sequence with keys k [1, Hkv, L, D], by the oracle in `dtype`."""
    tokens, length = q.shape[2], k.shape[2]
    given = {name: value for name, value in options.items() if name not in ("mask", "alibi", "sink")}
    mask = torch.ones(1, 1, tokens, length, dtype=torch.bool)
    mask[..., :start] = False
    if "mask" in options:
        tree = torch.from_numpy(options["mask"].to_dense(tokens, tokens))
        seen = min(tokens, length)
        mask[..., length - seen :] &= tree[:, tokens - seen :]
    if "alibi" in options:
        alibi = options["alibi"]
        given["alibi"] = (alibi if alibi.dim() == 1 else alibi[row]).to(dtype)
    if "sink" in options:
        given["sink"] = options["sink"].to(dtype)
    given.setdefault("causal", True)
    tensors = (x.to(dtype) for x in (q, k, v))
    return oracle.attention(*tensors, mask=mask, **given)


def assert_like_oracle(
    found: tuple[Tensor, Tensor],
    q: Tensor,
    history: list[tuple[Tensor, Tensor]],
    starts: list[int],
    options: dict[str, Any],
    label: str,
    beside: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out [B, H, T, Dv] and lse [B, H, T] of every sequence, within 2·err_std + rounding (SPEC 8).

    err_std is the error of standard attention in q's dtype on the CPU, or of `beside`, the same on the device under
    test, if that is larger: a GPU sums a row of products in one chain, a CPU in many short ones.
    """
    eps, single = torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps
    # Against a float64 oracle float64 attention seems exact: its error is that of float32, scaled (as in budget.py).
    judged, unit = (torch.float32, eps / single) if q.dtype == torch.float64 else (q.dtype, 1.0)
    for row, (k, v) in enumerate(history):
        exact = expected(q[row : row + 1], k, v, row, starts[row], options, torch.float64)
        standard = expected(q[row : row + 1], k, v, row, starts[row], options, judged)
        for part, (name, ours, reference, same) in enumerate(zip(("out", "lse"), found, exact, standard, strict=True)):
            step = eps if name == "out" else 2 * single * unit
            size = reference[reference.isfinite()].abs().max().item() if reference.isfinite().any() else 1.0
            # A zero error of the standard formula (one key) is no measure of a rounding: at least one step is.
            err_std = unit * worst(same, reference)
            if beside is not None:
                err_std = max(err_std, worst(beside[part][row : row + 1].cpu(), reference))
            allowed = 2 * err_std + 2 * step * max(size, 1.0)
            error = worst(ours[row : row + 1].cpu(), reference)
            assert error <= allowed, f"{label} sequence {row}: {name} off by {error}, {allowed} allowed"


def check(
    layout: str,
    feature: str,
    backend: str,
    *,
    tokens: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    contents: str = "kv",
    num_splits: int | None = None,
    dim: int = DIM,
    dim_v: int = DIM_V,
    lengths: tuple[int, ...] = LENGTHS,
    heads: int = HEADS,
    step: int = 9,
    seed: int = 0,
) -> None:
    """Fill a cache, decode, and compare each sequence with the oracle over what was put in."""
    g = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    kv_heads = 1 if contents == "latent" else KV_HEADS
    kind = Latent(dim_v, dim) if contents == "latent" else {"kv": KV, "int8": Int8}[contents](kv_heads, dim, dim_v)
    k = torch.randn(batch, kv_heads, longest, kind.head_dim, generator=g).to(dtype)
    v = k[..., :dim_v] if contents == "latent" else torch.randn(batch, kv_heads, longest, dim_v, generator=g).to(dtype)
    q = torch.randn(batch, heads, tokens, kind.head_dim, generator=g).to(dtype)
    options = options_for(feature, tokens, batch, g)
    if layout == "ring":
        options = {"window": WINDOW, **options}
    cache = make_cache(layout, kind, batch, dtype, device, longest + 5)
    fill(cache, k, None if contents == "latent" else v, lengths, device, step)
    starts = [0] * batch
    if feature in ("padding", "everything"):
        starts = [min(3 * row, length) for row, length in enumerate(lengths)]
        cache.pad(starts)
    if contents == "int8":
        from tilewise.ops.append import quantize

        k, v = ((steps * scale[..., None]).float() for steps, scale in map(quantize, (k.float(), v.float())))
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    moved["return_lse"] = True
    found = tilewise.attention_decode(q.to(device), cache, **moved, num_splits=num_splits, backend=backend)
    beside = tilewise.attention_decode(q.to(device), cache, **moved, backend="standard") if device != "cpu" else None
    history = [(k[row : row + 1, :, :n], v[row : row + 1, :, :n]) for row, n in enumerate(lengths)]
    label = f"{backend} {layout} {contents} {feature} T={tokens} splits={num_splits} {dtype}"
    assert_like_oracle(found, q, history, starts, options, label, beside)
