"""The paged cache: sequences own pages of one pool, and share those that they have in common (vLLM, Kwon et al. 2023).

Which page holds what is bookkeeping of the host: a list of pages a sequence, the number of sequences that use each
page, and a stack of pages that nobody uses. The device sees the outcome as a table. A page is written to only by its
sole user: where a shared page is about to be, its content is copied first (copy on write).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tilewise.caches.base import SlotCache, integers
from tilewise.caches.contents import KV
from tilewise.errors import bad_value
from tilewise.ops import checks

ABSENT = -1


class PagedCache(SlotCache):
    """`batch` sequences over one pool of `pages` pages of `page_size` tokens.

    An append takes the pages that it needs, or raises if there are too few and changes nothing. `reserve` takes them
    ahead of time, which is what a captured graph needs: its appends happen without the host.

    Args:
        contents: what one token is, as for `DenseCache`.
        batch: B, sequences at a time.
        pages: of the pool.
        page_size: tokens of one page, any number from 1; kernels are fastest where it is a multiple of 64.
        capacity: most tokens of one sequence; the whole pool by default. It sets the width of the page table.
        dtype, device: as for `DenseCache`.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        contents: KV,
        batch: int,
        pages: int,
        page_size: int = 64,
        capacity: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        checks.whole(pages=pages, page_size=page_size)
        if capacity is not None:
            checks.whole(capacity=capacity)
        columns = pages if capacity is None else -(-capacity // page_size)
        super().__init__(contents, batch, columns * page_size, (pages, page_size), dtype, device)
        self.page_size = page_size
        with torch.inference_mode(False):
            self._table = torch.full((batch, columns), ABSENT, dtype=torch.int32, device=self.device)
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._users = np.zeros(pages, np.int64)
        self._unused = list(range(pages - 1, -1, -1))

    @property
    def page_table(self) -> Tensor:
        return self._table

    @property
    def free_pages(self) -> int:
        """Pages that no sequence uses."""
        return len(self._unused)

    def pages_of(self, row: int) -> tuple[int, ...]:
        """The pages of a sequence, in order."""
        self._rows("row", row)
        return tuple(self._pages[row])

    def reserve(self, tokens: int | Sequence[int]) -> None:
        """Take the pages for `tokens` more tokens of every sequence (or one number each), so that appends need none.

        A trim gives back what lies beyond the tokens that it keeps, reserved or not. While a graph uses the reservation
        sequences that share pages must not be trimmed, on the device, below their lengths at the time of this call.

        Raises ValueError, with the cache as it was, if the pool has too few or a sequence would exceed the capacity.
        """
        wanted = integers("tokens", tokens)
        if wanted.shape not in ((), (self.batch,)):
            raise bad_value("tokens", f"shape {list(wanted.shape)}", f"one number, or one for each of {self.batch}")
        wanted = np.broadcast_to(wanted, (self.batch,))
        if (wanted < 0).any():
            raise bad_value("tokens", tokens, "numbers of at least 0")
        self._settle()
        self._make_room(wanted)

    def _make_room(self, added: np.ndarray) -> None:
        super()._make_room(added)
        if not self._exact and (self._users.max() > 1 or len(self._needed(added)) > self.free_pages):
            # Sequences may be shorter than the bound says, and their next token may belong into a shared page.
            self._settle()
        needed = self._needed(added)
        if len(needed) > self.free_pages:
            got = f"tokens that need {len(needed)} more pages"
            want = f"at most the {self.free_pages} unused of {len(self._users)} pages: the pool is full"
            raise bad_value("k", got, want, "free or trim sequences, or make the pool larger")
        if needed:
            self._take(needed)

    def _needed(self, added: np.ndarray) -> list[tuple[int, int]]:
        """(sequence, index) of the pages to take: those that are missing, and shared ones that will be written to."""
        users: Counter[int] = Counter()
        needed: list[tuple[int, int]] = []
        for row in np.flatnonzero(added).tolist():
            held, own = int(self._held[row]), self._pages[row]
            for index in range(held // self.page_size, -(-(held + int(added[row])) // self.page_size)):
                if index >= len(own):
                    needed.append((row, index))
                elif self._users[own[index]] - users[own[index]] > 1:
                    users[own[index]] += 1
                    needed.append((row, index))
        return needed

    def _take(self, needed: list[tuple[int, int]]) -> None:
        sources, copies, entries = [], [], []
        for row, index in needed:
            page, own = self._unused.pop(), self._pages[row]
            self._users[page] = 1
            entries.append((row, index, page))
            if index == len(own):
                own.append(page)
            else:
                sources.append(own[index])
                copies.append(page)
                self._users[own[index]] -= 1
                own[index] = page
        if copies:
            source, copy = self._upload([sources, copies])
            for pool in self.pools.tensors().values():
                pool[copy] = pool[source]
        row, index, page = self._upload(list(zip(*entries, strict=True)))
        self._table[row, index] = page.to(torch.int32)

    def _upload(self, numbers: list) -> Tensor:
        """Integers as an int64 tensor on the device; from pinned memory, so that the host does not wait."""
        on_host = torch.tensor(numbers)
        if self.device.type == "cuda":
            on_host = on_host.pin_memory()
        return on_host.to(self.device, non_blocking=True)

    def _drop(self, row: int, keep: int) -> None:
        """Give back all but the first `keep` pages of a sequence."""
        dropped = self._pages[row][keep:]
        self._pages[row] = self._pages[row][:keep]
        for page in dropped:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._unused.append(page)
        if dropped:
            self._table[row, keep : keep + len(dropped)] = ABSENT

    def _filled(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _trim(self, lengths: np.ndarray) -> None:
        for row, length in enumerate(lengths.tolist()):
            self._drop(row, self._filled(length))

    def _release(self, rows: list[int]) -> None:
        for row in rows:
            self._drop(row, 0)

    def _fork(self, source: int, destinations: list[int], tokens: int) -> None:
        shared = self._pages[source][: self._filled(tokens)]
        for row in destinations:
            self._drop(row, 0)
            self._pages[row] = list(shared)
            self._users[shared] += 1
            self._table[row, : len(shared)] = self._table[source, : len(shared)]

    def _reorder(self, rows: list[int]) -> None:
        self._pages = [self._pages[row][: self._filled(int(self._held[row]))] for row in rows]
        self._recount()

    def _recount(self) -> None:
        """Users, unused pages and the table from the lists of pages."""
        self._users[:] = 0
        table = np.full(tuple(self._table.shape), ABSENT, np.int32)
        for row, own in enumerate(self._pages):
            self._users[own] += 1
            table[row, : len(own)] = own
        self._unused = np.flatnonzero(self._users == 0)[::-1].tolist()
        self._table.copy_(torch.from_numpy(table))

    def to(self, device: torch.device | str) -> PagedCache:
        super().to(device)
        with torch.inference_mode(False):
            self._table = self._table.to(self.device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "page_table": self._table}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        table, pages = state.get("page_table"), len(self._users)
        if table is not None and bool(((table < ABSENT) | (table >= pages)).any()):
            want = f"pages from 0 to {pages - 1}, or {ABSENT} for none"
            raise bad_value("state", "a page_table with pages outside the pool", want)
        super().load_state_dict(state)
        self._pages = [[page for page in row if page != ABSENT] for row in self._table.tolist()]
        self._recount()
