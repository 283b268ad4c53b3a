"""`HOGWILD_TEST_GPU=1`: what a test computes on the CPU goes to a GPU, and the results come back.

So the suites of the CPU run on a real GPU as they run on the emulated one (emulator/session.py),
without a word about devices in them. `HOGWILD_TEST_GPU=pretended` sends them to a pretended device
instead (pretended_device.py), on which the CPU's kernels compute: what this module does can then
be tested where there is no GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import pretended_device

if TYPE_CHECKING:
    from hogwild_ext.backends import Backend, Ints, PagedLayers, PlanInput, Scoring, Segments

ASKED = os.environ.get("HOGWILD_TEST_GPU", "0")


def wanted() -> bool:
    return ASKED not in ("", "0")


def is_pretended() -> bool:
    return ASKED == pretended_device.KIND


def start() -> None:
    """Puts the first GPU, or a pretended one, in place of the CPU."""
    from hogwild_ext import backends

    choose = backends.backend_for
    device = torch.device("cuda", 0)
    if is_pretended():
        pretended_device.start()
        device = torch.device(pretended_device.KIND, 0)
        there: Backend = PretendedBackend(choose("device", torch.device("cpu")))
    else:
        there = choose("device", device)
    copying = CopyingBackend(there, device)

    def backend_for(name: str, device: torch.device) -> Any:
        return copying if device.type == "cpu" else choose(name, device)

    for name in ("backends", "ops", "cache"):
        __import__(f"hogwild_ext.{name}")
        sys.modules[f"hogwild_ext.{name}"].backend_for = backend_for  # type: ignore[attr-defined]


class _There(NamedTuple):
    """A copy on the device of all the memory that a tensor of the CPU is a view of."""

    memory: Tensor
    view: Tensor  # the same view of it
    here: Tensor

    def bring_back(self) -> None:
        """The whole memory, so that a write beside the tensor shows."""
        _memory(self.here).copy_(self.memory)


def _memory(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


class CopyingBackend:
    """A device's backend that is given tensors of the CPU.

    A cache's pages stay on the CPU too, where tests look at them: each call takes all of them to
    the device and brings them back.
    """

    def __init__(self, there: Backend, device: torch.device) -> None:
        self._backend = there
        self._device = device

    def _there(self, tensor: Tensor) -> _There:
        memory = _memory(tensor).to(self._device, copy=True)
        view = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return _There(memory, view, tensor)

    @contextmanager
    def _pages_there(self, layers: PagedLayers) -> Iterator[PagedLayers]:
        keys, values = ([self._there(x) for x in side] for side in (layers.keys, layers.values))
        yield replace(
            layers,
            keys=[x.view for x in keys],
            values=[x.view for x in values],
            key_addresses=[x.view.data_ptr() for x in keys],
            value_addresses=[x.view.data_ptr() for x in values],
        )
        for pages in (*keys, *values):
            pages.bring_back()

    # ---- what has nothing to do with tensors -----------------------------------------------------

    def check_head_dims(self, names: tuple[str, str], head_dim: int, value_dim: int) -> None:
        self._backend.check_head_dims(names, head_dim, value_dim)

    def page_shape(self, dtype: int, kv_heads: int, dim: int, is_key: bool) -> tuple[int, ...]:
        return self._backend.page_shape(dtype, kv_heads, dim, is_key)

    def step_memory(self) -> Any:
        return self._backend.step_memory()

    def plan_step(self, layers: PagedLayers, layout: PlanInput) -> Any:
        return self._backend.plan_step(layers, layout)

    def replay(self, plan: Any, captured: Any, graph: Any) -> None:
        self._backend.replay(plan, captured, graph)

    # ---- memory ----------------------------------------------------------------------------------

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def read(
        self, layers: PagedLayers, layer: int, is_key: bool, table: Ints, length: int
    ) -> Tensor:
        with self._pages_there(layers) as there:
            return self._backend.read(there, layer, is_key, table, length).cpu()

    def attend_layer(
        self, plan: Any, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> bool:  # fmt: skip
        rows = [self._there(x) for x in (query, key, value, out)]
        with self._pages_there(layers) as there:
            done = self._backend.attend_layer(plan, there, layer, *(x.view for x in rows), threads)
        rows[3].bring_back()
        return done

    def attend_rows(
        self, layout: PlanInput, dtype: int, query: Tensor, keys: Sequence[Tensor],
        values: Sequence[Tensor], segments: Segments, out: Tensor,
        lse: Tensor | None, scoring: Scoring,
    ) -> None:  # fmt: skip
        keys, values = ([self._there(x).view for x in side] for side in (keys, values))
        segments = segments.copy()
        for row, key, value in zip(segments, keys, values, strict=True):
            row[:2] = key.data_ptr(), value.data_ptr()
        results = [self._there(x) for x in (out, lse) if x is not None]
        self._backend.attend_rows(
            layout, dtype, self._there(query).view, keys, values, segments, results[0].view,
            results[1].view if lse is not None else None, scoring,
        )  # fmt: skip
        for result in results:
            result.bring_back()

    def commit(
        self, layers: PagedLayers, source: Ints, count: int, target: Ints, target_length: int
    ) -> None:
        with self._pages_there(layers) as there:
            self._backend.commit(there, source, count, target, target_length)

    def copy_page(self, layers: PagedLayers, source: int, target: int, rows: int) -> None:
        with self._pages_there(layers) as there:
            self._backend.copy_page(there, source, target, rows)


class PretendedBackend:
    """The CPU's kernels on a pretended device. A tensor that is not there is an AssertionError."""

    def __init__(self, cpu: Backend) -> None:
        self._cpu = cpu

    def __getattr__(self, name: str) -> Any:  # what has nothing to do with tensors
        return getattr(self._cpu, name)

    @staticmethod
    def _behind(layers: PagedLayers) -> PagedLayers:
        keys, values = (
            [pretended_device.tensor_there(x) for x in side]
            for side in (layers.keys, layers.values)
        )
        assert layers.key_addresses == [x.data_ptr() for x in keys]
        assert layers.value_addresses == [x.data_ptr() for x in values]
        return replace(layers, keys=keys, values=values)

    def attend_layer(
        self, plan: Any, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> bool:  # fmt: skip
        rows = [pretended_device.tensor_there(x) for x in (query, key, value, out)]
        return self._cpu.attend_layer(plan, self._behind(layers), layer, *rows, threads)

    def attend_rows(
        self, layout: PlanInput, dtype: int, query: Tensor, keys: Sequence[Tensor],
        values: Sequence[Tensor], segments: Segments, out: Tensor,
        lse: Tensor | None, scoring: Scoring,
    ) -> None:  # fmt: skip
        keys, values = ([pretended_device.tensor_there(x) for x in side] for side in (keys, values))
        addresses = [[k.data_ptr(), v.data_ptr()] for k, v in zip(keys, values, strict=True)]
        assert segments[:, :2].tolist() == addresses
        self._cpu.attend_rows(
            layout, dtype, pretended_device.tensor_there(query), keys, values, segments,
            pretended_device.tensor_there(out),
            None if lse is None else pretended_device.tensor_there(lse), scoring,
        )  # fmt: skip

    def commit(
        self, layers: PagedLayers, source: Ints, count: int, target: Ints, target_length: int
    ) -> None:
        self._cpu.commit(self._behind(layers), source, count, target, target_length)

    def copy_page(self, layers: PagedLayers, source: int, target: int, rows: int) -> None:
        self._cpu.copy_page(self._behind(layers), source, target, rows)

    def read(
        self, layers: PagedLayers, layer: int, is_key: bool, table: Ints, length: int
    ) -> Tensor:
        rows = self._cpu.read(self._behind(layers), layer, is_key, table, length)
        return rows.to(torch.device(pretended_device.KIND, 0))
