"""The CPU backend: addresses of the tensors, and the number of threads that torch uses."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import _C, checks

if TYPE_CHECKING:
    from .backends import Ints, PagedLayers, PlanInput, Scoring, Segments


class CpuBackend:
    """See `backends.Backend`."""

    def check_head_dims(self, names: tuple[str, str], head_dim: int, value_dim: int) -> None:
        checks.is_head_dim(names[0], head_dim)
        checks.is_head_dim(names[1], value_dim)

    def page_shape(self, dtype: int, kv_heads: int, dim: int, is_key: bool) -> tuple[int, ...]:
        elements = _C.key_page_elements if is_key else _C.value_page_elements
        return (elements(dtype, kv_heads, dim),)

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # A private mapping, which the operating system fills page by page. Reading keys and values
        # is what attention waits for, and huge pages make it 10 to 15% faster; Linux hands them out
        # where it is asked to.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def free_memory(self) -> int | None:
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # not everywhere
            return None

    def step_memory(self) -> None:
        return None

    def plan_step(self, layers: PagedLayers, layout: PlanInput) -> _C.Plan:
        return layout.plan(_C.ROW_GROUP, _C.SHARED_KEYS)

    def replay(self, plan: _C.Plan, captured: _C.Plan, graph: Any) -> None:
        raise ValueError(f"graph: expected a CUDA graph of a cache on a GPU, got {graph!r}")

    def attend_layer(
        self, plan: _C.Plan, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> bool:  # fmt: skip
        query_token, query_head, _ = query.stride()
        key_token, key_head, _ = key.stride()
        value_token, value_head, _ = value.stride()
        out_token, out_head, _ = out.stride()
        dtype, kv_heads, head_dim, value_dim = (
            layers.dtype, layers.kv_heads, layers.head_dim, layers.value_dim,
        )  # fmt: skip
        key_pages, value_pages = layers.key_addresses[layer], layers.value_addresses[layer]
        scale, rope_scale, interleaved, softcap = layers.scoring
        _C.append(
            plan, dtype, kv_heads, head_dim, value_dim,
            (key.data_ptr(), key_token, key_head), (value.data_ptr(), value_token, value_head),
            key_pages, value_pages, rope_scale, interleaved, threads,
        )  # fmt: skip
        _C.attend_paged(
            plan, dtype, query.shape[1], kv_heads, head_dim, value_dim,
            (query.data_ptr(), 0, query_token, query_head), key_pages, value_pages,
            (out.data_ptr(), 0, out_token, out_head), 0, scale, rope_scale, interleaved, softcap,
            threads,
        )  # fmt: skip
        return True

    def attend_rows(
        self, layout: PlanInput, dtype: int, query: Tensor, keys: Sequence[Tensor],
        values: Sequence[Tensor], segments: Segments, out: Tensor,
        lse: Tensor | None, scoring: Scoring,
    ) -> None:  # fmt: skip
        _, queries, num_heads, head_dim = query.shape
        query_worker, query_token, query_head, _ = query.stride()
        out_worker, out_token, out_head, _ = out.stride()
        _C.attend_rows(
            layout.plan(_C.ROW_GROUP, _C.SHARED_KEYS), dtype, num_heads, layout.kv_heads, head_dim,
            out.shape[3],
            (query.data_ptr(), query_worker, query_token, query_head), segments,
            (out.data_ptr(), out_worker, out_token, out_head),
            0 if lse is None else lse.data_ptr(), queries, *scoring, torch.get_num_threads(),
        )  # fmt: skip

    def commit(
        self, layers: PagedLayers, source: Ints, count: int, target: Ints, target_length: int
    ) -> None:
        _C.commit(
            layers.dtype, layers.kv_heads, layers.head_dim, layers.value_dim, layers.key_addresses,
            layers.value_addresses, source, count, target, target_length, layers.inv_freq,
            layers.scoring.interleaved, torch.get_num_threads(),
        )  # fmt: skip

    def copy_page(self, layers: PagedLayers, source: int, target: int, rows: int) -> None:
        _C.copy_pages(
            layers.dtype, layers.kv_heads, layers.head_dim, layers.value_dim, layers.key_addresses,
            layers.value_addresses, np.array([source], np.int32), np.array([target], np.int32),
            torch.get_num_threads(),
        )  # fmt: skip

    def read(
        self, layers: PagedLayers, layer: int, is_key: bool, table: Ints, length: int
    ) -> Tensor:
        pages = (layers.keys if is_key else layers.values)[layer]
        dim = layers.head_dim if is_key else layers.value_dim
        rows = torch.empty((length, layers.kv_heads, dim), dtype=pages.dtype, device="cpu")
        _C.read_pages(
            layers.dtype, layers.kv_heads, dim, pages.data_ptr(), is_key, table, 0, length,
            rows.data_ptr(),
        )  # fmt: skip
        return rows


CPU = CpuBackend()
