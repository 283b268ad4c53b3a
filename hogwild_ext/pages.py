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
    """Numbered pages with a count of the tables that hold each of them, and of the tokens in them.

    The tables are the truth and the pool follows from them: `rebuild` restores it after anything.
    The lowest free page is always handed out first. So equal tables mean equal futures, and
    memory that the operating system commits on first touch is touched late.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._clear()

    def _clear(self) -> None:
        self._holders = np.zeros(self._count, np.int32)  # tables that hold each page
        self._returned: list[int] = []  # a heap: the free pages in front of
        self._untouched = 0  # the first of those that were never taken
        # page -> rows -> tables that end in the page behind so many rows, if it has more
        self._ends: dict[int, dict[int, int]] = {}
        self._stored = 0

    @property
    def count(self) -> int:
        """All pages there are."""
        return self._count

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._returned) + self._count - self._untouched

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self._count - self.free

    @property
    def stored(self) -> int:
        """Tokens in the pages; what tables share counts once."""
        return self._stored

    def holders(self, page: int) -> int:
        """How many tables hold `page`."""
        return int(self._holders[page])

    def free_pages(self) -> list[int]:
        """Those that nobody holds, in ascending order."""
        return [*sorted(self._returned), *range(self._untouched, self._count)]

    def grow(
        self, table: PageTable, length: int, count: int
    ) -> tuple[PageTable, tuple[int, int] | None]:
        """A table with room for `count` (> 0) tokens behind its `length`, instead of `table`.

        If they start in the middle of a page that another table holds too, the new table has a
        fresh page in its place, and its content must be copied: returned as (from, to), else None.
        Raises `PagesExhausted`.
        """
        rows = length % PAGE_SIZE
        split = rows > 0 and self.holders(last := int(table[-1])) > 1
        missing = pages_for(length + count) - len(table) + split
        grown, fresh, copy = table, self._take(missing) if missing else EMPTY_TABLE, None
        if split:
            self._stored -= self._tokens_in([last])
            self._holders[last] -= 1
            self._note_end(table, length, -1)
            self._stored += self._tokens_in([last]) + rows
            grown, copy = table[:-1], (last, int(fresh[0]))
        else:
            self._note_end(table, length, -1)
        if missing:
            grown = np.concatenate((grown, fresh))
        self._note_end(grown, length + count, 1)
        self._stored += count  # nobody else holds the pages that they are in
        return grown, copy

    def cut(self, table: PageTable, length: int, keep: int) -> PageTable:
        """A table of the first `keep` of `length` tokens, instead of `table`.

        Pages that nobody holds any more are free.
        """
        pages = pages_for(keep)
        dropped = table[pages:]
        touched = table[max(pages - 1, 0) :].tolist()
        self._stored -= self._tokens_in(touched)
        self._note_end(table, length, -1)
        self._holders[dropped] -= 1
        for page in dropped[self._holders[dropped] == 0].tolist():
            heapq.heappush(self._returned, page)
        kept = table[:pages]
        self._note_end(kept, keep, 1)
        self._stored += self._tokens_in(touched)
        return kept

    def share(self, table: PageTable, length: int) -> None:
        """One more table is like this one, of `length` tokens."""
        self._holders[table] += 1
        self._note_end(table, length, 1)

    def rebuild(self, tables: Iterable[tuple[PageTable, int]]) -> None:
        """The pool as it follows from all tables and their lengths."""
        self._clear()
        for table, length in tables:
            self.share(table, length)
        used = np.flatnonzero(self._holders)
        self._untouched = int(used[-1]) + 1 if len(used) else 0
        # In ascending order it is a heap.
        self._returned = np.flatnonzero(self._holders[: self._untouched] == 0).tolist()
        missing = sum(PAGE_SIZE - self._tokens_in([page]) for page in self._ends)
        self._stored = PAGE_SIZE * self.used - missing

    def _take(self, count: int) -> PageTable:
        """`count` free pages for one table."""
        if count > self.free:
            raise PagesExhausted
        again = [heapq.heappop(self._returned) for _ in range(min(count, len(self._returned)))]
        new = range(self._untouched, self._untouched + count - len(again))
        self._untouched = new.stop
        pages = np.array([*again, *new], np.int32)
        self._holders[pages] = 1
        return pages

    def _note_end(self, table: PageTable, length: int, change: int) -> None:
        """So many tables more, or less, end like this one."""
        if rows := length % PAGE_SIZE:
            ends = self._ends.setdefault(page := int(table[-1]), {})
            ends[rows] = ends.get(rows, 0) + change
            if not ends[rows]:
                del ends[rows]
                if not ends:
                    del self._ends[page]

    def _tokens_in(self, pages: Iterable[int]) -> int:
        """Tokens in these pages: all rows, unless every table that holds one ends in it."""
        tokens = 0
        for page in pages:
            if holders := self.holders(page):
                ends = self._ends.get(page, {})
                tokens += max(ends) if sum(ends.values()) == holders else PAGE_SIZE
        return tokens
