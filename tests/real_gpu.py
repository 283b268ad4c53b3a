"""`HOGWILD_TEST_GPU=1`: what a test computes on the CPU goes to a GPU, and the results come back.

So the suites of the CPU run on a real GPU as they run on the emulated one (emulator/session.py),
without a word about devices in them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hogwild_ext.backends import Backend, Ints, PagedLayers, PlanInput, Scoring, Segments


def wanted() -> bool:
    return os.environ.get("HOGWILD_TEST_GPU", "0") not in ("", "0")


def start() -> None:
    """Puts the first GPU in place of the CPU."""
    from hogwild_ext import backends

    choose = backends.backend_for
    gpu = CopyingBackend(choose("device", torch.device("cuda", 0)), torch.device("cuda", 0))

    def backend_for(name: str, device: torch.device) -> Any:
        return gpu if device.type == "cpu" else choose(name, device)

    for name in ("backends", "ops", "cache"):
        __import__(f"hogwild_ext.{name}")
        sys.modules[f"hogwild_ext.{name}"].backend_for = backend_for  # type: ignore[attr-defined]


class CopyingBackend:
    """A GPU's backend that is given tensors of the CPU."""

    def __init__(self, gpu: Backend, device: torch.device) -> None:
        self._gpu = gpu
        self._device = device

    def __getattr__(self, name: str) -> Any:  # what has nothing to do with tensors
        return getattr(self._gpu, name)

    def _there(self, tensor: Tensor) -> Tensor:
        """A copy of all the memory that `tensor` is a view of, and the same view of it."""
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        there = memory.to(self._device, copy=True)
        return there.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _back(self, there: Tensor, here: Tensor) -> None:
        """The whole memory, so that a write beside the tensor shows."""
        memory = torch.empty(0, dtype=here.dtype).set_(here.untyped_storage())
        memory.copy_(torch.empty(0, dtype=here.dtype, device=there.device).set_(
            there.untyped_storage()
        ))  # fmt: skip

    @contextmanager
    def _pages_there(self, layers: PagedLayers) -> Iterator[PagedLayers]:
        keys, values = ([self._there(x) for x in side] for side in (layers.keys, layers.values))
        yield replace(
            layers,
            keys=keys,
            values=values,
            key_addresses=[x.data_ptr() for x in keys],
            value_addresses=[x.data_ptr() for x in values],
        )
        for there, here in zip((*keys, *values), (*layers.keys, *layers.values), strict=True):
            self._back(there, here)

    def attend_layer(
        self, plan: Any, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> bool:  # fmt: skip
        rows = [self._there(x) for x in (query, key, value, out)]
        with self._pages_there(layers) as there:
            done = self._gpu.attend_layer(plan, there, layer, *rows, threads)
        self._back(rows[3], out)
        return done

    def attend_rows(
        self, layout: PlanInput, dtype: int, query: Tensor, keys: Sequence[Tensor],
        values: Sequence[Tensor], segments: Segments, out: Tensor,
        lse: Tensor | None, scoring: Scoring,
    ) -> None:  # fmt: skip
        keys, values = ([self._there(x) for x in side] for side in (keys, values))
        segments = segments.copy()
        for row, key, value in zip(segments, keys, values, strict=True):
            row[:2] = key.data_ptr(), value.data_ptr()
        results = [(x, self._there(x)) for x in (out, lse) if x is not None]
        out_there, *lse_there = (there for _, there in results)
        self._gpu.attend_rows(
            layout, dtype, self._there(query), keys, values, segments, out_there,
            lse_there[0] if lse_there else None, scoring,
        )  # fmt: skip
        for here, there in results:
            self._back(there, here)

    def commit(
        self, layers: PagedLayers, source: Ints, count: int, target: Ints, target_length: int
    ) -> None:
        with self._pages_there(layers) as there:
            self._gpu.commit(there, source, count, target, target_length)

    def copy_page(self, layers: PagedLayers, source: int, target: int, rows: int) -> None:
        with self._pages_there(layers) as there:
            self._gpu.copy_page(there, source, target, rows)
