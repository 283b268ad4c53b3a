"""Tensors of a cell, and what a worker's view holds when it is a cache of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import rotate
from .grid import Cell, Layout


@dataclass
class Inputs:
    """Standard normal keys, values and queries of a cell.

    A worker's view as one cache has its keys rotated along the view, so that its queries, rotated
    to their places behind it, attend as they do to the segments.
    """

    cell: Cell
    layout: Layout
    device: torch.device
    inv_freq: Tensor  # [D / 2], on the host
    keys: list[Tensor]  # [L, Hkv, D] a segment, new tokens included; not rotated
    values: list[Tensor]
    query: Tensor  # [T, Hq, D], worker after worker; not rotated
    _rotated: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @staticmethod
    def make(cell: Cell, device: torch.device) -> Inputs:
        """Raises ValueError for a cell whose context is too short."""
        heads, dtype = cell.heads, getattr(torch, cell.dtype)
        layout = cell.layout()
        generator = torch.Generator(device).manual_seed(0)

        def normal(tokens: int, count: int) -> Tensor:
            shape = (tokens, count, heads.head_dim)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return Inputs(
            cell,
            layout,
            device,
            1e4 ** (-torch.arange(0, heads.head_dim, 2) / heads.head_dim),
            [normal(n, heads.kv_heads) for n in layout.lengths],
            [normal(n, heads.kv_heads) for n in layout.lengths],
            normal(sum(layout.query_lengths), heads.num_heads),
        )

    @property
    def workers(self) -> int:
        return self.cell.workers

    @property
    def even(self) -> int | None:
        """New tokens of each worker, if they all bring as many."""
        return self.layout.query_lengths[0] if len(set(self.layout.query_lengths)) == 1 else None

    @property
    def shared_tokens(self) -> int:
        """Tokens at the head of the views that are the same, at the same places, for everybody."""
        count = 0
        for segments in zip(*self.layout.views, strict=True):
            if len(set(segments)) > 1 or self.workers == 1:
                break
            count += self.layout.lengths[segments[0]]
        return count

    def new_rows(self, segment: int) -> slice:
        """The new tokens of a segment."""
        owners = [view[-1] for view in self.layout.views]
        length = self.layout.lengths[segment]
        new = self.layout.query_lengths[owners.index(segment)] if segment in owners else 0
        return slice(length - new, length)

    def rotated_keys(self, segment: int, start: int) -> Tensor:
        """[L, Hkv, D]: its keys rotated to start, start + 1, ..."""
        if (segment, start) not in self._rotated:
            self._rotated[segment, start] = rotate(self.keys[segment], self.inv_freq, start)
        return self._rotated[segment, start]

    def view_keys(self, worker: int) -> Tensor:
        """[context, Hkv, D]"""
        starts = self.layout.starts(worker)
        return torch.cat([self.rotated_keys(segment, start) for segment, start in starts])

    def view_values(self, worker: int) -> Tensor:
        """[context, Hkv, D]"""
        return torch.cat([self.values[segment] for segment in self.layout.views[worker]])

    def view_query(self, worker: int) -> Tensor:
        """[new tokens, Hq, D], rotated to the end of the view."""
        begin = sum(self.layout.query_lengths[:worker])
        new = self.layout.query_lengths[worker]
        query = self.query[begin : begin + new]
        return rotate(query, self.inv_freq, self.cell.context - new)

    def view_queries(self) -> Tensor:
        """[T, Hq, D], worker after worker."""
        return torch.cat([self.view_query(w) for w in range(self.workers)])
