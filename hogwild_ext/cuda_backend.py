"""The CUDA backend: tables to the device once a step, then one launch after the other.

Everything runs on torch's current stream of the tensors' device. Inside a layer nothing is copied
to the device, nothing is waited for, and nothing but the output is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _C
from .backends import Ints, PagedLayers, PlanInput, Scoring

HEAD_DIMS = (64, 96, 128, 256)


@dataclass(frozen=True)
class DeviceStep:
    """A step's tables on the device, and the memory for partial results."""

    tables: Any  # _C.cuda.Tables
    on_device: Tensor
    workspace: Tensor


class CudaBackend:
    """See `backends.Backend`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    # ---- what an emulated device does otherwise -------------------------------------------------

    def _to_device(self, data: bytes) -> Tensor:
        """A copy on the device that the host does not wait for."""
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return host.pin_memory().to(self._device, non_blocking=True)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _current(self) -> Any:
        """Makes the device the current one, for launches."""
        return torch.cuda.device(self._device)

    # ---- shapes ---------------------------------------------------------------------------------

    def check_head_dims(self, names: tuple[str, str], head_dim: int, value_dim: int) -> None:
        dims = ", ".join(map(str, HEAD_DIMS))
        if head_dim not in HEAD_DIMS:
            raise ValueError(
                f"{names[0]}: expected a head dimension of {dims} on a GPU, got {head_dim}"
            )
        if value_dim != head_dim:
            raise ValueError(
                f"{names[1]}: expected the head dimension of the keys, {head_dim}, on a GPU, "
                f"got {value_dim}"
            )

    def page_shape(self, dtype: int, kv_heads: int, dim: int, is_key: bool) -> tuple[int, ...]:
        return (kv_heads, _C.PAGE_SIZE, dim)

    # ---- attention ------------------------------------------------------------------------------

    def _make_step(
        self,
        layout: PlanInput,
        dtype: int,
        head_dim: int,
        padded_queries: int = 0,
        segments: list[tuple[int, ...]] | None = None,
    ) -> DeviceStep:
        plan = layout.plan(_C.cuda.row_group(dtype, head_dim))
        tables = _C.cuda.Tables(plan, layout.kv_heads, padded_queries, segments)
        floats = tables.workspace_floats(layout.kv_heads, head_dim)
        workspace = torch.empty(max(floats, 4), dtype=torch.float32, device=self._device)
        return DeviceStep(tables, self._to_device(tables.bytes), workspace)

    def plan_step(self, layers: PagedLayers, layout: PlanInput) -> DeviceStep:
        with self._current():
            return self._make_step(layout, layers.dtype, layers.head_dim)

    def attend_layer(
        self, plan: DeviceStep, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> None:  # fmt: skip
        tables, address, stream = plan.tables, plan.on_device.data_ptr(), self._stream()
        key_pages, value_pages = layers.key_addresses[layer], layers.value_addresses[layer]
        scoring = layers.scoring
        with self._current():
            _C.cuda.append(
                tables, address, layers.dtype, layers.kv_heads, layers.head_dim,
                (key.data_ptr(), *key.stride()[:2]), (value.data_ptr(), *value.stride()[:2]),
                key_pages, value_pages, scoring.rope_scale, scoring.interleaved, stream,
            )  # fmt: skip
            _C.cuda.attend(
                tables, address, layers.dtype, query.shape[1], layers.kv_heads, layers.head_dim,
                (query.data_ptr(), 0, *query.stride()[:2]), key_pages, value_pages,
                (out.data_ptr(), 0, *out.stride()[:2]), 0, 0, plan.workspace.data_ptr(),
                scoring.scale, scoring.rope_scale, scoring.interleaved, scoring.softcap, stream,
            )  # fmt: skip

    def attend_rows(
        self, layout: PlanInput, dtype: int, query: Tensor, keys: Sequence[Tensor],
        values: Sequence[Tensor], segments: list[tuple[int, ...]], out: Tensor,
        lse: Tensor | None, scoring: Scoring,
    ) -> None:  # fmt: skip
        queries, head_dim = query.shape[1], query.shape[3]
        with self._current():
            step = self._make_step(layout, dtype, head_dim, queries, segments)
            self._attend_rows(step, layout, dtype, query, keys, values, out, lse, scoring)

    def _attend_rows(
        self, step: DeviceStep, layout: PlanInput, dtype: int, query: Tensor,
        keys: Sequence[Tensor], values: Sequence[Tensor], out: Tensor, lse: Tensor | None,
        scoring: Scoring,
    ) -> None:  # fmt: skip
        queries, num_heads, head_dim = query.shape[1:]
        _C.cuda.attend(
            step.tables, step.on_device.data_ptr(), dtype, num_heads, layout.kv_heads, head_dim,
            (query.data_ptr(), *query.stride()[:3]), 0, 0, (out.data_ptr(), *out.stride()[:3]),
            0 if lse is None else lse.data_ptr(), queries * num_heads, step.workspace.data_ptr(),
            scoring.scale, scoring.rope_scale, scoring.interleaved, scoring.softcap,
            self._stream(),
        )  # fmt: skip

    # ---- pages ----------------------------------------------------------------------------------

    def commit(
        self, layers: PagedLayers, source: Ints, count: int, target: Ints, target_length: int
    ) -> None:
        self._move(layers, source, count, target, target_length, layers.inv_freq)

    def copy_page(self, layers: PagedLayers, source: int, target: int, rows: int) -> None:
        not_rotated = np.zeros(0, np.float32)
        pages = np.array([[source], [target]], np.int32)
        self._move(layers, pages[0], rows, pages[1], 0, not_rotated)

    def _move(
        self, layers: PagedLayers, source: Ints, count: int, target: Ints, target_length: int,
        inv_freq: np.ndarray[Any, np.dtype[np.float32]],
    ) -> None:  # fmt: skip
        tables = _C.cuda.MoveTables(
            layers.key_addresses, layers.value_addresses, source, target, target_length, inv_freq
        )
        with self._current():
            self._launch_move(layers, self._to_device(tables.bytes), count, target_length)

    def _launch_move(
        self, layers: PagedLayers, tables: Tensor, count: int, target_length: int
    ) -> None:
        _C.cuda.move(
            tables.data_ptr(), len(layers.keys), layers.dtype, layers.kv_heads, layers.head_dim,
            count, target_length, layers.scoring.interleaved, self._stream(),
        )  # fmt: skip

    def read(
        self, layers: PagedLayers, layer: int, is_key: bool, table: Ints, length: int
    ) -> Tensor:
        storage = (layers.keys if is_key else layers.values)[layer]
        pages = storage[torch.from_numpy(table).to(storage.device, torch.int64)]
        return pages.transpose(1, 2).flatten(0, 1)[:length].contiguous()


def cuda_backend(name: str, device: torch.device) -> CudaBackend:
    """The backend of a GPU. ValueError with the remedy if it cannot be used."""
    index = device.index if device.index is not None else 0
    usable, why_not, *_ = _C.cuda.device_state(index)
    if not usable:
        raise ValueError(f"{name}: expected a GPU that can be used, got {device}: {why_not}")
    return CudaBackend(torch.device("cuda", index))
