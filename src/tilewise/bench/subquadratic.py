"""The linear family and the sparse modules beside dense attention on a GPU, in CUDA graphs.

    python -m tilewise.bench.subquadratic

The tables of docs/linear.md and docs/sparse.md: forward and backward each in a graph of its own, so that what is timed
is the GPU and not the host that launches. How right the kernels are, the tests say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

import tilewise
from tilewise.bench.captured import in_graphs
from tilewise.nn import BigBirdAttention, LongformerAttention, MultiHeadAttention

DTYPE = torch.bfloat16
HEADS, DIM, LENGTHS = 16, 128, (4096, 16384, 65536)
WIDTH, MODULE_LENGTH = 1024, 16384


class Found(NamedTuple):
    """Milliseconds of one method."""

    name: str
    forward: float
    backward: float


def linear_family(n: int, device: torch.device) -> Iterator[Found]:
    """B = 1, H = 16, D = 128, causal; the dense kernels first."""
    make = partial(torch.randn, device=device, dtype=DTYPE)
    q, k, v = (make(1, HEADS, n, DIM).requires_grad_() for _ in range(3))
    token = logsigmoid(torch.randn(1, HEADS, n, device=device) + 3).requires_grad_()
    channel = logsigmoid(torch.randn(1, HEADS, n, DIM, device=device) + 3).requires_grad_()
    linear = partial(tilewise.linear_attention, causal=True)
    none: dict[str, Any] = {"feature_map": None, "normalize": False}
    methods: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "dense, cudnn": (_cudnn, (q, k, v)),
        "dense, tilewise": (partial(tilewise.attention, causal=True), (q, k, v)),
        "linear": (partial(linear, **none), (q, k, v)),
        "linear, elu + 1, normalised": (linear, (q, k, v)),
        "gates a token": (lambda q, k, v, g: linear(q, k, v, decay=g, **none), (q, k, v, token)),
        "gates a channel (GLA)": (lambda q, k, v, g: linear(q, k, v, decay=g, **none), (q, k, v, channel)),
    }
    yield from _timed(methods, device)


def modules(device: torch.device) -> Iterator[Found]:
    """B = 1, N = 16384, 16 heads of 64, with their projections."""
    made = {"device": device, "dtype": DTYPE}
    kinds: dict[str, nn.Module] = {
        "multi-head": MultiHeadAttention(WIDTH, HEADS, **made),
        "BigBird": BigBirdAttention(WIDTH, HEADS, random_blocks=2, **made),
        "Longformer": LongformerAttention(WIDTH, HEADS, window=512, global_tokens=(0,), **made),
    }
    x = torch.randn(1, MODULE_LENGTH, WIDTH, device=device, dtype=DTYPE, requires_grad=True)
    yield from _timed({name: (partial(_apply, kind), (x, *kind.parameters())) for name, kind in kinds.items()}, device)


def _apply(kind: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
    del parameters  # named so that their gradients are asked for
    return kind(x)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def _timed(
    methods: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]], device: torch.device
) -> Iterator[Found]:
    """Each method's forward without gradients, and its backward alone, in interleaved rounds."""
    calls: dict[tuple[str, str], list[Callable[[], object]]] = {}
    side = torch.cuda.Stream()
    for name, (method, leaves) in methods.items():
        calls[name, "forward"] = [partial(torch.no_grad()(method), *leaves)]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a backward runs on its forward's stream, and a capture takes none but its own
            out = method(*leaves)
            dout = torch.randn_like(out)
        calls[name, "backward"] = [
            partial(torch.autograd.grad, out, leaves, dout, retain_graph=True, allow_unused=True)
        ]
    torch.cuda.synchronize()
    found = in_graphs(calls, device, stream=side)
    for name in methods:
        yield Found(name, found[name, "forward"].median, found[name, "backward"].median)


def main() -> None:
    import click

    if not torch.cuda.is_available():
        raise SystemExit("this is timed on a GPU")
    device = torch.device("cuda")
    torch.manual_seed(0)
    tables: dict[str, Callable[[torch.device], Iterator[Found]]]
    tables = {f"causal, B=1, H={HEADS}, D={DIM}, N={n}": partial(linear_family, n) for n in LENGTHS}
    tables[f"modules, B=1, {HEADS} heads of {WIDTH // HEADS}, N={MODULE_LENGTH}"] = modules
    for title, rows_of in tables.items():
        click.echo(f"{torch.cuda.get_device_name()}, {title}: ms, and as a share of the first row's")
        rows = list(rows_of(device))
        for row in rows:
            forward, backward = row.forward / rows[0].forward, row.backward / rows[0].forward
            click.echo(
                f"  {row.name:28} forward {row.forward:7.3f} {forward:6.3f}"
                f"   backward {row.backward:7.3f} {backward:6.3f} of the first forward"
                f" {row.backward / rows[0].backward:6.3f} of its backward"
            )


if __name__ == "__main__":
    main()
