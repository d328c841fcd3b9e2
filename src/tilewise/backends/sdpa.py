"""PyTorch's own fused attention, where it can do the job exactly.

On a CPU that is ATen's flash kernel, with restrictions and bias as one dense N×M mask, just as
`scaled_dot_product_attention` would be given them. On CUDA it is ATen's FlashAttention-2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tilewise.backends import cpu_flash
from tilewise.backends.base import Gradients, Needs, Operands
from tilewise.backends.problems import restriction, sequences
from tilewise.backends.scores import ScoreBlocks
from tilewise.errors import UnsupportedError
from tilewise.spec import AttentionSpec

Engine = Literal["cpu", "cuda"]
_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


def _additive(operands: Operands, spec: AttentionSpec) -> tuple[Tensor | None, bool]:
    """(additive mask or None, ATen's own causal flag): the dense form of everything that is not plain attention."""
    if cpu_flash.takes_causal(spec) and spec.bias is None:
        return None, True
    blocks = ScoreBlocks(next(sequences(operands, spec)), operands, spec)
    return blocks.dense_additive(restriction(operands, spec)), False


class Sdpa:
    name = "sdpa"

    def why_not(self, spec: AttentionSpec) -> str | None:
        unknown = {
            "softcap": spec.softcap is not None,
            "learnable sinks": spec.sink,
            "relative bias": spec.relative is not None,
            "ALiBi without an N×M bias": spec.alibi,
            "packed batches": spec.packed,
            "one query offset a sequence": spec.q_offset == "tensor",
            "dropout with tilewise's generator": spec.dropout > 0.0,
        }
        for feature, asked in unknown.items():
            if asked:
                return f"PyTorch's fused attention has no {feature}"
        if spec.head_dim != spec.v_head_dim:
            return f"PyTorch's fused attention wants D = Dv, here {spec.head_dim} and {spec.v_head_dim}"
        if 0 in (spec.batch, spec.q_len, spec.k_len):
            return "PyTorch's fused attention does not take empty inputs"
        return self._why_not_cpu(spec) if spec.device == "cpu" else self._why_not_cuda(spec)

    def _why_not_cpu(self, spec: AttentionSpec) -> str | None:
        if spec.needs_bias_grad:
            return "PyTorch's CPU kernel has no gradient for a bias"
        return None

    def _why_not_cuda(self, spec: AttentionSpec) -> str | None:
        if not spec.device.startswith("sm_") or int(spec.device[3:]) < 80:
            return (
                f"PyTorch's FlashAttention-2 wants an NVIDIA GPU of compute capability 8.0 or newer, not {spec.device}"
            )
        if spec.dtype not in ("float16", "bfloat16"):
            return f"PyTorch's FlashAttention-2 wants float16 or bfloat16, not {spec.dtype}"
        if spec.head_dim > 256 or spec.head_dim % 8:
            return f"PyTorch's FlashAttention-2 wants a head dim up to 256 that 8 divides, not {spec.head_dim}"
        if spec.mask is not None or spec.bias is not None or spec.reach[0] is not None:
            return "PyTorch's FlashAttention-2 has no mask, bias or window"
        if spec.reach[1] is not None and (spec.reach[1] != 0 or spec.offset != 0 or spec.q_len != spec.k_len):
            return "PyTorch's FlashAttention-2 has causal masks for N = M and no offset only"
        return None

    def configure(self, spec: AttentionSpec) -> Engine:
        return "cpu" if spec.device == "cpu" else "cuda"

    def forward(self, operands: Operands, spec: AttentionSpec, config: Engine) -> tuple[Tensor, Tensor]:
        q, k, v = operands.q, operands.k, operands.v
        if config == "cpu":
            return cpu_flash.forward(q, k, v, spec.scale, *_additive(operands, spec))
        out, lse = _flash(q, k, v, 0.0, spec.reach[1] is not None, False, scale=spec.scale)[:2]
        return out, lse

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        operands: Operands,
        out: Tensor,
        lse: Tensor,
        spec: AttentionSpec,
        config: Engine,
        needs: Needs,
    ) -> Gradients:
        q, k, v = operands.q, operands.k, operands.v
        if config == "cpu":
            grads = cpu_flash.backward(dout, dlse, q, k, v, out, lse, spec.scale, *_additive(operands, spec))
            return Gradients(*grads)
        dim = spec.head_dim
        if dlse is not None:
            wide = dim + 8
            if wide > 256:
                raise UnsupportedError(
                    f"backend='sdpa': the gradient through the LSE needs a head dim up to 248 on CUDA, not {dim}. "
                    "backend='tiled' can"
                )
            dout, out = cpu_flash.carry_dlse(dout, out, dlse, wide)
            q, k, v = (cpu_flash.widen(x, wide) for x in (q, k, v))
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        lengths = (None, None, spec.q_len, spec.k_len)  # no cumulative lengths: one dense batch
        rest = (0.0, spec.reach[1] is not None, no_dropout, no_dropout[:0])
        grads = _flash_backward(dout, q, k, v, out, lse, *lengths, *rest, scale=spec.scale)
        return Gradients(*(grad[..., :dim] for grad in grads))


SDPA = Sdpa()
