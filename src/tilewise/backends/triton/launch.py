"""From operands to kernel arguments: everything that the forward and backward launchers share.

Kernels take pointers, strides, sizes and compile-time flags. The flags follow from the spec alone and are made once, by
`plan`; what depends on the tensors of a call is gathered here with as little Python as possible, because a small call
is as slow as its launcher. Nothing here reads the device, so a call that was made before can be captured in a CUDA
graph: the first one fetches a mask's tile map from the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from tilewise.backends.base import Operands
from tilewise.backends.philox import threshold
from tilewise.backends.triton import configs
from tilewise.backends.triton.configs import Tile, TileSet
from tilewise.masks import Causal, Window
from tilewise.masks.tensors import TileTensors, tile_map, unpack
from tilewise.spec import AttentionSpec

SOFTCAP, BIAS, RELATIVE, ALIBI, SCALED = 1, 2, 4, 8, 16
"""Bits of the kernels' SCORE flag, as features.py defines them."""

NO_LIMIT = 1 << 30
"""A window side that reaches further than any sequence; sums with positions stay inside 32 bits."""

SMALLEST_SCALE = 2.0**-126
"""What is less may be 0 in float32, and the −∞ of a masked score times 0 is no number: such scores are scaled first."""

TMA_SCORES = 1 << 26
"""Scores from which a call takes longer on the device than its descriptors do on the host (about 0.1 ms)."""


class Prepared(Protocol):
    """What `launch` asks of a plan."""

    @property
    def plain(self) -> bool: ...

    @property
    def compiled(self) -> dict[Any, Any]: ...


class Shape(Protocol):
    """What `launch` asks of a launch shape."""

    @property
    def num_warps(self) -> int: ...

    @property
    def num_stages(self) -> int: ...


class TritonPlan(NamedTuple):
    """What a spec decides before any tensor is seen: tile shapes, compile-time flags and plain numbers."""

    tiles: TileSet
    flags: dict[str, Any]
    """Compile-time flags that every kernel takes, and the compiler's own options."""
    sink: bool
    left: int
    right: int
    offset: int
    threshold: int
    keep_scale: float
    softcap: float
    scale: float
    heads: int
    group: int
    batch: int
    q_len: int
    k_len: int
    tma: bool
    """The problem is large enough for tile descriptors, which take 10 µs each to make, to pay."""
    plain: bool
    """No operands but q, k and v."""
    compiled: dict[Any, Any]
    """Compiled kernels by what they were compiled for; see `launch`."""

    def __str__(self) -> str:
        return str(self.tiles)


def block_dims(head_dim: int, v_head_dim: int, element_size: int) -> tuple[int, int]:
    """Columns of the tiles that hold D and Dv: at least 16 for the tensor cores, and powers of two.

    Shared-memory rows up to 128 bytes have a swizzle of their own width. The two tiles get the same one, because the
    assembler of CUDA 12.8 builds wrong matrix descriptors where two swizzles share one address (K's buffer, reused for
    V).
    """
    d, dv = (max(16, 1 << (size - 1).bit_length()) for size in (head_dim, v_head_dim))
    row = 128 // element_size
    return max(d, min(dv, row)), max(dv, min(d, row))


def signed32(word: int) -> int:
    """The int32 with the bits of a uint32: a kernel argument of one type, whatever its value."""
    return word - (1 << 32) if word >= 1 << 31 else word


def plan(spec: AttentionSpec) -> TritonPlan:
    """The plan of a spec; ~10 µs, cached with the dispatcher's plan."""
    left, right = spec.window
    if spec.causal:
        right = 0 if right is None else min(right, 0)
    score = SOFTCAP if spec.softcap is not None else 0
    score |= BIAS if spec.bias is not None else 0
    score |= RELATIVE if spec.relative is not None else 0
    score |= ALIBI if spec.alibi else 0
    # Any other score feature already scales first.
    score |= SCALED if spec.scale < SMALLEST_SCALE else 0
    if spec.q_offset == "tensor":
        offset_kind, offset = 1, 0
    elif spec.q_offset is not None:
        offset_kind, offset = 0, spec.q_offset
    elif spec.packed:
        offset_kind, offset = 2, 0
    else:
        offset_kind, offset = 0, spec.k_len - spec.q_len
    has_map = spec.mask is not None
    if has_map:
        # The map holds the causal rule and the window too.
        left = right = None
    block_d, block_dv = block_dims(spec.head_dim, spec.v_head_dim, 4 if spec.dtype == "float32" else 2)
    flags = {
        "D": spec.head_dim,
        "DV": spec.v_head_dim,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "LEFT": left is not None,
        "RIGHT": right is not None,
        "OFFSET": offset_kind,
        "PACKED": spec.packed,
        "MAP": has_map,
        "SCORE": score,
        "DROPOUT": spec.dropout > 0.0,
    }
    return TritonPlan(
        tiles=configs.tiles_for(spec),
        flags=flags,
        sink=spec.sink,
        left=_clamp(left),
        right=_clamp(right),
        offset=offset,
        threshold=signed32(threshold(spec.dropout)),
        keep_scale=1.0 / (1.0 - spec.dropout),
        softcap=spec.softcap or 1.0,
        scale=spec.scale,
        heads=spec.heads,
        group=spec.group,
        batch=spec.batch,
        q_len=spec.q_len,
        k_len=spec.k_len,
        tma=spec.batch * spec.heads * spec.q_len * spec.k_len >= TMA_SCORES and not spec.packed,
        plain=not (score or spec.sink or spec.dropout > 0.0 or spec.packed or has_map or spec.q_offset == "tensor"),
        compiled={},
    )


def _clamp(side: int | None) -> int:
    return 0 if side is None else max(-NO_LIMIT, min(side, NO_LIMIT))


def unit_last(x: Tensor) -> Tensor:
    """x with a contiguous last dim: the one copy that the kernels cannot avoid, of strided or expanded head dims."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tile_tensors(operands: Operands, spec: AttentionSpec, transposed: bool) -> TileTensors | None:
    """The tile map of mask, causal rule and window together, cached by mask, sizes and device; None without a mask."""
    if spec.mask is None:
        return None
    mask = unpack(spec.mask, operands.mask_tensors)
    if spec.causal:
        mask = mask & Causal()
    if spec.windowed:
        mask = mask & Window(*spec.window)
    offset = operands.q_offset if spec.q_offset == "tensor" else spec.q_offset
    return tile_map(
        mask,
        spec.q_len,
        spec.k_len,
        offset=offset,
        device=operands.q.device,
        heads=spec.heads,
        transposed=transposed,
    )


def tensor_arguments(operands: Operands, tiles: TileTensors | None) -> tuple[Tensor | None, ...]:
    """The optional pointers, from bias_ptr to bits_ptr."""
    relative = operands.relative
    return (
        operands.bias,
        relative if relative is None or relative.is_contiguous() else relative.contiguous(),
        operands.alibi,
        operands.q_offset,
        operands.cu_seqlens_q,
        operands.cu_seqlens_k,
        operands.seed,
        *((None,) * 9 if tiles is None else tiles[4:]),
    )


def number_arguments(operands: Operands, prepared: TritonPlan, tiles: TileTensors | None) -> tuple[int | float, ...]:
    """The numbers, from bias_stride_b to keep_scale."""
    bias, relative, alibi = operands.bias, operands.relative, operands.alibi
    return (
        *((0, 0, 0, 0) if bias is None else broadcast_strides(bias)),
        0 if alibi is None or alibi.shape[0] == 1 else alibi.stride(0),
        *((1, 1, 0) if tiles is None else (tiles.batch, tiles.heads, tiles.q_tiles)),
        prepared.heads,
        prepared.group,
        prepared.q_len,
        prepared.k_len,
        operands.q.shape[2],
        prepared.offset,
        prepared.left,
        prepared.right,
        0 if relative is None else relative.shape[1] // 2,
        prepared.threshold,
        prepared.scale,
        prepared.softcap,
        prepared.keep_scale,
    )


def broadcast_strides(x: Tensor) -> tuple[int, ...]:
    """Strides with 0 where a dimension is broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def launch(
    kernel: Any,
    programs: int,
    prepared: Prepared,
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    tile: Shape,
    *,
    early: bool = False,
    registers: int = 0,
) -> None:
    """Run `kernel` on a grid of `programs` with `arguments`, then the compile-time `constants`, in its order.

    Triton looks a kernel up by the type, alignment and divisibility of every argument, which takes longer than a small
    call computes. Where all of that follows from the plan and the strides of aligned `tensors`, the plan remembers what
    Triton answered.

    `early`: the kernel may start before the one in front of it has ended, and waits for it by itself (sm_90 on).
    `registers`: the most a thread may have, 0 for no limit.
    """
    key = None
    if prepared.plain and not any(x.data_ptr() & 15 for x in tensors):
        key = (kernel, tensors[0].device.index, constants, *(x.stride() for x in tensors))
        compiled = prepared.compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*arguments, *constants)
            return
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    if registers:
        options["maxnreg"] = registers
    compiled = kernel[(programs,)](
        *arguments, *constants, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True, **options
    )
    if key is not None and compiled is not None:
        prepared.compiled[key] = compiled


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    """A copy-engine descriptor of x [B, H, N, D] in tiles of one head's `rows` × `columns`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns])


def copy_engine_takes(x: Tensor) -> bool:
    """Whether x [B, H, N, D] has the alignment that descriptors need: 16 bytes, of the base and of every stride."""
    units = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride % units == 0 and stride > 0 for stride in x.stride()[:3])


def constants(prepared: TritonPlan, tile: Tile, wide_rows: bool, tma: bool) -> tuple[Any, ...]:
    """The compile-time arguments that forward, dK/dV and dQ kernels begin theirs with."""
    flags = prepared.flags
    return (
        flags["D"],
        flags["DV"],
        flags["BLOCK_D"],
        flags["BLOCK_DV"],
        tile.block_m,
        tile.block_n,
        flags["LEFT"],
        flags["RIGHT"],
        flags["OFFSET"],
        flags["PACKED"],
        flags["MAP"],
        flags["SCORE"],
        flags["DROPOUT"],
        wide_rows,
        tma,
    )


def wide(*row_strides: int) -> bool:
    """Whether offsets inside one tile (up to 128 rows) may leave 32 bits."""
    return max(row_strides) >= 1 << 23
