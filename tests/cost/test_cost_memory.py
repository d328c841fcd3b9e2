"""Memory, against tensors that were really made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tilewise.cost import attention_memory, self_attention
from tilewise.cost.memory import (
    METHODS,
    cache_bytes,
    kv_cache_elements,
    latent_cache_elements,
    qkvo_bytes,
    row_statistic_bytes,
    score_matrix_bytes,
)
from tilewise.reference import flash_v2, standard_attention
from tilewise.spec import AttentionSpec

SPEC = AttentionSpec(2, 6, 2, 63, 113, 40, 24, dtype="float32", scale=40**-0.5)


def tensors(spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(spec.batch, spec.heads, spec.q_len, spec.head_dim)
    k = torch.randn(spec.batch, spec.kv_heads, spec.k_len, spec.head_dim)
    return q, k, torch.randn(spec.batch, spec.kv_heads, spec.k_len, spec.v_head_dim)


def test_tensor_sizes() -> None:
    q, k, v = tensors(SPEC)
    (out, lse), _ = flash_v2(q, k, v)
    assert qkvo_bytes(SPEC) == q.nbytes + k.nbytes + v.nbytes + out.nbytes
    assert row_statistic_bytes(SPEC) == lse.nbytes
    assert score_matrix_bytes(SPEC) == 4 * 2 * 6 * 63 * 113


def test_standard_attention_keeps_one_matrix_for_its_backward() -> None:
    """What autograd really saves: P. S is not needed, though the forward held both."""
    q, k, v = (x.requires_grad_() for x in tensors(SPEC))
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (63, 113) and tensor.is_floating_point():
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        s = q @ k.repeat_interleave(3, 1).mT * SPEC.scale
        out = torch.softmax(s, dim=-1) @ v.repeat_interleave(3, 1)
    assert sum(saved.values()) == attention_memory(SPEC, "standard").saved
    assert torch.allclose(out, standard_attention(q, k, v).out, atol=1e-5)


def test_each_method() -> None:
    spec = self_attention(4096, 64, batch=2, heads=8, dtype="bfloat16")
    rows, matrix = 16 * 4096, 16 * 4096**2 * 2
    assert attention_memory(spec, "standard").working == 2 * matrix
    assert attention_memory(spec, "standard").saved == matrix
    v1, v2 = attention_memory(spec, "flash_v1"), attention_memory(spec, "flash_v2")
    assert v1.saved == 2 * rows * 4
    assert v1.working == v1.saved + rows * 64 * 4
    assert v2.saved == v2.working == rows * 4
    linear = attention_memory(spec, "linear", feature_dim=128, chunk=64)
    assert linear.saved == 16 * (4096 // 64) * 128 * 65 * 4
    windowed = AttentionSpec(2, 8, 8, 4096, 4096, 64, 64, dtype="bfloat16", window=(128, 127))
    sparse = attention_memory(windowed, "sparse")
    assert v2.saved < sparse.saved < 1.1 * v2.saved
    assert attention_memory(spec, "sparse", scores=128 * 128 * 10).saved == v2.saved + 4 * 16 * 10


@pytest.mark.parametrize("method", METHODS)
def test_growth_with_length(method: Any) -> None:
    short, long = (attention_memory(self_attention(n, 64, causal=True), method) for n in (4096, 8192))
    window = {n: attention_memory(AttentionSpec(1, 1, 1, n, n, 64, 64, window=(256, 0)), method) for n in (4096, 8192)}
    expected = 4 if method in ("standard", "sparse") else 2
    if method == "sparse":
        # Causal visits half of all tiles, an index each: quadratic, with a constant of 1/4096. A window is linear.
        assert long.saved / short.saved > 2
        expected, short, long = 2, window[4096], window[8192]
    assert long.saved / short.saved == pytest.approx(expected, rel=0.01)


def test_totals() -> None:
    memory = attention_memory(self_attention(512, 64), "standard")
    assert memory.inference == memory.qkvo + memory.working
    assert memory.training == memory.qkvo + memory.saved
    assert attention_memory(self_attention(0, 64), "standard").share_beyond_qkvo == 0


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method: got 'magic'; wants one of standard"):
        attention_memory(SPEC, "magic")  # type: ignore[arg-type]


def test_caches_against_tensors() -> None:
    kv = torch.zeros(2, 3, 2, 8, 100, 128, dtype=torch.bfloat16)
    elements = kv_cache_elements(8, 128)
    assert cache_bytes(elements, tokens=100, layers=3, batch=2, dtype="bfloat16") == kv.nbytes
    assert kv_cache_elements(8, 192, 128) == 8 * 320
    latent = torch.zeros(2, 3, 100, 576, dtype=torch.bfloat16)
    elements = latent_cache_elements(512, 64)
    assert cache_bytes(elements, tokens=100, layers=3, batch=2, dtype="bfloat16") == latent.nbytes
