"""The op boundary: `tilewise::attention` and its backward as torch operators.

`torch.compile` sees tensors, numbers and strings; specs, masks as values and plans exist only inside the op, on
concrete shapes, so dynamic shapes do not specialise. A mask crosses as its canonical expression and the tensors that
it names. Dense and packed calls are one operator: packed tensors enter as a batch of one with `cu_seqlens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

from tilewise.backends.base import Backend, Needs, Operands, empty_ordered, empty_output, ordered_strides
from tilewise.backends.registry import REGISTRY
from tilewise.ops.arguments import Arguments, describe
from tilewise.ops.dispatch import Plan, choose
from tilewise.spec import AttentionSpec

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? relative, Tensor? alibi, Tensor? sink, Tensor? q_offset, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, Tensor[] mask_tensors, str? mask, bool causal, "
    "SymInt? left, SymInt? right, SymInt? offset, SymInt q_len, SymInt k_len, float? scale, float? softcap, "
    "float dropout, bool deterministic, bool bias_grad, bool traced, str backend"
)

_library = Library("tilewise", "DEF")
_library.define(f"attention({_INPUTS}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needs, {_INPUTS}) -> Tensor[]"
)


_DIFFERENTIABLE = (0, 1, 2, 3, 4, 6)
"""Positions of the operands of `Needs` and `Gradients` (q, k, v, bias, relative, sink) among the arguments."""


@lru_cache(maxsize=4096)
def route(signature: tuple[Any, ...], backend: str) -> tuple[Plan[AttentionSpec], Backend]:
    """The plan and the implementation for a call; one look-up on the hot path."""
    plan: Plan[AttentionSpec] = choose(describe(*signature), backend)
    return plan, REGISTRY["attention", plan.backend]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(*args)
    plan, backend = route(arguments.signature(), arguments.backend)
    out, lse = backend.forward(arguments.operands(), plan.spec, plan.config)
    return _in_order(out, arguments.q), lse.contiguous()


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], *args: Any
) -> list[Tensor]:
    arguments = Arguments(*args)
    plan, backend = route(arguments.signature(), arguments.backend)
    wanted = Needs(*needs)
    if dlse is not None:  # a row that saw nothing has a constant LSE, whatever arrives there
        dlse = dlse.masked_fill(lse == float("-inf"), 0.0)
    grads = backend.backward(dout, dlse, arguments.operands(), out, lse, plan.spec, plan.config, wanted)
    found: list[Tensor] = []
    for position, grad, want in zip(_DIFFERENTIABLE, grads, wanted, strict=True):
        if want and grad is not None:
            found.append(_in_order(grad, args[position]) if position < 3 else grad.contiguous())
    return found


def _in_order(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides that the fake implementation promised."""
    if x.is_contiguous() and like.is_contiguous():
        return x
    if x.stride() == ordered_strides(like, x.shape[-1]):
        return x
    return empty_ordered(like, x.shape[-1]).copy_(x)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(Operands(*args[:3]))


def _fake_backward(*all_args: Any) -> list[Tensor]:
    needs, args = all_args[4], all_args[5:]
    wanted = [position for position, want in zip(_DIFFERENTIABLE, needs, strict=True) if want]
    return [
        empty_ordered(x, x.shape[-1]) if position < 3 else x.new_empty(x.shape)
        for position, x in ((position, args[position]) for position in wanted)
    ]


def _key_set(*names: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


_WATCHERS = _key_set(
    "Python",
    "PythonDispatcher",
    "PythonTLSSnapshot",
    "PreDispatch",
    "Functionalize",
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchBatched",
    "FuncTorchGradWrapper",
    "FuncTorchVmapMode",
    "Negative",
    "Conjugate",
    "ZeroTensor",
).raw_repr()
"""What makes the dispatcher do more than call the kernel: modes, transforms, subclasses, lazily negated tensors."""


def _watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether anything but the kernel wants to see a call on these tensors. Where nothing does, the implementation is
    called without the dispatcher, whose two passes over 26 arguments take longer than the launch of a small kernel."""
    keys = torch._C._dispatch_tls_local_include_set()
    for x in tensors:
        if x is not None:
            keys = keys | torch._C._dispatch_keys(x)
    return keys.raw_repr() & _WATCHERS != 0 or torch.autograd._profiler_enabled()


def readable(x: Tensor) -> bool:
    """Whether checks may look at the values of x: they are in host memory, and nothing traces or maps the call."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    keys = torch._C._dispatch_tls_local_include_set() | torch._C._dispatch_keys(x)
    return keys.raw_repr() & _WATCHERS == 0


def attend(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """out and lse of `Arguments`: the operator, or what it would call."""
    if torch.compiler.is_compiling() or args[0].is_meta or _watched((*args[:11], *args[11])):
        return attention_op(*args)
    return _attend(args, _forward)


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], plan: Plan[AttentionSpec], backend: Backend
) -> Any:
    """`attend` for (q, k, v, *options), whose only tensors are q, k and v and whose plan is known."""
    if _watched((q, k, v)):
        return attention_op(q, k, v, *options)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _attend((q, k, v, *options), _forward)
    if forward_ad._current_level >= 0:
        _refuse_tangents((q, k, v))
    out, lse = backend.forward(Operands(q, k, v), plan.spec, plan.config)
    return _in_order(out, q), lse.contiguous()


@contextmanager
def below_autograd() -> Iterator[None]:
    """For calls of an operator inside its own `autograd.Function`.

    Grad mode is off in there. The next level of `torch.func` transforms may want a gradient all the same, and without
    it a second derivative would silently be zero.
    """
    with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
        yield


def _attend_below(*args: Any) -> tuple[Tensor, Tensor]:
    with below_autograd():
        return torch.ops.tilewise.attention.default(*args)


class _Attention(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        run = _attend_below if args[0].is_meta or _watched((*args[:11], *args[11])) else _forward
        out, lse = run(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *args[:11], *args[11])
        ctx.options = args[12:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        dout, dlse = cotangents
        saved = ctx.saved_tensors
        out, lse, tensors, mask_tensors = saved[0], saved[1], saved[2:13], list(saved[13:])
        needs = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        grads: list[Tensor | None] = [None] * (12 + len(ctx.options))
        if dout is None and dlse is None:
            return tuple(grads)
        dout = torch.zeros_like(out) if dout is None else dout
        watched = torch.is_grad_enabled() or out.is_meta or _watched((dout, dlse, *saved))
        run = torch.ops.tilewise.attention_backward.default if watched else _backward
        found = iter(run(dout, dlse, out, lse, needs, *tensors, mask_tensors, *ctx.options))
        for position, want in zip(_DIFFERENTIABLE, needs, strict=True):
            if want:
                grads[position] = next(found)
        return tuple(grads)


class _AttentionBackward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            return tuple(torch.ops.tilewise.attention_backward.default(*args))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(
            "double backward: tilewise attention has first derivatives only. Fix: drop create_graph=True, or use "
            "tilewise.reference.standard_attention, which autograd can differentiate any number of times"
        )


def _autograd_forward(*args: Any) -> Any:
    return _attend(args, _attend_below)


def _attend(args: tuple[Any, ...], run: Callable[..., Any]) -> Any:
    """`run`, or the differentiable function where a gradient is wanted."""
    if forward_ad._current_level >= 0:
        _refuse_tangents(args)
    differentiable = torch.is_grad_enabled() and any(
        args[position] is not None and args[position].requires_grad for position in _DIFFERENTIABLE
    )
    if differentiable:
        return apply_function(_Attention, args)
    return run(*args)


def _autograd_backward(*args: Any) -> list[Tensor]:
    if torch.is_grad_enabled():
        return list(apply_function(_AttentionBackward, args))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tilewise.attention_backward.default(*args)


def apply_function(function: Any, args: tuple[Any, ...]) -> Any:
    """Under `torch.func`, this kernel runs once a level of transforms, so a function of one level is what is wanted."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return function.apply(*args)


def _refuse_tangents(args: tuple[Any, ...]) -> None:
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(
                "forward-mode differentiation: tilewise attention has reverse mode only. Fix: torch.func.vjp or "
                "backward(), or tilewise.reference.standard_attention, which takes both modes"
            )


def one_by_one(op: Any) -> Any:
    """A vmap rule for `op`: the op on each slice of the mapped dimension, and the results stacked."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def pick(arg: Any, dim: Any, index: int) -> Any:
            if isinstance(arg, list):
                dims = dim if isinstance(dim, list) else [dim] * len(arg)
                return [pick(x, d, index) for x, d in zip(arg, dims, strict=True)]
            return arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg

        results = [
            op(*(pick(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        return (stacked, [0] * len(stacked)) if isinstance(results[0], list) else (tuple(stacked), (0,) * len(stacked))

    return rule


for _key in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _key)
    _library.impl("attention_backward", _backward, _key)
_library.impl("attention", _autograd_forward, "Autograd")
_library.impl("attention_backward", _autograd_backward, "Autograd")
torch.library.register_fake("tilewise::attention", _fake_forward, lib=_library)
torch.library.register_fake("tilewise::attention_backward", _fake_backward, lib=_library)

attention_op = torch.ops.tilewise.attention.default
attention_backward_op = torch.ops.tilewise.attention_backward.default
torch.library.register_vmap("tilewise::attention", one_by_one(attention_op), lib=_library)
torch.library.register_vmap("tilewise::attention_backward", one_by_one(attention_backward_op), lib=_library)
