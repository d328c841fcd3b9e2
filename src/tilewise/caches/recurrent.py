"""The cache of linear attention: a state of fixed size per sequence, whatever its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tilewise.caches.base import Rows, integers
from tilewise.errors import UnsupportedError, bad_value
from tilewise.ops import checks
from tilewise.reference.linear import LinearState


class RecurrentCache:
    """What `batch` sequences of linear attention remember: `Lifecycle` with a state in place of keys and values.

    Args:
        heads: H.
        features: K, the size of φ(k).
        v_head_dim: Dv.
        batch: B, sequences.
        normalized: the attention is normalised, so the state has a z.
        shifted: the feature map is given in logs (FAVOR+), so the state has a shift.
        tail: numbers of the last tokens' inputs that are kept beside the state (RWKV's token shift, the convolution of
            the delta rule's module); 0 for none.
        dtype: of the state; float64 for float64 modules.
        device: where everything lies.

    A token cannot be taken out of a sum again: `trim` and partial forks raise UnsupportedError.
    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        heads: int,
        features: int,
        v_head_dim: int,
        batch: int,
        *,
        normalized: bool = False,
        shifted: bool = False,
        tail: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.whole(heads=heads, features=features, v_head_dim=v_head_dim, batch=batch, tail=tail or 1)
        shapes: dict[str, tuple[int, ...]] = {"s": (batch, heads, features, v_head_dim)}
        if normalized:
            shapes["z"] = (batch, heads, features)
        if shifted:
            shapes["shift"] = (batch, heads)
        if tail:
            shapes["tail"] = (batch, tail)
        with torch.inference_mode(False):  # whose tensors nothing outside of it may write to
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            self._tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        self._bound = 0
        self.reset()

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def max_length(self) -> int:
        return self._bound

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._tensors.values())

    @property
    def state(self) -> LinearState:
        """The state after all tokens so far: the cache's own tensors, not copies."""
        tensors = self._tensors
        return LinearState(tensors["s"], tensors.get("z"), tensors.get("shift"))

    @property
    def tail(self) -> Tensor | None:
        """[B, width], the last tokens' inputs, zeros before the first."""
        return self._tensors.get("tail")

    def update(self, state: LinearState, tokens: int, tail: Tensor | None = None) -> None:
        """Replace the state by the one after `tokens` more tokens of each sequence, in place.

        Raises ValueError, with the cache as it was, for a state of another shape, or fewer than 0 tokens.
        """
        if tokens < 0:
            raise bad_value("tokens", tokens, "a number of tokens")
        given = {"s": state.s, "z": state.z, "shift": state.shift, "tail": tail}
        for name, x in given.items():
            own = self._tensors.get(name)
            if (own is None) != (x is None) or (own is not None and x is not None and own.shape != x.shape):
                got, want = ("none" if y is None else str(list(y.shape)) for y in (x, own))
                raise bad_value(f"state.{name}", got, want, "make the cache with module.make_cache(batch)")
        for name, x in given.items():
            if x is not None:
                self._tensors[name].copy_(x)
        self.lengths += tokens
        self._bound += tokens

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """See `Lifecycle.reorder`."""
        if isinstance(indices, Tensor) and indices.dtype in (torch.int32, torch.int64) and indices.device.type != "cpu":
            order = indices.reshape(-1)  # its values are not read: that would stall the stream
        else:
            order = torch.tensor(self._check_rows("indices", indices), dtype=torch.int64)
        if len(order) != self.batch:
            raise bad_value("indices", f"{len(order)} indices", f"one for each of the {self.batch} sequences")
        order = order.to(self.lengths.device)
        for x in (self.lengths, *self._tensors.values()):
            x.copy_(x[order])

    def fork(self, source: int, destinations: Rows, tokens: int | None = None) -> None:
        """See `Lifecycle.fork`; all tokens or none."""
        self._check_rows("source", source)
        rows = self._check_rows("destinations", destinations)
        if tokens is not None:
            held, count = int(self.lengths[source]), int(integers("tokens", tokens))
            if not 0 <= count <= held:
                raise bad_value("tokens", count, f"0 to {held}, the tokens of sequence {source}")
            if count not in (0, held):
                raise UnsupportedError(
                    f"tokens={count}: a recurrent state is a sum over all {held} tokens; the last ones cannot be taken "
                    "from it. Fix: fork before appending them"
                )
            if count == 0:
                self.free(rows)
                return
        for x in (self.lengths, *self._tensors.values()):
            x[rows] = x[source].clone()

    def trim(self, lengths: Rows | Tensor) -> None:
        """See `Lifecycle.trim`; only to nothing, or to what there is."""
        wanted, held = integers("lengths", lengths), self.lengths.cpu().numpy()
        if wanted.shape not in ((), (self.batch,)):
            raise bad_value("lengths", f"shape {list(wanted.shape)}", f"one length, or one for each of {self.batch}")
        if (wanted < 0).any():
            raise bad_value("lengths", lengths, "lengths of at least 0")
        if ((wanted < held) & (wanted > 0)).any():
            raise UnsupportedError(
                f"lengths={wanted.tolist()}: a recurrent state is a sum over all tokens, from which the last ones "
                "cannot be taken. Fix: fork the sequence before a draft and drop the fork that is rejected"
            )
        self.free(np.flatnonzero((wanted == 0) & (held > 0)).tolist())

    def free(self, rows: Rows) -> None:
        """See `Lifecycle.free`."""
        picked = self._check_rows("rows", rows)
        if not picked:
            return
        self.lengths[picked] = 0
        for name, x in self._tensors.items():
            x[picked] = float("-inf") if name == "shift" else 0.0

    def reset(self) -> None:
        """See `Lifecycle.reset`."""
        self._bound = 0
        self.free(range(self.batch))

    def to(self, device: torch.device | str) -> Self:
        """See `Lifecycle.to`."""
        with torch.inference_mode(False):
            self.lengths = self.lengths.to(device)
            self._tensors = {name: x.to(device) for name, x in self._tensors.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """See `Lifecycle.state_dict`."""
        return {"lengths": self.lengths, **self._tensors}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Lifecycle.load_state_dict`."""
        own = self.state_dict()
        if state.keys() != own.keys() or any(state[name].shape != x.shape for name, x in own.items()):
            got = {name: list(x.shape) for name, x in state.items()}
            raise bad_value("state", got, str({name: list(x.shape) for name, x in own.items()}))
        for name, x in own.items():
            x.copy_(state[name])
        self._bound = int(self.lengths.max())

    def _check_rows(self, name: str, rows: Rows | Tensor) -> list[int]:
        picked = integers(name, rows).reshape(-1).tolist()
        for row in picked:
            if not 0 <= row < self.batch:
                raise bad_value(name, row, f"0 to {self.batch - 1}, the sequences of this cache")
        return picked
