"""The CUDA backend on the emulated GPU: tensors of the CPU stand for the GPU's, and the memory of
each call is made known to the sanitizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hogwild_ext.backends import Ints, PagedLayers, PlanInput, Scoring
from hogwild_ext.cuda_backend import CudaBackend, DeviceStep

from .engine import Engine
from .runtime import Call, Runtime


def span(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes from the first to the last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


class EmulatedBackend(CudaBackend):
    """Raises AssertionError after a call in which the sanitizer found something."""

    def __init__(self, engine: Engine, runtime: Runtime) -> None:
        super().__init__(torch.device("cpu"))
        self._engine = engine
        self._runtime = runtime
        self._storages: dict[int, Any] = {}
        self._captured: list[tuple[Sequence[Tensor], Tensor]] = []  # inputs and output of a layer

    def _send(self, data: bytes, to: Tensor) -> None:
        to.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _stream(self) -> int:
        return 0

    def _current(self) -> Any:
        return nullcontext()

    def _is_capturing(self) -> bool:
        return self._runtime.is_capturing

    # ---- memory ---------------------------------------------------------------------------------

    def _watch(self, layers: PagedLayers) -> None:
        """Page storage is known from its first use on, and keeps what is written into it."""
        key = id(layers)
        if key in self._storages:
            return
        addresses = []
        for storage in (*layers.keys, *layers.values):
            address, size = span(storage)
            self._engine.register(address, size, initialised=False)
            addresses.append(address)
        self._storages[key] = weakref.finalize(layers, self._forget, key, addresses)

    def _forget(self, key: int, addresses: list[int]) -> None:
        del self._storages[key]
        for address in addresses:
            self._engine.unregister(address)

    def _calling(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None]) -> Any:
        return self._engine.calling(
            [span(t) for t in inputs], [span(t) for t in outputs if t is not None]
        )

    # ---- calls ----------------------------------------------------------------------------------

    def attend_layer(
        self, plan: DeviceStep, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> bool:  # fmt: skip
        self._watch(layers)
        with self._calling([plan.on_device, query, key, value], [out, plan.workspace]):
            done = super().attend_layer(plan, layers, layer, query, key, value, out, threads)
        if not done:
            self._captured.append(((query, key, value), out))
        return done

    def replay(self, plan: DeviceStep, captured: DeviceStep, graph: Any) -> None:
        with self._calling([plan.on_device], [plan.workspace]):
            super().replay(plan, captured, graph)

    def _attend_rows(
        self, step: DeviceStep, layout: PlanInput, dtype: int, query: Tensor,
        keys: Sequence[Tensor], values: Sequence[Tensor], out: Tensor, lse: Tensor | None,
        scoring: Scoring,
    ) -> None:  # fmt: skip
        inputs = [step.on_device, query, *keys, *values]
        with self._calling(inputs, [out, lse, step.workspace]):
            super()._attend_rows(step, layout, dtype, query, keys, values, out, lse, scoring)

    def _launch_move(
        self, layers: PagedLayers, tables: Tensor, count: int, target_length: int
    ) -> None:
        self._watch(layers)
        with self._calling([tables], []):
            super()._launch_move(layers, tables, count, target_length)

    def read(
        self, layers: PagedLayers, layer: int, is_key: bool, table: Ints, length: int
    ) -> Tensor:
        return super().read(layers, layer, is_key, np.ascontiguousarray(table), length)

    # ---- graphs ---------------------------------------------------------------------------------

    @contextmanager
    def capture(self) -> Iterator[EmulatedGraph]:
        """A graph of the layers that are attended in the block, on the tensors given there."""
        graph, self._captured = EmulatedGraph(self), []
        with self._runtime.capture() as calls:
            yield graph
        graph.calls, graph.layers = calls, self._captured

    def run(self, graph: EmulatedGraph) -> None:
        inputs = [tensor for given, _ in graph.layers for tensor in given]
        with self._calling(inputs, [out for _, out in graph.layers]):
            self._runtime.replay(graph.calls)


class EmulatedGraph:
    """What `torch.cuda.CUDAGraph` is to a GPU."""

    def __init__(self, backend: EmulatedBackend) -> None:
        self._backend = backend
        self.calls: list[Call] = []
        self.layers: list[tuple[Sequence[Tensor], Tensor]] = []

    def replay(self) -> None:
        self._backend.run(self)
