"""What computes: one backend for each kind of device, with the same methods.

A backend gets tensors that have been checked and host arrays. It knows nothing of workers' names,
views or token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from . import _C
from .cpu_backend import CPU

NO_CUDA_KERNELS = (
    "this build has no CUDA kernels: in the source folder of hogwild_ext, type "
    "HOGWILD_CUDA=1 pip install ."
)

Ints = np.ndarray[Any, np.dtype[np.int32]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Segments = np.ndarray[Any, np.dtype[np.int64]]
"""[S, 6]: addresses of keys and values, token and head stride of keys, the same of values."""


class Scoring(NamedTuple):
    """Numbers of the attention function, as in `concurrent_attention`."""

    scale: float
    rope_scale: float
    interleaved: bool
    softcap: float


@dataclass(frozen=True)
class PagedLayers:
    """Everything that a segment cache stores, and its shape."""

    dtype: int
    """Code of the storage type, as the compiled module counts them."""
    kv_heads: int
    head_dim: int
    value_dim: int
    inv_freq: Floats
    scoring: Scoring
    keys: list[Tensor]
    """One a layer, [pages, ...]: what lies inside a page is the backend's business."""
    values: list[Tensor]
    key_addresses: list[int]
    value_addresses: list[int]
    step_memory: Any = None
    """The backend's own, from step to step: see `Backend.step_memory`."""


class PlanInput(NamedTuple):
    """The layout of a step: the arguments of `Plan` in the compiled module, in their order."""

    offsets: Ints
    lengths: Ints
    query_lengths: Ints
    inv_freq: Floats
    group: int
    kv_heads: int
    window: int
    key_start: Ints | None = None
    tile_pages: Ints | None = None
    slots: Ints | None = None
    packed: bool = False

    def plan(self, row_group: int, shared_keys: int = 0) -> _C.Plan:
        return _C.Plan(*self, row_group, shared_keys)


class Backend(Protocol):
    """See `cpu_backend` and `cuda_backend`."""

    def check_head_dims(self, names: tuple[str, str], head_dim: int, value_dim: int) -> None:
        """Raises ValueError if there are no kernels for them; `names` are the arguments'."""

    def page_shape(self, dtype: int, kv_heads: int, dim: int, is_key: bool) -> tuple[int, ...]:
        """Shape of one page of keys or values."""

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for pages, not to be read before it is written."""

    def free_memory(self) -> int | None:
        """About how many bytes could be reserved; None if that is not known."""

    def step_memory(self) -> Any:
        """Room for the plans of one cache's steps, at addresses that stay if they can."""

    def plan_step(self, layers: PagedLayers, layout: PlanInput) -> Any:
        """What `attend_layer` needs, the same for all layers of a step. It replaces the last one.

        RuntimeError while a graph is captured.
        """

    def replay(self, plan: Any, captured: Any, graph: Any) -> None:
        """Run a graph that was captured with the plan `captured`, as the layers of `plan`.

        ValueError if what it captured lies elsewhere now.
        """

    def attend_layer(
        self, plan: Any, layers: PagedLayers, layer: int, query: Tensor, key: Tensor,
        value: Tensor, out: Tensor, threads: int,
    ) -> bool:  # fmt: skip
        """Store new keys and values, then attend: [T, H, D] each.

        Whether that was done: a CUDA graph may have captured it instead.
        """

    def attend_rows(
        self, layout: PlanInput, dtype: int, query: Tensor, keys: Sequence[Tensor],
        values: Sequence[Tensor], segments: Segments, out: Tensor,
        lse: Tensor | None, scoring: Scoring,
    ) -> None:  # fmt: skip
        """Attend to plain tensors, which lie where `segments` says."""

    def commit(
        self, layers: PagedLayers, source: Ints, count: int, target: Ints, target_length: int
    ) -> None:
        """Tokens of the pages `source` behind the first `target_length` of the pages `target`."""

    def copy_page(self, layers: PagedLayers, source: int, target: int, rows: int) -> None:
        """The first `rows` tokens of a page into another one, all layers."""

    def read(
        self, layers: PagedLayers, layer: int, is_key: bool, table: Ints, length: int
    ) -> Tensor:
        """Stored keys or values as a new tensor [length, Hkv, D]."""


def backend_for(name: str, device: torch.device) -> Backend:
    """The backend of a device; ValueError with the remedy if it has none. `name`: the argument."""
    if device.type == "cpu":
        return CPU
    if device.type == "cuda" and "cuda" in _C.backends:
        from .cuda_backend import cuda_backend

        return cuda_backend(name, device)
    remedy = f"; {NO_CUDA_KERNELS}" if device.type == "cuda" else ""
    raise ValueError(
        f"{name}: expected a device that this build has a backend for "
        f"({', '.join(_C.backends)}), got {device}{remedy}"
    )
