"""`RotaryEmbedding`: the settings of a rotary embedding as a module without weights."""

from __future__ import annotations

from torch import Tensor, nn

from tilewise.errors import bad_value
from tilewise.ops.rotary import check_numbers, rotary
from tilewise.ops.rotary_scaling import DynamicNTK, Scaling


class RotaryEmbedding(nn.Module):
    """Turns the first `dim` columns of queries and keys by their positions.

    Args:
        dim: rotated columns, an even number; a head may have more.
        base: wavelengths go from 2π to 2π·base tokens.
        interleaved: pairs are columns (2i, 2i + 1), as in RoFormer and DeepSeek; else (i, i + dim/2), as in Llama.
        scaling: `LinearScaling`, `NTK`, `DynamicNTK`, `YaRN` or `Llama3`.

    It has neither parameters nor buffers, so nothing of it is in a state dict, and nothing goes stale on the way from
    the meta device or through `.half()`: frequencies are made where they are used, once a device.

    Raises ValueError or TypeError for bad settings.

    Source: Su et al., RoFormer (2021).
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: Scaling | DynamicNTK | None = None,
    ) -> None:
        super().__init__()
        check_numbers(dim, dim, base, scaling.at(1) if isinstance(scaling, DynamicNTK) else scaling)
        self.dim = dim
        self.base = base
        self.interleaved = interleaved
        self.scaling = scaling

    def forward(self, x: Tensor, positions: Tensor | None = None, *, offset: int | Tensor = 0) -> Tensor:
        """x [B, H, N, D], rotated. positions [N] or [B, N], or offset, an int or integers [B]: see `ops.rotary.rotary`.

        Raises ValueError for `DynamicNTK` with anything but positions from 0 on: what a cache holds was rotated for a
        shorter length.
        """
        scaling = self.scaling
        if isinstance(scaling, DynamicNTK):
            if positions is not None or isinstance(offset, Tensor) or offset != 0:
                fix = "scaling=DynamicNTK(...).at(the longest length) where there is a cache"
                raise bad_value("scaling", "DynamicNTK with positions or an offset", "a whole sequence", fix)
            scaling = scaling.at(int(x.shape[2]))
        return rotary(
            x,
            positions,
            offset=offset,
            base=self.base,
            dim=self.dim,
            interleaved=self.interleaved,
            scaling=scaling,
        )

    def extra_repr(self) -> str:
        scaling = "" if self.scaling is None else f", scaling={self.scaling}"
        return f"dim={self.dim}, base={self.base:g}, interleaved={self.interleaved}{scaling}"
