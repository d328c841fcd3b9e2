"""Predicted peaks against what the allocator saw: the profiler's record of every allocation and release."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import tilewise
from tilewise.backends import tiled
from tilewise.backends.base import Needs, Operands
from tilewise.bench.memory import cuda_peak
from tilewise.cost.counts import self_attention
from tilewise.cost.peak import BACKENDS, HOPPER_ROWS, PASSES, PLAIN_KEYS, PLAIN_ROWS, PLAIN_SCORES, Pass, peak_bytes
from tilewise.spec import AttentionSpec

WITHIN = 0.10
"""What the prediction promises."""

SHAPES = (
    self_attention(513, 64, heads=8, dtype="float32"),
    self_attention(513, 64, heads=8, dtype="bfloat16"),
    self_attention(700, 80, batch=2, heads=4, kv_heads=2, dtype="bfloat16"),
    self_attention(1000, 40, batch=3, heads=2, dtype="float32"),
    self_attention(1025, 128, heads=2, dtype="float32"),
)


def tensors(spec: AttentionSpec, device: str = "cpu") -> list[torch.Tensor]:
    dtype = getattr(torch, spec.dtype)
    q = torch.randn(spec.batch, spec.heads, spec.q_len, spec.head_dim, device=device).to(dtype)
    k, v = (torch.randn(spec.batch, spec.kv_heads, spec.k_len, spec.head_dim, device=device).to(dtype) for _ in "kv")
    return [q, k, v]


def allocator_peak(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    del result
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def both(inputs: list[torch.Tensor], **options: object) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    dout = torch.ones_like(leaves[0])

    def call() -> object:
        return torch.autograd.grad(tilewise.attention(*leaves, **options), leaves, dout)  # type: ignore[arg-type]

    return call


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("backend", ["standard", "tiled"])
@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_prediction_is_what_the_allocator_sees(spec: AttentionSpec, backend: str, direction: Pass) -> None:
    """On one thread, as the workspaces of ATen's kernel are one a thread."""
    if backend == "tiled" and direction == "forward" and spec.dtype != "float32":
        pytest.skip("whether ATen packs K and V of half precision depends on the CPU")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k, v = tensors(spec)
        forward = lambda: tilewise.attention(q, k, v, backend=backend)  # noqa: E731
        call = forward if direction == "forward" else both([q, k, v], backend=backend)
        call()
        assert peak_bytes(spec, backend, direction) == pytest.approx(allocator_peak(call), rel=WITHIN)
    finally:
        torch.set_num_threads(threads)


UNEVEN = self_attention(3000, 128, batch=3, heads=4, dtype="float16")
"""Its second key tile is the shorter one."""


@pytest.mark.parametrize("spec", [*SHAPES[:3], UNEVEN], ids=str)
def test_tiles_without_a_fused_kernel(spec: AttentionSpec) -> None:
    """What `tiled` does on a GPU, run on the CPU."""
    q, k, v = tensors(spec)
    config, operands = tiled.plain_config(spec), Operands(q, k, v)
    needs = Needs()

    def forward_backward() -> object:
        out, lse = tiled.TILED.forward(operands, spec, config)
        return tiled.TILED.backward(torch.ones_like(out), None, operands, out, lse, spec, config, needs)

    forward = allocator_peak(lambda: tiled.TILED.forward(operands, spec, config))
    elsewhere = replace(spec, device="sm_90")
    assert peak_bytes(elsewhere, "tiled", "forward") == pytest.approx(forward, rel=WITHIN)
    dout = q.nbytes
    assert peak_bytes(elsewhere, "tiled", "backward") == pytest.approx(
        allocator_peak(forward_backward) - dout, rel=WITHIN
    )


def test_the_constants_are_the_backends_own() -> None:
    assert PLAIN_SCORES == tiled.PLAIN_ELEMENTS
    assert PLAIN_KEYS == tiled.FLASH_KEYS
    assert HOPPER_ROWS == pytest.importorskip("tilewise.backends.hopper.backward").PAIR
    assert tiled.plain_config(self_attention(4096, 64, dtype="float32")).block_m == PLAIN_ROWS


def test_fused_kernels_hold_their_results() -> None:
    spec = replace(self_attention(1024, 64, heads=4, dtype="bfloat16"), device="sm_90")
    out, lse = 4 * 1024 * 64 * 2, 4 * 1024 * 4
    for backend in ("triton", "hopper"):
        assert peak_bytes(spec, backend) == out + lse
    assert peak_bytes(spec, "triton", "backward") == out + lse + 3 * out + 2 * lse
    # dQ is summed in float32 on Hopper, in the kernels for head dims up to 128.
    assert peak_bytes(spec, "hopper", "backward") == out + lse + 3 * out + 2 * lse + 2 * out
    wide = replace(spec, head_dim=256, v_head_dim=256)
    assert peak_bytes(wide, "hopper", "backward") == peak_bytes(wide, "triton", "backward")


def test_unknown_names() -> None:
    spec = self_attention(8, 8)
    with pytest.raises(ValueError, match="backend: got 'fast'; wants one of standard, tiled, sdpa, triton, hopper"):
        peak_bytes(spec, "fast")
    with pytest.raises(ValueError, match="direction: got 'sideways'; wants one of forward, backward"):
        peak_bytes(spec, "tiled", "sideways")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize(
    "spec",
    [
        self_attention(2048, 64, batch=2, heads=16, dtype="bfloat16"),
        self_attention(4096, 128, heads=16, dtype="bfloat16"),
        self_attention(4096, 128, heads=16, kv_heads=4, dtype="bfloat16"),
        self_attention(8192, 64, heads=8, dtype="bfloat16"),
        UNEVEN,
    ],
    ids=str,
)
def test_prediction_on_a_gpu(spec: AttentionSpec, backend: str, direction: Pass) -> None:
    device = torch.device("cuda")
    q, k, v = tensors(spec, "cuda")
    forward = lambda: tilewise.attention(q, k, v, backend=backend)  # noqa: E731
    call = forward if direction == "forward" else both([q, k, v], backend=backend)
    try:
        call()
    except tilewise.UnsupportedError as refusal:
        pytest.skip(str(refusal))
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    predicted = peak_bytes(replace(spec, device=arch), backend, direction)
    assert predicted == pytest.approx(cuda_peak(call, device), rel=WITHIN)
