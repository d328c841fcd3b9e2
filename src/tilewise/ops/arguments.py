"""From what a user passes to what the op takes: checked, put into one layout, and described as a spec."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from tilewise.backends.base import Operands
from tilewise.errors import UnsupportedError, bad_type, bad_value
from tilewise.masks import Mask
from tilewise.masks.tensors import pack
from tilewise.ops import checks
from tilewise.ops.biases import Relative
from tilewise.ops.dispatch import check_name
from tilewise.resident import capturing
from tilewise.spec import AttentionSpec, Window

DENSE_TENSOR = "dense($0)"
"""The expression of a boolean tensor given as a mask: `str(masks.Dense(tensor))`."""


class Options(TypedDict, total=False):
    """What `attention` and `attention_varlen` take beside q, k, v and restrictions; `attention` documents each."""

    bias: Tensor | Relative | None
    alibi: Tensor | None
    softcap: float | None
    sink: Tensor | None
    scale: float | None
    dropout: float
    q_offset: int | Tensor | None
    deterministic: bool
    backend: str


class DenseOptions(Options, total=False):
    """`Options` and the layout, which packed tensors do not have."""

    layout: str


def known(function: str, options: Options) -> None:
    """Raises TypeError for an option that nobody takes, in the caller's name."""
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(f"{function}() has no argument {name!r}")


class Packed(NamedTuple):
    """Where the sequences of a packed batch lie."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Arguments(NamedTuple):
    """The arguments of `tilewise::attention`, in the order of its schema and in the layout of `Operands`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    relative: Tensor | None
    alibi: Tensor | None
    sink: Tensor | None
    q_offset: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None
    mask_tensors: list[Tensor]
    mask: str | None
    causal: bool
    left: int | None
    right: int | None
    offset: int | None
    q_len: int
    k_len: int
    scale: float | None
    softcap: float | None
    dropout: float
    deterministic: bool
    bias_grad: bool
    traced: bool
    """The call belongs to a compiled graph, which may put new values into a tensor without PyTorch counting it."""
    backend: str

    def operands(self) -> Operands:
        tensors, q_offset = self.mask_tensors, self.q_offset
        if self.mask is not None and (self.traced or capturing(self.q.device)):
            # Tile maps are cached by the identity of such a tensor; a copy has one of its own.
            tensors = [x.clone() if self.traced or x.is_cuda else x for x in tensors]
            q_offset = None if q_offset is None else q_offset.clone()
        # Kernels step through the small operands without strides: slices and expanded values are copied.
        small = (*self[4:7], q_offset, *self[8:11])
        dense = (x if x is None or x.is_contiguous() else x.contiguous() for x in small)
        return Operands(*self[:4], *dense, mask_tensors=tuple(tensors))

    def seeded(self) -> Arguments:
        """With the dropout seed drawn from PyTorch's generator, if there is dropout."""
        if self.dropout == 0.0:
            return self
        return self._replace(seed=torch.randint(2**62, (1,), dtype=torch.int64, device=self.q.device))

    def signature(self) -> tuple[object, ...]:
        """All that the spec depends on, cheap to take and to hash; `describe` turns it into the spec."""
        bias, relative, cu_seqlens_q = self.bias, self.relative, self.cu_seqlens_q
        return (
            self.q.shape,
            self.k.shape,
            self.v.shape[3],
            self.q.dtype,
            self.q.device,
            None if bias is None else bias.shape,
            None if relative is None else relative.shape[1],
            self.alibi is not None,
            self.sink is not None,
            self.q_offset is not None,
            None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
            *self[12:24],
        )


def describe(
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    bias_shape: torch.Size | None,
    relative_width: int | None,
    alibi: bool,
    sink: bool,
    offset_tensor: bool,
    sequences: int | None,
    mask: str | None,
    causal: bool,
    left: int | None,
    right: int | None,
    offset: int | None,
    q_len: int,
    k_len: int,
    scale: float | None,
    softcap: float | None,
    dropout: float,
    deterministic: bool,
    bias_grad: bool,
) -> AttentionSpec:
    """The spec of a call with this signature."""
    batch, heads, q_total, head_dim = q_shape
    packed = sequences is not None
    return AttentionSpec(
        batch=sequences if sequences is not None else batch,
        heads=heads,
        kv_heads=k_shape[1],
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(device),
        scale=head_dim**-0.5 if scale is None else scale,
        causal=causal,
        window=(left, right),
        q_offset="tensor" if offset_tensor else offset,
        mask=mask,
        bias=None if bias_shape is None else (bias_shape[0], bias_shape[1], bias_shape[2], bias_shape[3]),
        relative=None if relative_width is None else relative_width // 2,
        alibi=alibi,
        softcap=softcap,
        sink=sink,
        dropout=dropout,
        packed=packed,
        q_total=q_total if packed else 0,
        k_total=k_shape[2] if packed else 0,
        deterministic=deterministic,
        needs_bias_grad=bias_grad,
    )


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def build(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    packed: Packed | None = None,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    bias: Tensor | Relative | None = None,
    alibi: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    q_offset: int | Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Arguments:
    """The op's arguments for q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, Dv] whose shapes are checked already.

    Nothing is drawn or computed: the seed of dropout is still missing (`seeded`).

    Raises ValueError, TypeError or UnsupportedError for any other bad argument.
    """
    check_name(backend)
    checks.flag("causal", causal)
    checks.flag("deterministic", deterministic)
    heads = q.shape[1]
    batch = q.shape[0] if packed is None else packed.cu_seqlens_q.shape[0] - 1
    left, right = checks.window_pair(window)
    checks.finite("scale", scale)
    checks.finite("softcap", softcap, positive=True)
    checks.probability("dropout", dropout)
    checks.offset(q_offset, q, batch)
    relative = None
    if isinstance(bias, Relative):
        relative, bias = bias.values, None
        if relative.shape[0] != heads:
            raise bad_value("bias", f"values for {relative.shape[0]} heads", f"q's {heads} heads")
        checks.same_place("bias", relative, q)
    elif bias is not None:
        checks.is_float("bias", bias)
        bias = _four_dims("bias", bias, q, k, packed)
    if alibi is not None:
        checks.per_head("alibi", alibi, q, heads, batch)
        if alibi.requires_grad and torch.is_grad_enabled():
            fix = "alibi.detach(), or biases.Relative for a bias by distance that learns"
            raise bad_value("alibi", "a tensor that requires grad", "slopes that are constants", fix)
        alibi = torch.atleast_2d(alibi.detach().to(torch.float32))
    if sink is not None:
        checks.per_head("sink", sink, q, heads)
    expression: str | None = None
    mask_tensors: list[Tensor] = []
    if mask is not None:
        if isinstance(mask, Tensor):
            checks.boolean_mask(mask)
            expression, mask_tensors = DENSE_TENSOR, [_four_dims("mask", mask, q, k, packed)]
        elif isinstance(mask, Mask):
            checks.mask_value(mask, batch, heads, None if packed else (q.shape[2], k.shape[2]))
            expression, mask_tensors = pack(mask)
        else:
            raise bad_type("mask", mask, "a boolean tensor, True = attend, or a mask value")
    return Arguments(
        q=_unit_stride(q),
        k=_unit_stride(k),
        v=_unit_stride(v),
        bias=bias,
        relative=relative,
        alibi=alibi,
        sink=sink,
        q_offset=q_offset if isinstance(q_offset, Tensor) else None,
        cu_seqlens_q=None if packed is None else packed.cu_seqlens_q,
        cu_seqlens_k=None if packed is None else packed.cu_seqlens_k,
        seed=None,
        mask_tensors=mask_tensors,
        mask=expression,
        causal=causal,
        left=left,
        right=right,
        offset=None if isinstance(q_offset, Tensor) else q_offset,
        q_len=q.shape[2] if packed is None else packed.max_seqlen_q,
        k_len=k.shape[2] if packed is None else packed.max_seqlen_k,
        scale=scale,
        softcap=softcap,
        dropout=float(dropout),
        deterministic=deterministic,
        bias_grad=bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        traced=torch.compiler.is_compiling(),
        backend=backend,
    )


def _four_dims(name: str, tensor: Tensor, q: Tensor, k: Tensor, packed: Packed | None) -> Tensor:
    """`tensor` with leading dimensions added, checked against [B, H, N, M]."""
    if packed is None:
        checks.broadcasts(name, tensor, q, k.shape[2])
        return tensor.reshape((1,) * (4 - tensor.dim()) + tensor.shape)
    wide = tensor.reshape((1,) * max(0, 4 - tensor.dim()) + tensor.shape)
    if wide.dim() > 4 or wide.shape[0] != 1 or wide.shape[2:] != (1, 1):
        raise UnsupportedError(
            f"{name}: a packed batch has no one [N, M] matrix, so a tensor of shape {list(tensor.shape)} cannot be "
            f"placed on it. Fix: a per-head [H, 1, 1] {name}, a mask value or biases.Relative, or a padded batch"
        )
    checks.broadcasts(name, wide, q, 1)
    return wide


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def autocast(x: Tensor) -> Tensor:
    """x in the autocast dtype where autocast is on for its device; float64 is left alone, as in PyTorch."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
