"""The op boundary of linear attention: `tilewise::linear_attention` and its backward as torch operators.

As in `library.py`: tensors, numbers and names cross, specs and plans exist only inside, on concrete shapes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

from tilewise.backends.base import empty_ordered, ordered_strides
from tilewise.backends.linear import LinearBackend, LinearOperands
from tilewise.backends.registry import REGISTRY
from tilewise.ops.arguments import _device_name
from tilewise.ops.dispatch import Plan, choose
from tilewise.ops.library import apply_function, below_autograd, one_by_one
from tilewise.reference.softmax import accumulator_dtype
from tilewise.spec import LinearSpec

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? s, Tensor? z, Tensor? cu_seqlens, bool causal, "
    "str feature_map, bool exclusive, bool normalize, float scale, bool return_state, str backend"
)
_library = Library("tilewise", "FRAGMENT")
_library.define(f"linear_attention({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "linear_attention_backward(Tensor dout, Tensor? ds, Tensor? dz, Tensor out, Tensor den, bool[] needs, "
    f"{_INPUTS}) -> Tensor[]"
)

_DIFFERENTIABLE = 7
"""The first seven arguments may want a gradient."""


class LinearArguments(NamedTuple):
    """The arguments of `tilewise::linear_attention`, in the order of its schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    s: Tensor | None
    z: Tensor | None
    cu_seqlens: Tensor | None
    causal: bool
    feature_map: str
    exclusive: bool
    normalize: bool
    scale: float
    return_state: bool
    backend: str

    def operands(self) -> LinearOperands:
        return LinearOperands(*self[:8])

    def state_rows(self) -> Any:
        """Rows of a state: one a sequence."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def signature(self) -> tuple[Any, ...]:
        """All that the spec depends on, cheap to take and to hash."""
        return (
            self.q.shape,
            self.k.shape[2],
            self.v.shape[3],
            self.q.dtype,
            self.q.device,
            0 if self.decay is None else self.decay.dim(),
            self.beta is not None,
            self.s is not None,
            None if self.cu_seqlens is None else self.state_rows(),
            *self[8:13],
        )


@lru_cache(maxsize=4096)
def linear_route(signature: tuple[Any, ...], backend: str) -> tuple[Plan[LinearSpec], LinearSpec, LinearBackend]:
    """The plan, its spec and the implementation for a call."""
    shape, k_len, v_head_dim, dtype, device, decay_dim, delta, state, sequences = signature[:9]
    causal, feature_map, exclusive, normalize, scale = signature[9:]
    spec = LinearSpec(
        batch=shape[0] if sequences is None else sequences,
        heads=shape[1],
        q_len=shape[2],
        k_len=k_len,
        head_dim=shape[3],
        v_head_dim=v_head_dim,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        causal=causal,
        feature_map=feature_map,
        decay={0: "none", 3: "token", 4: "channel"}[decay_dim],  # type: ignore[arg-type]
        exclusive=exclusive,
        delta=delta,
        normalize=normalize,
        scale=scale,
        state=state,
        packed=sequences is not None,
    )
    plan = choose(spec, backend, "linear")
    return plan, spec, REGISTRY["linear", plan.backend]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = LinearArguments(*args)
    plan, spec, backend = linear_route(arguments.signature(), arguments.backend)
    out, den, s, z = backend.forward(arguments.operands(), spec, plan.config, state=arguments.return_state)
    nothing = arguments.q.new_empty(0, dtype=accumulator_dtype(arguments.q.dtype))
    kept_s = s if s is not None and arguments.return_state else nothing
    kept_z = z if z is not None and arguments.return_state else nothing.clone()
    return out, nothing.clone() if den is None else den, kept_s, kept_z


def _backward(
    dout: Tensor, ds: Tensor | None, dz: Tensor | None, out: Tensor, den: Tensor, needs: list[bool], *args: Any
) -> list[Tensor]:
    arguments = LinearArguments(*args)
    plan, spec, backend = linear_route(arguments.signature(), arguments.backend)
    kept = den if arguments.normalize else None
    grads = backend.backward(dout, ds, dz, arguments.operands(), out, kept, spec, plan.config, decay_gradient=needs[3])
    found: list[Tensor] = []
    for position, (grad, want) in enumerate(zip(grads, needs, strict=True)):
        if want:
            x = args[position]
            grad = torch.zeros_like(x) if grad is None else grad.to(x.dtype)
            found.append(_in_order(grad, x) if position < 3 else grad.contiguous())
    return found


def _in_order(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides that the fake implementation promised."""
    if x.stride() == ordered_strides(like, x.shape[-1]):
        return x
    return empty_ordered(like, x.shape[-1]).copy_(x)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = LinearArguments(*args)
    q, v = arguments.q, arguments.v
    dtype = accumulator_dtype(q.dtype)
    state = (arguments.state_rows(), q.shape[1], q.shape[3], v.shape[3])
    return (
        empty_ordered(q, v.shape[3]),
        q.new_empty(q.shape[:3] if arguments.normalize else (0,), dtype=dtype),
        q.new_empty(state if arguments.return_state else (0,), dtype=dtype),
        q.new_empty(state[:3] if arguments.return_state and arguments.normalize else (0,), dtype=dtype),
    )


def _fake_backward(*all_args: Any) -> list[Tensor]:
    needs, args = all_args[5], all_args[6:]
    wanted = [(position, args[position]) for position, want in enumerate(needs) if want]
    return [empty_ordered(x, x.shape[-1]) if position < 3 else x.new_empty(x.shape) for position, x in wanted]


class _Linear(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with below_autograd():
            out, den, s, z = torch.ops.tilewise.linear_attention.default(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(den)
        ctx.save_for_backward(out, den, *args[:8])
        ctx.options = args[8:]
        return out, den, s, z

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        dout, _, ds, dz = cotangents
        out, den, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * (8 + len(ctx.options))
        if dout is None and ds is None and dz is None:
            return tuple(grads)
        needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
        dout = torch.zeros_like(out) if dout is None else dout
        operator = torch.ops.tilewise.linear_attention_backward.default
        found = iter(operator(dout, ds, dz, out, den, needs, *tensors, *ctx.options))
        for position, want in enumerate(needs):
            if want:
                grads[position] = next(found)
        return tuple(grads)


class _LinearBackward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            return tuple(torch.ops.tilewise.linear_attention_backward.default(*args))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(
            "double backward: tilewise linear attention has first derivatives only. Fix: drop create_graph=True, or "
            "use tilewise.reference.linear, which autograd can differentiate any number of times"
        )


def _autograd_forward(*args: Any) -> Any:
    if forward_ad._current_level >= 0:
        _refuse_tangents(args[:_DIFFERENTIABLE])
    tensors = (x for x in args[:_DIFFERENTIABLE] if x is not None)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return apply_function(_Linear, args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tilewise.linear_attention.default(*args)


def _autograd_backward(*args: Any) -> Any:
    if torch.is_grad_enabled():
        return list(apply_function(_LinearBackward, args))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tilewise.linear_attention_backward.default(*args)


def _refuse_tangents(tensors: Any) -> None:
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "forward-mode differentiation: tilewise linear attention has reverse mode only. Fix: torch.func.vjp or "
            "backward(), or tilewise.reference.linear, which takes both modes"
        )


for _key in ("CPU", "CUDA"):
    _library.impl("linear_attention", _forward, _key)
    _library.impl("linear_attention_backward", _backward, _key)
_library.impl("linear_attention", _autograd_forward, "Autograd")
_library.impl("linear_attention_backward", _autograd_backward, "Autograd")
torch.library.register_fake("tilewise::linear_attention", _fake_forward, lib=_library)
torch.library.register_fake("tilewise::linear_attention_backward", _fake_backward, lib=_library)

linear_op = torch.ops.tilewise.linear_attention.default
linear_backward_op = torch.ops.tilewise.linear_attention_backward.default
torch.library.register_vmap("tilewise::linear_attention", one_by_one(linear_op), lib=_library)
torch.library.register_vmap("tilewise::linear_attention_backward", one_by_one(linear_backward_op), lib=_library)
