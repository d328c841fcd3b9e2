"""Biases that are smaller than the matrix they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tilewise.errors import bad_type, bad_value


@dataclass(frozen=True, slots=True, eq=False)
class Relative:
    """A bias by distance: `values[h, clip(p − j, −R, R) + R]` is added to the score of row position p and key j.

    values [H, 2R+1], floating point; O(N) memory, differentiable. T5's bucketed bias is a gather in front of it
    (Shaw et al., Self-attention with relative position representations, 2018; Raffel et al., T5, 2020).

    Raises TypeError or ValueError for values of another kind or shape.
    """

    values: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or not self.values.is_floating_point():
            got = f"dtype {self.values.dtype}" if isinstance(self.values, Tensor) else self.values
            raise bad_type("values", got, "a floating-point tensor [H, 2R+1]")
        if self.values.dim() != 2 or self.values.shape[1] % 2 == 0:
            raise bad_value("values", f"shape {list(self.values.shape)}", "shape [H, 2R+1], an odd number of distances")

    @property
    def radius(self) -> int:
        """R: distances beyond it share the outermost value."""
        return self.values.shape[1] // 2
