"""Time kernels that are not selectable yet beside what runs in their place and beside cuDNN.

    python tests/backends/hopper/time_candidates.py

Run the tests of this folder before, under a time limit. Medians of five interleaved rounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from hopper_cases import problem
from latent_problems import COLUMNS, WIDTH
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tilewise.backends.base import Needs, Operands
from tilewise.backends.decoding import DecodeOperands
from tilewise.backends.hopper import HOPPER, decoding, launch
from tilewise.backends.hopper.backward import backward
from tilewise.backends.hopper.configs import D64_NARROW, D128, ForwardConfig
from tilewise.backends.hopper.launch import plan
from tilewise.backends.triton import TRITON
from tilewise.backends.triton.decoding import TRITON_DECODE
from tilewise.masks import BigBird, Prefix, Window
from tilewise.spec import AttentionSpec, DecodeSpec

NEEDS = Needs()


def timed(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    marks[0].record()
    for _ in range(repeats):
        call()
    marks[1].record()
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / repeats


def interleaved(calls: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    return {name: median(found) for name, found in times.items()}


def wide_backward(n: int, causal: bool) -> dict[str, float]:
    """D = 256, B·N = 16384, H·D = 2048."""
    batch, heads = 16384 // n, 8
    q, k, v, dout = (torch.randn(batch, heads, n, 256, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    spec = AttentionSpec(batch, heads, heads, n, n, 256, 256, "bfloat16", "sm_90", 256**-0.5, causal=causal)
    operands, plan = Operands(q, k, v), HOPPER.configure(spec)
    out, lse = HOPPER.forward(operands, spec, plan)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        theirs = scaled_dot_product_attention(*leaves, is_causal=causal)
    config = TRITON.configure(spec)
    return interleaved(
        {
            "hopper": lambda: backward(dout, None, operands, out, lse, spec, None, NEEDS),
            "triton": lambda: TRITON.backward(dout, None, operands, out, lse, spec, config, NEEDS),
            "cudnn": lambda: torch.autograd.grad(theirs, leaves, dout, retain_graph=True),
        }
    )


def forward(configs: dict[str, ForwardConfig], **options: Any) -> dict[str, float]:
    """One problem under several configurations."""
    operands, spec = problem(next(iter(configs.values())), **options)
    plans = {name: plan(spec, config) for name, config in configs.items()}
    return interleaved({name: partial(launch.forward, operands, spec, found) for name, found in plans.items()})


def latent(batch: int, heads: int, tokens: int, page: int | None) -> dict[str, float]:
    q = torch.randn(batch, heads, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
    pages = batch if page is None else batch * tokens // page
    pool = torch.randn(pages, 1, page or tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    table = None
    if page is not None:
        table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(batch, -1)
    lengths = torch.full((batch,), tokens, device="cuda", dtype=torch.int32)
    spec = DecodeSpec(batch, heads, 1, 1, tokens, WIDTH, COLUMNS, tokens, "bfloat16", "sm_90", WIDTH**-0.5,
                      page_size=page, latent=True)  # fmt: skip
    operands = DecodeOperands(q, pool, None, lengths, table)
    ours, theirs = decoding.plan(spec), TRITON_DECODE.configure(spec)
    calls: dict[str, Any] = {
        "hopper": lambda: decoding.forward(operands, ours, spec),
        "triton": lambda: TRITON_DECODE.forward(operands, spec, theirs),
    }
    found, expected = (call()[0] for call in calls.values())
    assert (found - expected).norm() <= 0.01 * expected.norm()
    return interleaved(calls)


def main() -> None:
    r = random.Random(0)
    for causal in (False, True):
        for n in (1024, 2048, 4096, 8192, 16384):
            times = wide_backward(n, causal)
            flops = 10 * 2048 * 16384 * n / (2 if causal else 1)
            rates = ", ".join(f"{name} {flops / ms / 1e9:.0f}" for name, ms in times.items())
            print(f"D=256 backward, causal={causal}, N={n}: {rates} TFLOP/s", flush=True)  # noqa: T201
    for base, dim in ((D64_NARROW, 64), (D128, 128)):
        both = {"late": base, "early": base._replace(early_bits=True)}
        for mask in (BigBird(64, 3, 1, 2), Window(256, 256) | Prefix(1), Window(None, None)):
            times = forward(both, n=16384, m=16384, batch=1, heads=2048 // dim, kv_heads=2048 // dim, mask=mask)
            rates = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
            print(f"D={dim}, {mask}, bits asked for: {rates} ms", flush=True)  # noqa: T201
    lengths = [r.randrange(100, 1000) for _ in range(64)]
    for causal in (False, True):
        times = forward(
            {"two stages": D128, "block_n=64, three": D128._replace(block_n=64, stages=3)},
            lengths=(lengths, lengths), heads=16, kv_heads=16, causal=causal,
        )  # fmt: skip
        rates = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
        print(f"D=128, packed, causal={causal}: {rates} ms", flush=True)  # noqa: T201
    for shape in ((64, 128, 8192, None), (64, 128, 8192, 64), (1, 128, 32768, None), (128, 16, 8192, 64)):
        batch, heads, tokens, _ = shape
        flops, size = 2 * batch * heads * tokens * (WIDTH + COLUMNS), 2 * batch * tokens * WIDTH
        rates = ", ".join(
            f"{name} {1e3 * ms:.0f} us, {flops / ms / 1e9:.0f} TFLOP/s, {size / ms / 1e9:.2f} TB/s"
            for name, ms in latent(*shape).items()
        )
        print(f"latent B, H, M, page = {shape}: {rates}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
