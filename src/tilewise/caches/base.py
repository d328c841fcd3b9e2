"""The protocol of caches, and what the layouts share: lengths, how much the host knows of them, checks.

Lengths live on the device, where a captured graph can move them on. The host keeps an upper bound beside them, which
is exact as long as every append was seen by it. It is read back only where the bound says "full" and is not exact, or
where a fork, trim or reservation needs to know; `append` inside a graph or a compiled function never asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from tilewise.caches.contents import KV
from tilewise.errors import bad_type, bad_value
from tilewise.ops import checks
from tilewise.ops.append import append_kv
from tilewise.ops.views import KVView

Rows = int | Sequence[int]
"""One sequence of the batch, or several."""


class Lifecycle(Protocol):
    """What every cache can do, whatever it remembers of its sequences (keys and values, or a recurrent state)."""

    @property
    def batch(self) -> int:
        """B: how many sequences there is room for."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[B] int32 on the cache's device: tokens that each sequence has seen."""
        ...

    @property
    def max_length(self) -> int:
        """An upper bound of `lengths` that the host knows without asking the device."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered, as the cost model counts them: without lengths and page tables."""
        ...

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Sequence b becomes what sequence `indices[b]` was: the step of a beam search."""
        ...

    def fork(self, source: int, destinations: Rows, tokens: int | None = None) -> None:
        """The destinations become copies of `source`, or of its first `tokens` tokens."""
        ...

    def trim(self, lengths: Rows | Tensor) -> None:
        """Forget the tokens from `lengths` (one for all, or one each) on: the step after a rejected draft."""
        ...

    def free(self, rows: Rows) -> None:
        """Forget these sequences; their places can be appended to again, but not forked from until then."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is remembered, as tensors."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` of a cache of the same make gave."""
        ...


class Cache(Lifecycle, Protocol):
    """A cache of keys and values. `attention_decode(q, cache)` reads it through `view()`."""

    def append(self, k: Tensor, v: Tensor | None = None, *, counts: Sequence[int] | Tensor | None = None) -> None:
        """Add T tokens to each sequence, k [B, Hkv, T, D] and v [B, Hkv, T, Dv]; or its first `counts[b]` ≤ T of them.

        Raises ValueError or TypeError, with the cache as it was, if it is full or the tensors do not fit it.
        """
        ...

    def view(self) -> KVView:
        """The tensors as kernels see them; no copy."""
        ...


def integers(name: str, values: object) -> np.ndarray:
    """An integer, or integers, as int64; TypeError for anything else, fractions and booleans included."""
    if isinstance(values, Tensor):
        values = values.tolist()
    elif isinstance(values, Iterable) and not isinstance(values, str | np.ndarray):
        values = list(values)
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise bad_type(name, repr(values), "integers")
    return array.astype(np.int64)


class SlotCache:
    """`Cache` for all layouts in which a token has a slot: dense, rolling and paged say where it is."""

    def __init__(
        self,
        contents: KV,
        batch: int,
        capacity: int,
        pools: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """`pools`: how many pages of how many tokens are there."""
        if not isinstance(contents, KV):
            raise bad_type("contents", contents, "KV, Latent or Int8", "KV(kv_heads, head_dim)")
        checks.whole(batch=batch, capacity=capacity)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise bad_type("dtype", str(dtype), "a floating-point dtype", "Int8 contents store int8")
        self.contents = contents
        self.capacity = capacity
        self.dtype = dtype
        place = torch.device(device)
        with torch.inference_mode(False):  # whose tensors nothing outside of it may write to
            self.pools = contents.pools(*pools, dtype, place)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=place)
        self.device = self.pools.k.device
        self.start: Tensor | None = None
        self._held = np.zeros(batch, np.int64)
        self._exact = True
        self._unseen = False
        """Appends may happen that the host does not see: replays of a graph, calls of a compiled function."""
        self._freed: set[int] = set()

    ring = False

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def max_length(self) -> int:
        return self.capacity if self._unseen else int(self._held.max())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.pools.tensors().values())

    @property
    def page_table(self) -> Tensor | None:
        return None

    def view(self) -> KVView:
        k, v, k_scale, v_scale = self.pools
        table, bound = self.page_table, self.max_length
        return KVView(k, v, self.lengths, table, k_scale, v_scale, self.start, self.ring, bound, self.contents.v_dim)

    def append(self, k: Tensor, v: Tensor | None = None, *, counts: Sequence[int] | Tensor | None = None) -> None:
        """See `Cache.append`. Inside a captured graph or a compiled function nothing can be raised for a full cache:
        tokens that find no room are dropped there. From then on an append that the host does see reads the lengths
        first."""
        self.contents.check(k, v, self.batch, self.dtype, self.device)
        tokens = k.shape[2]
        if torch.compiler.is_compiling() or (k.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._unseen = True
            append_kv(self.view(), k, v, self._device_counts(counts))
            return
        added = self._host_counts(counts, tokens)
        if self._unseen:
            self._settle()
        self._make_room(added)
        append_kv(self.view(), k, v, self._device_counts(counts))
        self._held += added
        if isinstance(counts, Tensor) and counts.device.type != "cpu":
            self._exact = False
        if self._freed:
            self._freed.difference_update(np.flatnonzero(added).tolist())

    def expect_graphs(self) -> None:
        """Say that appends will happen which the host does not see. `max_length` is the capacity from now on, so that a
        warm-up step takes the plan, and compiles the kernels, of the step that is captured after it."""
        self._unseen = True

    def _make_room(self, added: np.ndarray) -> None:
        """Raise ValueError if `added` tokens a sequence do not fit; nothing has changed then."""
        if (self._held + added).max() > self.capacity and not self._exact:
            self._settle()
        after = self._held + added
        if after.max() > self.capacity:
            full = int(after.argmax())
            got = f"{added[full]} more tokens for sequence {full}, which has {self._held[full]}"
            raise bad_value("k", got, f"at most {self.capacity} tokens in all: the cache is full", self._when_full)

    _when_full = "trim or free sequences, or make the cache larger"

    def _host_counts(self, counts: Sequence[int] | Tensor | None, tokens: int) -> np.ndarray:
        """[B] upper bounds of what an append adds; exact unless the counts lie on an accelerator."""
        if counts is None:
            return np.full(self.batch, tokens, np.int64)
        if isinstance(counts, Tensor):
            if counts.dtype != torch.int32:
                raise bad_type("counts", f"dtype {counts.dtype}", "int32", "counts.to(torch.int32)")
            if tuple(counts.shape) != (self.batch,):
                raise bad_value("counts", f"shape {list(counts.shape)}", f"shape [B] = [{self.batch}]")
            if counts.device.type != "cpu":
                return np.full(self.batch, tokens, np.int64)
        added = integers("counts", counts)
        if added.shape != (self.batch,):
            raise bad_value("counts", f"shape {list(added.shape)}", f"shape [B] = [{self.batch}]")
        if (added < 0).any() or (added > tokens).any():
            raise bad_value("counts", counts, f"counts from 0 to the {tokens} tokens given")
        return added

    def _device_counts(self, counts: Sequence[int] | Tensor | None) -> Tensor | None:
        if counts is None:
            return None
        on_host = counts if isinstance(counts, Tensor) else torch.tensor(counts, dtype=torch.int32)
        return on_host.to(self.device, non_blocking=True)

    def _settle(self) -> None:
        """Read the lengths, if the host does not know them."""
        if self._unseen or not self._exact:
            self._held = self.lengths.cpu().numpy().astype(np.int64)
            self._exact = True

    def pad(self, start: Sequence[int] | Tensor) -> None:
        """Say that the tokens before `start` [B] of each sequence are left padding, which nothing will see."""
        if isinstance(start, Tensor) and not start.is_floating_point() and start.dtype != torch.bool:
            starts = start.to(torch.int32)
        else:
            starts = torch.from_numpy(integers("start", start).astype(np.int32))
        if tuple(starts.shape) != (self.batch,):
            raise bad_value("start", f"shape {list(starts.shape)}", f"shape [B] = [{self.batch}]")
        if starts.device.type == "cpu" and bool((starts < 0).any()):
            raise bad_value("start", starts.tolist(), "numbers of tokens, at least 0")
        self._begin(starts)

    def _begin(self, starts: Tensor) -> None:
        """Take these starts, into the tensor that a captured graph may know, and never the caller's own."""
        if self.start is None:
            with torch.inference_mode(False):
                self.start = torch.zeros_like(self.lengths)
        self.start.copy_(starts)

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        rows = integers("indices", indices).reshape(-1).tolist()
        if len(rows) != self.batch:
            raise bad_value("indices", f"{len(rows)} indices", f"one for each of the {self.batch} sequences")
        for row in rows:
            self._alive("indices", row)
        self._settle()
        self._reorder(rows)
        order = torch.tensor(rows, device=self.device)
        self.lengths.copy_(self.lengths[order])
        if self.start is not None:
            self.start.copy_(self.start[order])
        self._held = self._held[rows]
        self._freed.clear()  # whatever stood there is overwritten by a living one

    def _reorder(self, rows: list[int]) -> None:
        """Move or share what the rows hold."""
        raise NotImplementedError

    def fork(self, source: int, destinations: Rows, tokens: int | None = None) -> None:
        self._alive("source", source)
        targets = self._rows("destinations", destinations)
        self._settle()
        held = int(self._held[source])
        count = held if tokens is None else int(integers("tokens", tokens))
        if not 0 <= count <= held:
            raise bad_value("tokens", count, f"0 to {held}, the tokens of sequence {source}")
        targets = [row for row in targets if row != source]
        self._fork(source, targets, count)
        self.lengths[targets] = count
        if self.start is not None:
            self.start[targets] = self.start[source].clone()
        self._held[targets] = count
        self._freed.difference_update(targets)

    def _fork(self, source: int, destinations: list[int], tokens: int) -> None:
        """Copy or share the first `tokens` tokens."""
        raise NotImplementedError

    def trim(self, lengths: Rows | Tensor) -> None:
        """See `Lifecycle.trim`. One length for all is the most that each keeps. Lengths on the device are taken as such
        bounds too, and are not read."""
        if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
            if lengths.dtype != torch.int32 or tuple(lengths.shape) != (self.batch,):
                got = f"{lengths.dtype} of shape {list(lengths.shape)}"
                raise bad_value("lengths", got, f"int32 of shape [B] = [{self.batch}]")
            torch.minimum(self.lengths, lengths.clamp(min=0), out=self.lengths)
            self._exact = False
            return
        wanted = integers("lengths", lengths)
        if wanted.shape not in ((), (self.batch,)):
            raise bad_value("lengths", f"shape {list(wanted.shape)}", f"one length, or one for each of {self.batch}")
        if (wanted < 0).any():
            raise bad_value("lengths", lengths, "lengths of at least 0")
        self._settle()
        if wanted.ndim and (wanted > self._held).any():
            row = int((wanted - self._held).argmax())
            raise bad_value("lengths", int(wanted[row]), f"at most the {self._held[row]} tokens of sequence {row}")
        after = np.minimum(wanted, self._held)
        self._trim(after)
        self.lengths.copy_(torch.from_numpy(after.astype(np.int32)))
        self._held = after

    def _trim(self, lengths: np.ndarray) -> None:
        """Release what only the tokens beyond `lengths` needed; raise where they cannot be forgotten."""

    def free(self, rows: Rows) -> None:
        targets = self._rows("rows", rows)
        self._release(targets)
        self.lengths[targets] = 0
        if self.start is not None:
            self.start[targets] = 0
        self._held[targets] = 0
        self._freed.update(targets)

    def _release(self, rows: list[int]) -> None:
        """Give back what the rows own."""

    def reset(self) -> None:
        self.free(range(self.batch))
        self._freed.clear()
        self.start = None

    def to(self, device: torch.device | str) -> Self:
        with torch.inference_mode(False):
            self.pools = self.pools.map(lambda x: x.to(device))
            self.lengths = self.lengths.to(device)
            self.start = None if self.start is None else self.start.to(device)
        self.device = self.pools.k.device
        return self

    def state_dict(self) -> dict[str, Tensor]:
        state = {**self.pools.tensors(), "lengths": self.lengths}
        return state if self.start is None else {**state, "start": self.start}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = self.state_dict()
        if missing := mine.keys() - state.keys() - {"start"}:
            raise bad_value("state", f"no {', '.join(sorted(missing))}", "the state of a cache of the same make")
        if beyond := state.keys() - mine.keys() - {"start"}:
            raise bad_value("state", f"{', '.join(sorted(beyond))}", "the state of a cache of the same make")
        for name, x in mine.items():
            if name != "start" and (state[name].shape != x.shape or state[name].dtype != x.dtype):
                got = f"{name} of shape {list(state[name].shape)}, {state[name].dtype}"
                raise bad_value("state", got, f"shape {list(x.shape)}, {x.dtype}")
        if "start" in state and (state["start"].shape != self.lengths.shape or state["start"].dtype != torch.int32):
            got = f"start of shape {list(state['start'].shape)}, {state['start'].dtype}"
            raise bad_value("state", got, f"shape {list(self.lengths.shape)}, torch.int32")
        for name, x in mine.items():
            if name != "start":
                x.copy_(state[name])
        if "start" in state:
            self._begin(state["start"])
        else:
            self.start = None
        self._held = self.lengths.cpu().numpy().astype(np.int64)
        self._exact = True
        self._freed.clear()

    def _rows(self, name: str, rows: Rows | Iterable[int]) -> list[int]:
        found = integers(name, rows).reshape(-1).tolist()
        for row in found:
            if not 0 <= row < self.batch:
                raise bad_value(name, row, f"sequences from 0 to {self.batch - 1}")
        if len(set(found)) != len(found):
            raise bad_value(name, found, "different sequences")
        return found

    def _alive(self, name: str, row: int) -> None:
        self._rows(name, row)
        if row in self._freed:
            raise bad_value(name, row, "a sequence that was not freed", "append to it first, or fork another into it")
