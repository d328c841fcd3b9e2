"""Intensity against balance."""

from __future__ import annotations

import pytest

from tilewise.cost import DEVICES, Step, place, self_attention
from tilewise.cost.roofline import flash_step, standard_step, standard_steps
from tilewise.spec import AttentionSpec

A100, H200 = DEVICES["A100 80GB"], DEVICES["H200"]


def test_the_roof() -> None:
    slow, fast = Step("slow", 1e12, 1e12), Step("fast", 1e15, 1e12)
    below, above = place(slow, A100, "float16"), place(fast, A100, "float16")
    assert below.bound == "memory"
    assert below.attainable == A100.bandwidth
    assert below.seconds == 1e12 / A100.bandwidth
    assert above.bound == "compute"
    assert above.attainable == A100.peak("float16")
    assert above.seconds == 1e15 / 312e12
    assert above.balance == A100.balance("float16")
    assert above.reached(2 * above.seconds) == 0.5


def test_at_the_ridge_both_bounds_meet() -> None:
    ridge = place(Step("ridge", A100.peak("float16"), A100.bandwidth), A100, "float16")
    assert ridge.attainable == pytest.approx(A100.peak("float16"))
    assert ridge.seconds == pytest.approx(1.0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_standard_attention_is_memory_bound_step_by_step(head_dim: int) -> None:
    steps = standard_steps(self_attention(8192, head_dim))
    assert [step.name for step in steps] == ["QKᵀ", "softmax", "PV"]
    qk, softmax, pv = (step.intensity for step in steps)
    # 2·N²·D / (2·(N² + 2·N·D)) = D / (1 + 2·D/N).
    assert qk == pv == pytest.approx(head_dim / (1 + 2 * head_dim / 8192))
    assert softmax == 1.25
    assert all(place(step, A100, "float16").bound == "memory" for step in steps)


def test_the_steps_add_up_to_the_whole() -> None:
    spec = AttentionSpec(2, 8, 2, 63, 113, 40, 24, dtype="bfloat16")
    qk, softmax, pv = standard_steps(spec)
    whole = standard_step(spec)
    assert qk.bytes + softmax.bytes + pv.bytes == whole.bytes
    assert qk.flops + pv.flops == whole.flops


def test_flash_is_compute_bound_from_twice_the_balance_on() -> None:
    """N/2 FLOP a byte: on an H200, of balance 206, from N = 413 on."""
    for n, bound in {256: "memory", 412: "memory", 413: "compute", 4096: "compute"}.items():
        assert flash_step(self_attention(n, 128)).intensity == n / 2
        assert place(flash_step(self_attention(n, 128)), H200, "float16").bound == bound


def test_decoding_is_memory_bound() -> None:
    decode = AttentionSpec(16, 32, 8, 1, 8192, 128, 128, dtype="bfloat16")
    step = flash_step(decode)
    # Each key is read once for a group of 4 query heads: 4·4·D FLOPs on 4·D bytes, and a little for Q and O.
    assert step.intensity == pytest.approx(4, rel=1e-3)
    assert place(step, H200, "bfloat16").bound == "memory"
