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
from .backends import Ints, PagedLayers, PlanInput, Scoring, Segments

HEAD_DIMS = (64, 96, 128, 256)


@dataclass(frozen=True)
class DeviceStep:
    """A step's tables on the device, and the memory for partial results."""

    tables: Any  # _C.cuda.Tables
    on_device: Tensor
    workspace: Tensor

    def same_place(self, other: DeviceStep) -> bool:
        mine, theirs = (
            (step.on_device.data_ptr(), step.workspace.data_ptr()) for step in (self, other)
        )
        return mine == theirs


class StepMemory:
    """Device memory for a cache's steps, each of which overwrites the last one's.

    That is safe on one stream, where a step's tables are copied behind the last step's kernels;
    and steps on several streams have to wait for each other anyway, for the pages. The addresses
    stay, so that a captured graph finds the next step's tables where it looks. Only growing moves
    them; sizes are powers of two and not small, and so that is rare.
    """

    TABLE_BYTES = 2**22  # at first: a prefill of 4,000 tokens, or 40 workers that see 200 segments
    WORKSPACE_FLOATS = 2**20

    def __init__(self, device: torch.device) -> None:
        self._tables = torch.empty(0, dtype=torch.uint8, device=device)
        self._workspace = torch.empty(0, dtype=torch.float32, device=device)

    def take(self, table_bytes: int, workspace_floats: int) -> tuple[Tensor, Tensor]:
        """Room for tables and for partial results."""
        self._tables = _grown(self._tables, max(table_bytes, self.TABLE_BYTES))
        self._workspace = _grown(self._workspace, max(workspace_floats, self.WORKSPACE_FLOATS))
        return self._tables[:table_bytes], self._workspace[:workspace_floats]


def _grown(buffer: Tensor, size: int) -> Tensor:
    """`buffer`, or a new one if it has fewer than `size` elements."""
    if len(buffer) >= size:
        return buffer
    # Not an inference tensor, which a later step outside of inference mode could not copy to.
    with torch.inference_mode(False):
        return buffer.new_empty(1 << (size - 1).bit_length())


class CudaBackend:
    """See `backends.Backend`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    # ---- what an emulated device does otherwise -------------------------------------------------

    def _send(self, data: bytes, to: Tensor) -> None:
        """A copy to the device that the host does not wait for."""
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8).pin_memory()
        # torch notes the copy in its cache of pinned memory, and does not give the block to anybody
        # else before it is done.
        to.copy_(host, non_blocking=True)

    def _is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self) -> None:
        """For what copies a layout to the device: a graph would copy that of now for ever."""
        if self._is_capturing():
            raise RuntimeError(
                "CUDA graph: expected nothing to be captured but the layers of a step after "
                "step.prepare(num_heads), got something that copies its layout to the device"
            )

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

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def free_memory(self) -> int | None:
        try:
            return int(torch.cuda.mem_get_info(self._device)[0])
        except (RuntimeError, ValueError, AssertionError):
            return None

    def step_memory(self) -> StepMemory:
        return StepMemory(self._device)

    def _make_step(
        self,
        layout: PlanInput,
        dtype: int,
        head_dim: int,
        memory: StepMemory | None = None,
        padded_queries: int = 0,
        segments: Segments | None = None,
    ) -> DeviceStep:
        self._refuse_capture()
        plan = layout.plan(_C.cuda.row_group(dtype, head_dim))
        tables = _C.cuda.Tables(plan, layout.kv_heads, padded_queries, segments)
        data = tables.bytes
        floats = max(tables.workspace_floats(layout.kv_heads, head_dim), 4)  # 0 have no address
        if memory is not None:
            on_device, workspace = memory.take(len(data), floats)
        else:
            on_device = torch.empty(len(data), dtype=torch.uint8, device=self._device)
            workspace = torch.empty(floats, dtype=torch.float32, device=self._device)
        self._send(data, on_device)
        return DeviceStep(tables, on_device, workspace)

    def plan_step(self, layers: PagedLayers, layout: PlanInput) -> DeviceStep:
        with self._current():
            return self._make_step(layout, layers.dtype, layers.head_dim, layers.step_memory)

    def replay(self, plan: DeviceStep, captured: DeviceStep, graph: Any) -> None:
        if not plan.same_place(captured):
            raise ValueError(
                "graph: expected one captured since the step's tables were moved, which have "
                "outgrown their memory; capture it again"
            )
        with self._current():
            graph.replay()

    def attend_layer(
        self, plan: DeviceStep, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> bool:  # fmt: skip
        tables, address, stream = plan.tables, plan.on_device.data_ptr(), self._stream()
        key_pages, value_pages = layers.key_addresses[layer], layers.value_addresses[layer]
        scoring = layers.scoring
        with self._current():
            _C.cuda.append(
                tables, address, layers.dtype, layers.kv_heads, layers.head_dim,
                (key.data_ptr(), *key.stride()[:2]), (value.data_ptr(), *value.stride()[:2]),
                key_pages, value_pages, scoring.rope_scale, scoring.interleaved, stream,
            )  # fmt: skip
            is_captured = _C.cuda.attend(
                tables, address, layers.dtype, query.shape[1], layers.kv_heads, layers.head_dim,
                (query.data_ptr(), 0, *query.stride()[:2]), key_pages, value_pages,
                (out.data_ptr(), 0, *out.stride()[:2]), 0, 0, plan.workspace.data_ptr(),
                scoring.scale, scoring.rope_scale, scoring.interleaved, scoring.softcap, stream,
            )  # fmt: skip
        return not is_captured

    def attend_rows(
        self, layout: PlanInput, dtype: int, query: Tensor, keys: Sequence[Tensor],
        values: Sequence[Tensor], segments: Segments, out: Tensor,
        lse: Tensor | None, scoring: Scoring,
    ) -> None:  # fmt: skip
        queries, head_dim = query.shape[1], query.shape[3]
        with self._current():
            step = self._make_step(
                layout, dtype, head_dim, padded_queries=queries, segments=segments
            )
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
        data = tables.bytes
        with self._current():
            self._refuse_capture()
            on_device = torch.empty(len(data), dtype=torch.uint8, device=self._device)
            self._send(data, on_device)
            self._launch_move(layers, on_device, count, target_length)

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
    index = device.index or 0
    usable, why_not, *_ = _C.cuda.device_state(index)
    if not usable:
        raise ValueError(f"{name}: expected a GPU that can be used, got {device}: {why_not}")
    return CudaBackend(torch.device("cuda", index))
