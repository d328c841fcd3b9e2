"""The argument checks of the public ops: everything that can be wrong is said before anything runs.

Each function raises ValueError or TypeError naming the argument, what it got, what it wants and the likely fix.
Values that live on a GPU are not read (that would stall the stream): there shapes and dtypes are checked only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tilewise.backends.problems import check_ends
from tilewise.errors import bad_type, bad_value
from tilewise.masks import Mask

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT32_MAX = 3.4028234663852886e38
INT32_MAX = 2**31 - 1
LAYOUTS = ("bhsd", "bshd")


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise bad_type(name, value, "a torch.Tensor")


def is_float(name: str, tensor: Any) -> None:
    is_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise bad_type(
            name, f"dtype {tensor.dtype}", "float32, float16, bfloat16 or float64", f"{name} = {name}.float()"
        )


def same_place(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise bad_value(name, f"device {tensor.device}", f"q's device {q.device}", f"{name} = {name}.to(q.device)")


def floats(q: Any, k: Any, v: Any) -> None:
    """Strided floating-point tensors."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        is_float(name, tensor)
        if tensor.layout != torch.strided:
            raise bad_type(name, f"layout {tensor.layout}", "a strided tensor", f"{name}.to_dense()")


def qkv(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    """Ranks, dtypes and devices of q, k and v: what every layout shares."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != rank:
            want = "[B, H, N, D] or, with layout='bshd', [B, N, H, D]" if rank == 4 else "[tokens, heads, dim]"
            fix = "unsqueeze the missing dimensions" if tensor.dim() < rank else None
            raise bad_value(name, f"shape {list(tensor.shape)}", f"{rank} dimensions, {want}", fix)
        if tensor.dtype != q.dtype:
            raise bad_type(name, f"dtype {tensor.dtype}", f"q's dtype {q.dtype}", f"{name} = {name}.to(q.dtype)")
        same_place(name, tensor, q)


def heads_and_lengths(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    """Shapes of dense q [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, Dv] (already in that order)."""
    problem = _shape_problem(q.shape, k.shape, v.shape)
    if problem is None:
        return
    name, got, want = problem
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    swapped = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v)]
    fix = None
    if _shape_problem(*swapped) is None:
        fix = f"these shapes fit the other layout: pass layout={other!r} (now {layout!r}) or transpose(1, 2)"
    elif name == "k" and "heads" in got:
        fix = "repeat or drop heads so that H is a multiple of Hkv"
    raise bad_value(name, got, want, fix)


def _shape_problem(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> tuple[str, str, str] | None:
    """(argument, got, want) of the first disagreement, or None."""
    for name, shape in (("k", k), ("v", v)):
        if shape[0] != q[0]:
            return name, f"batch {shape[0]}", f"q's batch {q[0]}"
    if k[3] != q[3]:
        return "k", f"head dim {k[3]}", f"q's head dim {q[3]}"
    if q[3] == 0 or v[3] == 0:
        return "q" if q[3] == 0 else "v", "head dim 0", "a head dim of at least 1"
    if v[1] != k[1]:
        return "v", f"{v[1]} heads", f"k's {k[1]} heads"
    if v[2] != k[2]:
        return "v", f"length {v[2]}", f"k's length {k[2]}"
    if k[1] == 0:
        return "k", "0 heads", "at least 1 head"
    if q[1] % k[1] != 0:
        return "k", f"{k[1]} heads", f"a number of heads that divides q's {q[1]} heads"
    return None


def layout_name(layout: object) -> None:
    if layout not in LAYOUTS:
        raise bad_value("layout", repr(layout), "'bhsd' ([B, H, N, D]) or 'bshd' ([B, N, H, D])")


def finite(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite number or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise bad_type(name, value, "a number", f"{name}.item()" if isinstance(value, Tensor) else None)
    if torch.compiler.is_compiling():
        return  # the value may be symbolic; the first call was checked, or eager would be
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        raise bad_value(name, value, "a finite number within float32's range")
    if positive and value <= 0:
        raise bad_value(name, value, "a number above 0", f"leave out {name} for none")


def probability(name: str, value: Any) -> None:
    if value is None:
        raise bad_type(name, value, "a number", f"{name}=0.0 for none")
    finite(name, value)
    if not torch.compiler.is_compiling() and not 0.0 <= value < 1.0:
        raise bad_value(name, value, "a probability in [0, 1)")


def whole(**sizes: Any) -> None:
    """Each an int of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise bad_type(name, size, "an int")
        if size < 1:
            raise bad_value(name, size, "at least 1")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise bad_type(name, value, "True or False")


def mask_value(mask: Mask, batch: int, heads: int, sizes: tuple[int, int] | None) -> None:
    """Whether a mask's sequences, heads and, for a dense call, sizes are those of the call."""
    if mask.batch not in (1, batch):
        raise bad_value("mask", f"a mask of {mask.batch} sequences", f"one of 1 or B = {batch} sequences")
    if mask.heads not in (None, 1, heads):
        raise bad_value("mask", f"a mask of {mask.heads} heads", f"one of H = {heads} heads")
    if sizes is not None and not torch.compiler.is_compiling():
        mask.check(*sizes)


def window_pair(window: Any) -> tuple[int | None, int | None]:
    """(left, right), both inclusive, None for unlimited."""
    if window is None:
        return None, None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise bad_value("window", window, "a pair (left, right)", "window=(256, 0) sees 256 keys back and none ahead")
    for side in window:
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, int | torch.SymInt):
            raise bad_type("window", side, "ints or None")
        if side < 0:
            raise bad_value("window", tuple(window), "sides of at least 0, or None for unlimited", "None, not -1")
        if side > INT32_MAX:
            raise bad_value("window", tuple(window), f"sides up to {INT32_MAX}, or None for unlimited")
    return window[0], window[1]


def broadcasts(name: str, tensor: Tensor, q: Tensor, m: int) -> None:
    """`tensor` against [B, H, N, M] for q [B, H, N, D]."""
    full = (q.shape[0], q.shape[1], q.shape[2], m)
    if tensor.dim() > 4 or any(
        have != 1 and have != want for have, want in zip(tensor.shape[::-1], full[::-1], strict=False)
    ):
        want = f"a shape that broadcasts to [B, H, N, M] = {list(full)}"
        fix = None
        if tuple(tensor.shape) == (full[0], full[3]):
            fix = f"a key-padding {name} is {name}[:, None, None, :]"
        elif tuple(tensor.shape) == (full[0], *full[2:]):
            fix = f"a {name} for each sequence is {name}[:, None]"
        raise bad_value(name, f"shape {list(tensor.shape)}", want, fix)
    same_place(name, tensor, q)


def per_head(name: str, tensor: Any, q: Tensor, heads: int, batch: int | None = None) -> None:
    """A floating [H] tensor, or, where `batch` is given, also [batch, H]."""
    is_float(name, tensor)
    allowed: list[tuple[int, ...]] = [(heads,)]
    if batch is not None:
        allowed.append((batch, heads))
    if tuple(tensor.shape) not in allowed:
        want = f"shape [H] = [{heads}]" + (f" or [B, H] = [{batch}, {heads}]" if batch is not None else "")
        raise bad_value(name, f"shape {list(tensor.shape)}", want)
    same_place(name, tensor, q)


def boolean_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise bad_type("mask", mask, "a boolean tensor, True = attend, or a mask value")
    if mask.dtype != torch.bool:
        fix = "mask = mask.bool() (True = attend)"
        if mask.is_floating_point():
            fix = "an additive mask goes in bias="
        raise bad_type("mask", f"dtype {mask.dtype}", "a boolean tensor, True = attend, or a mask value", fix)


def offset(q_offset: Any, q: Tensor, batch: int) -> None:
    if q_offset is None:
        return
    if isinstance(q_offset, Tensor):
        if q_offset.dtype != torch.int32 or tuple(q_offset.shape) != (batch,):
            got = f"{q_offset.dtype} of shape {list(q_offset.shape)}"
            fix = "q_offset.to(torch.int32)" if tuple(q_offset.shape) == (batch,) else None
            raise bad_value("q_offset", got, f"an int, or int32 of shape [B] = [{batch}]", fix)
        same_place("q_offset", q_offset, q)
    elif isinstance(q_offset, bool) or not isinstance(q_offset, int | torch.SymInt):
        raise bad_type("q_offset", q_offset, "an int or an int32 tensor [B]")
    elif not -INT32_MAX <= q_offset <= INT32_MAX:
        raise bad_value("q_offset", q_offset, f"an int within ±{INT32_MAX}")


def cu_seqlens(name: str, value: Any, q: Tensor, total: int, longest: Any) -> None:
    """Cumulative lengths [B + 1]: int32, from 0 to `total`, never falling, no sequence above `longest`."""
    is_tensor(name, value)
    if value.dtype != torch.int32:
        raise bad_type(name, f"dtype {value.dtype}", "int32", f"{name}.to(torch.int32)")
    if value.dim() != 1 or value.shape[0] < 2:
        raise bad_value(name, f"shape {list(value.shape)}", "shape [B + 1] with B of at least 1")
    same_place(name, value, q)
    suffix = name.rsplit("_", 1)[1]
    argument = f"max_seqlen_{suffix}"
    if isinstance(longest, bool) or not isinstance(longest, int | torch.SymInt):
        raise bad_type(argument, longest, "an int", f"int({argument})")
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = value.tolist()
    check_ends(name, ends, total)
    lengths = [b - a for a, b in pairwise(ends)]
    if longest < max(lengths):
        raise bad_value(argument, longest, f"at least the longest sequence, {max(lengths)}")
