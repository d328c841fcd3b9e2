"""The rolling cache: only the last tokens of each sequence, for models with a sliding window."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tilewise.caches.base import Rows
from tilewise.caches.contents import KV
from tilewise.caches.dense import DenseCache
from tilewise.errors import bad_type, bad_value
from tilewise.ops import checks

UNBOUNDED = 2**31 - 1


class RollingCache(DenseCache):
    """`batch` rings of `window + slack` tokens: token t overwrites token t − (window + slack). Never full.

    A query with `window=(window, ...)` sees itself and `window` tokens back, so a step of T ≤ slack tokens may be
    appended and then decoded, and up to `slack` tokens may be trimmed again, before anything it needs is overwritten.
    Append after a trim, then decode: what the tokens at the new end looked back to may be gone.
    A longer prompt may be appended at once, but is attended to with `attention(q, k, v)`, whose keys are at hand.

    Args:
        contents, batch, dtype, device: as for `DenseCache`.
        window: tokens that a query sees back, itself not counted.
        slack: most tokens of one step, and most tokens that a trim takes back.
    """

    ring = True

    def __init__(
        self,
        contents: KV,
        batch: int,
        window: int,
        slack: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(window, bool) or not isinstance(window, int):
            raise bad_type("window", window, "a number of tokens", "window=256 for a module's window=(256, 0)")
        if window < 0:
            raise bad_value("window", window, "a number of tokens, at least 0")
        checks.whole(slack=slack)
        super().__init__(contents, batch, window + slack, dtype=dtype, device=device)
        self.slack = slack
        self._longest = np.zeros(batch, np.int64)
        """The largest length since a sequence began: what lies more than the capacity before it is overwritten."""

    @property
    def max_length(self) -> int:
        return UNBOUNDED if self._unseen else int(self._held.max())

    def _make_room(self, added: np.ndarray) -> None:
        self._longest = np.maximum(self._longest, self._held + added)

    def trim(self, lengths: Rows | Tensor) -> None:
        """See `Cache.trim`; lengths on the device are read, because what was overwritten decides.

        Raises ValueError where more than `slack` tokens would have to come back."""
        super().trim(lengths.cpu() if isinstance(lengths, Tensor) else lengths)

    def _settle(self) -> None:
        super()._settle()
        self._longest = np.maximum(self._longest, self._held)

    def _trim(self, lengths: np.ndarray) -> None:
        for row, length in enumerate(lengths):
            self._reachable("lengths", row, int(length))

    def _reachable(self, name: str, row: int, length: int) -> None:
        longest = int(self._longest[row])
        if longest > self.capacity and longest - length > self.slack:
            want = f"at least {longest - self.slack}: the tokens before that window are overwritten"
            raise bad_value(name, length, want, "a rolling cache with more slack")

    def _reorder(self, rows: list[int]) -> None:
        super()._reorder(rows)
        self._longest = self._longest[rows]

    def _fork(self, source: int, destinations: list[int], tokens: int) -> None:
        self._reachable("tokens", source, tokens)
        super()._fork(source, destinations, int(self._longest[source]))
        self._longest[destinations] = self._longest[source]

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "longest": torch.from_numpy(self._longest)}

    def _release(self, rows: list[int]) -> None:
        self._longest[rows] = 0
