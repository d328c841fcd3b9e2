"""Feature maps of linear attention with something of their own to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tilewise.errors import bad_value
from tilewise.ops import checks
from tilewise.reference.features import favor_logs, random_projection


class FavorFeatures(nn.Module):
    """FAVOR+, positive random features: `φ(q)·φ(k)` is `e^{q·k/√D}` on average over the directions.

    `linear_attention(feature_map=FavorFeatures(D))` approximates softmax attention; the error falls as 1/√features.

    Args:
        head_dim: D.
        features: number of directions; D·ln D by default, as in the paper.
        orthogonal: directions at right angles in blocks of D, which lowers the variance.
        generator: where the directions come from; torch's own by default.
        device: of the buffer `projection` [features, D], float32, part of the state dict.

    Source: Choromanski et al., "Rethinking attention with performers" (2020).
    """

    def __init__(
        self,
        head_dim: int,
        features: int | None = None,
        *,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        features = max(1, round(head_dim * math.log(max(2, head_dim)))) if features is None else features
        checks.whole(head_dim=head_dim, features=features)
        self.orthogonal = orthogonal
        self.projection = nn.Buffer(torch.empty(features, head_dim, device=device))
        self.redraw(generator)

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new directions, in place: in training from time to time, so that none is learned around."""
        features, head_dim = self.projection.shape
        drawn = random_projection(features, head_dim, orthogonal=self.orthogonal, generator=generator)
        self.projection.copy_(drawn)

    def log_features(self, x: Tensor) -> Tensor:
        """Logs of the features of x [..., D]: [..., features], at least float32. ValueError for another D."""
        if x.shape[-1] != self.projection.shape[1]:
            raise bad_value("x", f"head dim {x.shape[-1]}", f"{self.projection.shape[1]}, for which the map was made")
        return favor_logs(x, self.projection)

    def forward(self, x: Tensor) -> Tensor:
        """The features of x [..., D], not stabilised, so that their products estimate `e^{q·k/√D}` itself."""
        return self.log_features(x).exp() / math.sqrt(self.projection.shape[0])

    def extra_repr(self) -> str:
        features, head_dim = self.projection.shape
        return f"head_dim={head_dim}, features={features}, orthogonal={self.orthogonal}"
