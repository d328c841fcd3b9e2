"""`rotary`: rotary position embeddings, their torch operators and their gradient.

`tilewise::rotary` is linear in x: its gradient is itself with the angles reversed, any number of times.
`tilewise::rotary_` is the same into x's own memory, without a gradient. The schema holds tensors, numbers and the
scaling's name; frequencies are made inside, once a device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.library import Library

from tilewise.backends import rotary as eager
from tilewise.backends.base import empty_ordered
from tilewise.backends.rotary import Place, as_turns, packed_positions
from tilewise.backends.triton import import_obstacle, made_current
from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.ops import checks, rotary_scaling
from tilewise.ops.library import apply_function, below_autograd
from tilewise.ops.rotary_scaling import Scaling
from tilewise.resident import made, used

_ARGUMENTS = (
    "Tensor? positions, Tensor? offsets, Tensor? cu_seqlens, SymInt offset, SymInt dim, float base, str scaling, "
    "float[] parameters, float factor, bool interleaved, bool inverse"
)
_INVERSE = 11
"""Position of `inverse` among the operators' arguments."""

_library = Library("tilewise", "FRAGMENT")
_library.define(f"rotary(Tensor x, {_ARGUMENTS}) -> Tensor")
_library.define(f"rotary_(Tensor(a!) x, {_ARGUMENTS}) -> ()")


def rotary(
    x: Tensor,
    positions: Tensor | None = None,
    *,
    offset: int | Tensor = 0,
    base: float = 10000.0,
    dim: int | None = None,
    interleaved: bool = False,
    scaling: Scaling | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
    inplace: bool = False,
    layout: str = "bhsd",
) -> Tensor:
    """Rotary position embeddings: pair i of the first `dim` columns turned by `position · base^(−2i/dim)` radians.

    Args:
        x: [B, H, N, D], queries or keys; with `cu_seqlens`, packed [T, H, D]. Floating point; float64 on PyTorch's
            path.
        positions: of each token: [N] or [B, N], packed [T]; int32 or int64, any value. By default 0 … N − 1 and
            `offset`, counted within each sequence.
        offset: position of token 0: an int, or integers [B], one for each sequence (the lengths of a cache, say).
        base: wavelengths go from 2π to 2π·base tokens.
        dim: rotated columns, the first ones; all D by default. The rest passes through.
        interleaved: pairs are columns (2i, 2i + 1), as in RoFormer and DeepSeek; else (i, i + dim/2), as in Llama.
        scaling: a value of `rotary_scaling` (`LinearScaling`, `NTK`, `YaRN`, `Llama3`).
        cu_seqlens: [B + 1] int32, where x is packed.
        inverse: turn the other way (rotated keys back to plain ones, up to the scaling's attention factor).
        inplace: write into x, which then may not require grad.
        layout: "bhsd" as above, or "bshd" for x as [B, N, H, D].

    Returns:
        A tensor of x's shape, dtype and order in memory; x itself where `inplace`.

    Raises:
        ValueError, TypeError: bad input, before anything runs.

    Angles are computed in integers modulo one turn, so their error does not grow with the position (10⁻⁷ radians in
    float32), beyond that of the float64 frequencies, 10⁻¹⁰ radians after a million tokens. Differentiable any number of
    times.

    Source: Su et al., RoFormer: Enhanced transformer with rotary position embedding (2021).
    """
    x4 = _four_dims(x, cu_seqlens, layout)
    batch, _, n, head_dim = x4.shape
    dim = head_dim if dim is None else dim
    check_numbers(dim, head_dim, base, scaling)
    checks.flag("interleaved", interleaved)
    checks.flag("inverse", inverse)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if positions is not None:
        positions = _explicit(positions, x, batch, n, offset)
    offsets = _check_offset(offset, x, sequences)
    arguments = (
        positions,
        offsets,
        cu_seqlens,
        0 if isinstance(offset, Tensor) else offset,
        dim,
        float(base),
        "" if scaling is None else scaling.name,
        [] if scaling is None else scaling.parameters(),
        1.0 if scaling is None else scaling.attention_factor,
        interleaved,
        inverse,
    )
    if inplace:
        if x.requires_grad and torch.is_grad_enabled():
            raise bad_value("inplace", True, "an x that does not require grad", "inplace=False, or torch.no_grad()")
        if x.stride(-1) != 1 and head_dim > 1:
            raise bad_value("x", f"strides {x.stride()}", "a contiguous last dim for inplace=True", "inplace=False")
        torch.ops.tilewise.rotary_.default(x4, *arguments)
        return x
    out = torch.ops.tilewise.rotary.default(x4 if x4.stride(-1) == 1 else x4.contiguous(), *arguments)
    if cu_seqlens is not None:
        return out.squeeze(0).transpose(0, 1)
    return out if layout == "bhsd" else out.transpose(1, 2)


def _four_dims(x: Any, cu_seqlens: Tensor | None, layout: str) -> Tensor:
    """x as [B, H, N, D]."""
    checks.is_float("x", x)
    checks.layout_name(layout)
    rank = 4 if cu_seqlens is None else 3
    if x.dim() != rank:
        want = "[T, H, D] beside cu_seqlens" if rank == 3 else "[B, H, N, D] or, with layout='bshd', [B, N, H, D]"
        raise bad_value("x", f"shape {list(x.shape)}", want)
    if cu_seqlens is not None:
        checks.cu_seqlens("cu_seqlens", cu_seqlens, x, x.shape[0], x.shape[0])
        return x.transpose(0, 1).unsqueeze(0)
    return x if layout == "bhsd" else x.transpose(1, 2)


def check_numbers(dim: Any, head_dim: int, base: Any, scaling: Any) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int | torch.SymInt):
        raise bad_type("dim", dim, "an int")
    if dim % 2 or not 0 < dim <= head_dim:
        raise bad_value("dim", dim, f"an even number of columns from 2 to D = {head_dim}")
    checks.finite("base", base, positive=True)
    if base <= 1.0:
        raise bad_value("base", base, "a number above 1")
    if isinstance(scaling, rotary_scaling.DynamicNTK):
        raise bad_type("scaling", scaling, "a scaling of one length", "scaling.at(length)")
    if scaling is not None and not hasattr(scaling, "frequencies"):
        raise bad_type("scaling", scaling, "LinearScaling, NTK, YaRN or Llama3")


def _integers(name: str, value: Any, x: Tensor) -> None:
    checks.is_tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise bad_type(name, f"dtype {value.dtype}", "int32 or int64", f"{name} = {name}.long()")
    if value.device != x.device:
        raise bad_value(name, f"device {value.device}", f"x's device {x.device}", f"{name} = {name}.to(x.device)")


def _explicit(positions: Any, x: Tensor, batch: int, n: int, offset: int | Tensor) -> Tensor:
    """Positions as [1|B, N]."""
    _integers("positions", positions, x)
    if isinstance(offset, Tensor) or offset != 0:
        raise bad_value("offset", "a value beside positions", "one of the two", "add the offset to the positions")
    if tuple(positions.shape) not in ((n,), (1, n), (batch, n)):
        want = f"[N] = [{n}] or [B, N] = [{batch}, {n}]"
        fix = "offset=positions for one integer a sequence" if tuple(positions.shape) == (batch,) else None
        raise bad_value("positions", f"shape {list(positions.shape)}", want, fix)
    return torch.atleast_2d(positions)


def _check_offset(offset: Any, x: Tensor, sequences: int) -> Tensor | None:
    if isinstance(offset, Tensor):
        _integers("offset", offset, x)
        if tuple(offset.shape) != (sequences,):
            raise bad_value("offset", f"shape {list(offset.shape)}", f"an int, or shape [B] = [{sequences}]")
        return offset
    if isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt):
        raise bad_type("offset", offset, "an int or an integer tensor [B]")
    if not -checks.INT32_MAX <= offset <= checks.INT32_MAX:
        raise bad_value("offset", offset, f"an int within ±{checks.INT32_MAX}")
    return None


@lru_cache(maxsize=256)
def _turns(dim: int, base: float, scaling: str, parameters: tuple[float, ...], device: torch.device) -> Tensor:
    """[dim/2] int64 on `device`; kept, so that a captured graph copies nothing from the host."""
    return made(as_turns(rotary_scaling.frequencies(dim, base, scaling, parameters), device), device)


def _run(x: Tensor, out: Tensor, arguments: tuple[Any, ...]) -> None:
    (positions, offsets, cu_seqlens, offset, dim, base, scaling, parameters, factor, interleaved, inverse) = arguments
    if cu_seqlens is not None and positions is None:
        positions, offsets = packed_positions(cu_seqlens, x.shape[2], offsets, offset), None
    place = Place(positions, offsets, offset)
    turns = used(_turns(dim, base, scaling, tuple(parameters), x.device), x.device)
    if x.device.type == "cpu" or x.dtype == torch.float64:
        eager.rotate(x, out, place, turns, factor, interleaved=interleaved, inverse=inverse)
        return
    if obstacle := import_obstacle():
        raise UnsupportedError(f"rotary on {x.device} runs on Triton: {obstacle}")
    from tilewise.backends.triton.rotary import rotate

    with made_current(x):
        rotate(x, out, place, turns, factor, interleaved=interleaved, inverse=inverse)


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    out = empty_ordered(x, x.shape[-1])
    _run(x, out, arguments)
    return out


def _forward_(x: Tensor, *arguments: Any) -> None:
    _run(x, x, arguments)


class _Rotary(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.arguments = args[1:]
        ctx.back = (*args[1:_INVERSE], not args[_INVERSE])
        with below_autograd():
            return torch.ops.tilewise.rotary.default(*args)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (dout,) = cotangents
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        return torch.ops.tilewise.rotary.default(dout, *ctx.back), *([None] * len(ctx.back))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent = tangents[0] if tangents[0].stride(-1) == 1 else tangents[0].contiguous()
        return torch.ops.tilewise.rotary.default(tangent, *ctx.arguments)


def _autograd(*args: Any) -> Tensor:
    x = args[0]
    forward_mode = forward_ad._current_level >= 0
    if forward_mode or (x.requires_grad and torch.is_grad_enabled()):
        return apply_function(_Rotary, args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.tilewise.rotary.default(*args)


def _autograd_(*args: Any) -> None:
    # What autograd saved of x before is now out of date, and its version counter is how it knows.
    torch.autograd.graph.increment_version(args[0])
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.tilewise.rotary_.default(*args)


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """The operator on each slice of the mapped dimension, and the results stacked."""

    def pick(arg: Any, dim: int | None, index: int) -> Any:
        return arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg

    slices = [[pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)] for i in range(info.batch_size)]
    return torch.stack([torch.ops.tilewise.rotary.default(*each) for each in slices]), 0


for _key in ("CPU", "CUDA"):
    _library.impl("rotary", _forward, _key)
    _library.impl("rotary_", _forward_, _key)
_library.impl("rotary", _autograd, "Autograd")
_library.impl("rotary_", _autograd_, "Autograd")
torch.library.register_fake("tilewise::rotary", lambda x, *_: empty_ordered(x, x.shape[-1]), lib=_library)
torch.library.register_fake("tilewise::rotary_", lambda x, *_: None, lib=_library)
torch.library.register_vmap("tilewise::rotary", _vmap, lib=_library)
