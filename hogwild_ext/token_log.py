"""The token ids of a segment, beside the keys and values that they became."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import torch

BLOCK = 256
"""Ids that lie together at most: what appending a single one may copy."""


class TokenLog:
    """Token ids in the order they were appended, -1 where unknown. A log never changes.

    A longer one shares the ids of the shorter one that it was made from, and so does a shorter one:
    neither appending nor cutting takes longer the more there are. Ids that came as a tensor on a
    device stay there until `read`, so that neither of them waits for the device.
    """

    __slots__ = ("_before", "_ids", "length")

    def __init__(
        self, before: TokenLog | None = None, ids: list[int] | torch.Tensor | None = None
    ) -> None:
        self._before = before
        self._ids: list[int] | torch.Tensor = [] if ids is None else ids
        self.length: int = len(self._ids) + (0 if before is None else before.length)

    def extended(self, ids: list[int] | torch.Tensor) -> TokenLog:
        """With `ids` at the end: a list, or a tensor [n], which must not change afterwards."""
        if len(ids) == 0:
            return self
        if isinstance(ids, torch.Tensor):
            return TokenLog(self if self.length else None, ids)
        log: TokenLog | None = self
        if isinstance(self._ids, list) and len(self._ids) < BLOCK:
            log, ids = self._before, self._ids + ids
        for start in range(0, len(ids), BLOCK):
            log = TokenLog(log, ids[start : start + BLOCK])
        assert log is not None
        return log

    def joined(self, other: TokenLog) -> TokenLog:
        """With the ids of `other` at the end."""
        if not self.length:
            return other
        log = self
        for piece in other.pieces():
            log = log.extended(piece)
        return log

    def head(self, count: int) -> TokenLog:
        """The first `count` ids."""
        log: TokenLog | None = self
        while log is not None and log.length - len(log._ids) >= count:
            log = log._before
        if log is None:
            return TokenLog()
        if log.length <= count:
            return log
        return TokenLog(log._before, log._ids[: count - log.length])

    def pieces(self) -> Iterator[list[int] | torch.Tensor]:
        """The ids as they are kept, in their order."""
        return (log._ids for log in reversed(self._logs()))

    def read(self) -> list[int]:
        """The ids as a new list; waits, once, for those that are still on a device."""
        waiting = [(log, ids) for log in self._logs() if isinstance(ids := log._ids, torch.Tensor)]
        if waiting:
            arrived = iter(torch.cat([ids for _, ids in waiting]).tolist())
            for log, ids in waiting:
                log._ids = list(islice(arrived, len(ids)))
        return list(chain.from_iterable(self.pieces()))

    def _logs(self) -> list[TokenLog]:
        """This one and those that it goes on from, back to the first."""
        logs, log = [], self
        while True:
            logs.append(log)
            if log._before is None:
                return logs
            log = log._before
