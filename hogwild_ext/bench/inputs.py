"""Tensors of a cell, and what a worker's view holds when it is a cache of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def caches(self) -> tuple[Tensor, Tensor]:
        """Keys, rotated along the views, and values: [W, Hkv, context, D] each."""
        heads = self.cell.heads
        shape = (self.workers, heads.kv_heads, self.cell.context, heads.head_dim)
        keys, values = self.query.new_empty(shape), self.query.new_empty(shape)
        for w, view in enumerate(self.layout.views):
            rotated = rotate(torch.cat([self.keys[segment] for segment in view]), self.inv_freq)
            keys[w] = rotated.transpose(0, 1)
            values[w] = torch.cat([self.values[segment] for segment in view]).transpose(0, 1)
        return keys, values

    def view_query(self, worker: int) -> Tensor:
        """[new tokens, Hq, D], rotated to the end of the view."""
        begin = sum(self.layout.query_lengths[:worker])
        new = self.layout.query_lengths[worker]
        query = self.query[begin : begin + new]
        return rotate(query, self.inv_freq, self.cell.context - new)

    def view_queries(self) -> Tensor:
        """[T, Hq, D], worker after worker."""
        return torch.cat([self.view_query(w) for w in range(self.workers)])
