"""Which pages are free, which are in use and by how many segments: numbers only, no bytes.

A page holds `PAGE_SIZE` tokens of all KV heads. Token `l` of a segment lies in row
`l % PAGE_SIZE` of the page `table[l // PAGE_SIZE]`, and one table serves all layers. Tables are
never changed in place: a segment that grows gets a new one, so that going back is easy.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ._C import PAGE_SIZE

PageTable = npt.NDArray[np.int32]

EMPTY_TABLE: PageTable = np.zeros(0, np.int32)


class PagesExhausted(Exception):
    """More pages were asked for than are free. The cache turns it into its own error."""


def pages_for(tokens: int) -> int:
    """How many pages `tokens` tokens take."""
    return -(-tokens // PAGE_SIZE)


class PagePool:
    """Numbered pages with a count of the tables that hold each of them.

    The tables are the truth and the pool follows from them: `rebuild` restores it after anything.
    The lowest free page is always handed out first. So equal tables mean equal futures, and
    memory that the operating system commits on first touch is touched late.
    """

    def __init__(self, count: int) -> None:
        self._holders = np.zeros(count, np.int32)  # tables that hold each page
        self._free = list(range(count))  # a heap

    @property
    def count(self) -> int:
        """All pages there are."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.free

    def holders(self, page: int) -> int:
        """How many tables hold `page`."""
        return int(self._holders[page])

    def take(self, count: int) -> PageTable:
        """`count` free pages for one table; raises `PagesExhausted` if there are fewer."""
        if count > self.free:
            raise PagesExhausted
        pages = np.array([heapq.heappop(self._free) for _ in range(count)], np.int32)
        self._holders[pages] = 1
        return pages

    def share(self, pages: PageTable) -> None:
        """One more table holds `pages`."""
        self._holders[pages] += 1

    def release(self, pages: PageTable) -> None:
        """One table less holds `pages`; those that nobody holds any more are free."""
        self._holders[pages] -= 1
        for page in pages[self._holders[pages] == 0].tolist():
            heapq.heappush(self._free, page)

    def grow(
        self, table: PageTable, length: int, count: int
    ) -> tuple[PageTable, tuple[int, int] | None]:
        """A table with room for `count` (> 0) tokens behind the first `length`.

        If they start in the middle of a page that another table holds too, the new table has a
        fresh page in its place, and its content must be copied: returned as (from, to), else None.
        Raises `PagesExhausted`.
        """
        split = length % PAGE_SIZE > 0 and self._holders[table[-1]] > 1
        missing = pages_for(length + count) - len(table)
        if not split:
            return np.concatenate((table, self.take(missing))) if missing else table, None
        fresh = self.take(missing + 1)
        self.release(table[-1:])
        return np.concatenate((table[:-1], fresh)), (int(table[-1]), int(fresh[0]))

    def stored_tokens(self, tables: Iterable[tuple[PageTable, int]]) -> int:
        """Tokens in use, given every table with its length; what tables share counts once."""
        last_pages: dict[int, tuple[int, int]] = {}  # page -> tables that end in it, most rows
        for table, length in tables:
            if rows := length % PAGE_SIZE:
                ending, most = last_pages.get(page := int(table[-1]), (0, 0))
                last_pages[page] = ending + 1, max(most, rows)
        unused = sum(
            PAGE_SIZE - most
            for page, (ending, most) in last_pages.items()
            if ending == self._holders[page]
        )
        return PAGE_SIZE * self.used - unused

    def rebuild(self, tables: Iterable[PageTable]) -> None:
        """The pool as it follows from `tables`. Where it does already, nothing is in motion."""
        holders = np.zeros_like(self._holders)
        for table in tables:
            holders[table] += 1
        free: list[int] = np.flatnonzero(holders == 0).tolist()
        self._holders, self._free = holders, free
