"""The token ids of a segment, beside the keys and values that they became."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch


class TokenLog:
    """Token ids in the order they were appended, -1 where unknown.

    Ids that came as a tensor on a device stay there until `read`, so that appending and cutting
    never wait for the device.
    """

    def __init__(self, pieces: Sequence[list[int] | torch.Tensor] = ()) -> None:
        self._pieces = list(pieces)

    def extend(self, ids: list[int] | torch.Tensor) -> None:
        """Append `ids`. A list is copied; a tensor [n] is kept and must not change afterwards."""
        if isinstance(ids, torch.Tensor):
            self._pieces.append(ids)
        elif self._pieces and isinstance(last := self._pieces[-1], list):
            last.extend(ids)
        else:
            self._pieces.append(list(ids))

    def extend_from(self, other: TokenLog) -> None:
        """Append what `other` holds; it stays as it is."""
        for piece in other._pieces:
            self.extend(piece)

    def copy(self) -> TokenLog:
        """A log of its own with the same ids."""
        copied = TokenLog()
        copied.extend_from(self)
        return copied

    def head(self, count: int) -> TokenLog:
        """A log of its own with the first `count` ids."""
        copied = TokenLog()
        for piece in self._pieces:
            if count <= 0:
                break
            copied.extend(piece[:count])
            count -= len(piece)
        return copied

    def truncate(self, count: int) -> None:
        """Keep the first `count` ids."""
        self._pieces = self.head(count)._pieces

    def read(self) -> list[int]:
        """The ids as a new list; waits, once, for those that are still on a device."""
        waiting = [piece for piece in self._pieces if isinstance(piece, torch.Tensor)]
        if waiting:
            arrived = iter(torch.cat(waiting).tolist())
            ids: list[int] = []
            for piece in self._pieces:
                ids.extend(piece if isinstance(piece, list) else islice(arrived, len(piece)))
            self._pieces = [ids]
        return list(self._pieces[0]) if self._pieces else []
