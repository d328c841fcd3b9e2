"""`linear_cross_entropy`: the last layer of a language model and its loss, without ever holding all the logits.

At 32768 tokens and 50257 words the logits of GPT-2 take 3.3 GB in bfloat16, and plain cross-entropy holds them several
times over. Here they exist for one chunk of tokens: made, turned into losses and gradients in place, multiplied
into the gradients of the inputs and of the weights, and forgotten. The gradients are therefore computed with the loss.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library

from tilewise.backends import cross_entropy as eager
from tilewise.backends.triton import import_obstacle, made_current
from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.ops import checks
from tilewise.reference.softmax import accumulator_dtype

CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits of one chunk: 256 MiB of bfloat16 on a GPU, enough rows to fill it with one product; 16 MiB of float32 on a
CPU."""

_library = Library("tilewise", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, bool mean, "
    "int chunk, ScalarType dtype, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of the logits `x·weightᵀ + bias`, in memory for one chunk of them.

    Args:
        x: [..., dim], what the last layer takes.
        weight: [V, dim], of the last layer; often the embedding's.
        targets: [...] int64 classes.
        bias: [V].
        ignore_index: rows with this target count for nothing.
        reduction: "mean" over the rows that count, 0 where there are none; or "sum".
        chunk: rows at a time; by default as many as make 2²⁷ logits on a GPU, 2²² on a CPU.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs). Gradients for x, weight and bias; first derivatives
        only. Logits are rounded to x's dtype, or to autocast's where that is on, as a linear layer rounds them; sums
        over the classes and over the chunks are taken in float32.

    Raises:
        ValueError, TypeError: bad input, before anything runs. Targets on a GPU are not read for that: one that is
            neither a class nor `ignore_index` makes the loss NaN.
    """
    _check(x, weight, targets, bias, ignore_index, reduction, chunk)
    rows = x.reshape(-1, x.shape[-1])
    kind = x.device.type
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if chunk is None:
        chunk = max(1, CHUNK_LOGITS.get(kind, CHUNK_LOGITS["cpu"]) // weight.shape[0])
    grad = torch.is_grad_enabled()
    needs = [grad and x.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad]
    mean = reduction == "mean"
    operator = torch.ops.tilewise.linear_cross_entropy.default
    return operator(rows, weight, bias, targets.reshape(-1), ignore_index, mean, chunk, dtype, needs)[0]


def _check(x: Any, weight: Any, targets: Any, bias: Any, ignore_index: Any, reduction: Any, chunk: Any) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        checks.is_float(name, tensor)
        checks.same_place(name, tensor, x)
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] < 1:
        want = f"[V, dim] for x of shape {list(x.shape)}"
        fix = "weight.t()" if weight.dim() == 2 and x.dim() and weight.shape[0] == x.shape[-1] else None
        raise bad_value("weight", f"shape {list(weight.shape)}", want, fix)
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise bad_type("weight", f"dtype {weight.dtype}", f"float64 beside it, as x is {x.dtype}", "weight.to(x.dtype)")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise bad_value("bias", f"shape {list(bias.shape)}", f"[V] = [{weight.shape[0]}]")
    checks.is_tensor("targets", targets)
    if targets.dtype != torch.int64:
        raise bad_type("targets", f"dtype {targets.dtype}", "int64", "targets.long()")
    if targets.shape != x.shape[:-1]:
        raise bad_value("targets", f"shape {list(targets.shape)}", f"x's shape but for the last, {list(x.shape[:-1])}")
    checks.same_place("targets", targets, x)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise bad_type("ignore_index", ignore_index, "an int")
    if reduction not in ("mean", "sum"):
        raise bad_value("reduction", repr(reduction), "'mean' or 'sum'")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise bad_value("chunk", chunk, "a number of rows of at least 1, or None")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        strange = targets[(targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))]
        if strange.numel():
            raise bad_value("targets", f"class {strange[0].item()}", f"0…{weight.shape[0] - 1}, or {ignore_index}")


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    chunk: int,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = accumulator_dtype(dtype)
    dx, dweight, dbias = _gradients(x, weight, needs, wide)
    narrow, narrow_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    softmax_gradient = _kernel(x, dtype)
    loss = x.new_zeros((), dtype=wide)
    for start in range(0, x.shape[0], chunk):
        rows = x[start : start + chunk].to(dtype)
        logits = torch.nn.functional.linear(rows, narrow, narrow_bias)
        with made_current(x):
            losses = softmax_gradient(logits, targets[start : start + chunk], ignore_index, gradient=any(needs))
        loss += losses.sum()
        if needs[0]:
            dx[start : start + chunk] = logits @ narrow
        if needs[1]:
            _add_product(dweight, logits.t(), rows)
        if needs[2]:
            dbias += logits.sum(0, dtype=wide)
    if mean:
        count = (targets != ignore_index).sum().clamp_(min=1)
        for each in (loss, dx, dweight, dbias):
            each.div_(count)
    return loss, dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _gradients(x: Tensor, weight: Tensor, needs: list[bool], wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Where gradients are gathered; empty for those that nobody needs."""
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_zeros(weight.shape if needs[1] else 0, dtype=wide),
        x.new_zeros(weight.shape[0] if needs[2] else 0, dtype=wide),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b, where total is wider than a and b: on a GPU the product is not rounded on the way."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b


def _kernel(x: Tensor, dtype: torch.dtype) -> Any:
    if x.device.type == "cpu" or dtype == torch.float64:
        return eager.softmax_gradient
    if obstacle := import_obstacle():
        raise UnsupportedError(f"linear_cross_entropy on {x.device} runs on Triton: {obstacle}")
    from tilewise.backends.triton import cross_entropy

    return cross_entropy.softmax_gradient


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, needs = options[-2:]
    wide = accumulator_dtype(dtype)
    dx, dweight, dbias = _gradients(x, weight, needs, wide)
    return x.new_empty((), dtype=wide), dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, dx, dweight, dbias = torch.ops.tilewise.linear_cross_entropy.default(*args)
        ctx.mark_non_differentiable(dx, dweight, dbias)
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.needs = args[-1]
        return loss, dx, dweight, dbias

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Any
    ) -> Any:
        kept = ctx.saved_tensors
        grads = [g * cotangents[0] if want else None for g, want in zip(kept, ctx.needs, strict=True)]
        return *(g if g is None else g.to(k.dtype) for g, k in zip(grads, kept, strict=True)), *([None] * 6)


def _autograd(*args: Any) -> Any:
    if any(args[-1]):
        return _LinearCrossEntropy.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tilewise.linear_cross_entropy.default(*args)


for _key in ("CPU", "CUDA"):
    _library.impl("linear_cross_entropy", _forward, _key)
_library.impl("linear_cross_entropy", _autograd, "Autograd")
torch.library.register_fake("tilewise::linear_cross_entropy", _fake, lib=_library)
