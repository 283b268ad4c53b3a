"""What one would do with transformers alone to let workers share text: the slow path.

The paper's method without its kernel (arXiv 2504.06261): segments are stored once, and in every
layer of every step each worker's view is made anew: all keys of a segment are turned to the place
where it stands in that view, and keys and values are concatenated. The model's own attention then
runs on a batch of such views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class SlowPathCache(Cache):
    """A cache of transformers for a batch [W, 1] of workers that bring one token each.

    Args:
        shared: for each layer the keys and values [L, Hkv, D] of the text that all read first, key
            l turned to position l.
        workers: W. Each reads the shared text, the others' own in their order, and its own.
        inv_freq: [R/2] float32, of neighbours half of R apart.
    """

    def __init__(
        self, shared: Sequence[tuple[Tensor, Tensor]], workers: int, inv_freq: Tensor
    ) -> None:
        super().__init__(layers=[_Layer(*kv, workers, inv_freq) for kv in shared])

    def positions(self) -> Tensor:
        """[W, 1]: where each worker's next token stands in its view, when all have brought one."""
        layer = self.layers[0]
        assert isinstance(layer, _Layer)
        return torch.full((layer.workers, 1), layer.get_seq_length() + layer.workers - 1)


class _Layer(CacheLayerMixin):
    def __init__(self, keys: Tensor, values: Tensor, workers: int, inv_freq: Tensor) -> None:
        super().__init__()
        self.workers = workers
        self._inv_freq = inv_freq
        self._shared = _heads_first(keys), _heads_first(values)
        nothing = self._shared[0][:, :0], self._shared[1][:, :0]
        self._own = [nothing] * workers  # key l turned to position l
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[W, Hkv, 1, D] each, keys turned to `positions` -> all views [W, Hkv, T, D]."""
        # From its place in the view, the last one, to its place in its own segment.
        by = self._own[0][0].shape[1] - (self.get_seq_length() + self.workers - 1)
        for w, (keys, values) in enumerate(self._own):
            at_place = self._turned(key_states[w], by)
            self._own[w] = torch.cat([keys, at_place], 1), torch.cat([values, value_states[w]], 1)
        views = [self._view(w) for w in range(self.workers)]
        return torch.stack([view[0] for view in views]), torch.stack([view[1] for view in views])

    def _view(self, worker: int) -> tuple[Tensor, Tensor]:
        others = [own for w, own in enumerate(self._own) if w != worker]
        segments = [self._shared, *others, self._own[worker]]
        keys, start = [], 0
        for key, _ in segments:
            keys.append(self._turned(key, start))
            start += key.shape[1]
        return torch.cat(keys, 1), torch.cat([value for _, value in segments], 1)

    def _turned(self, keys: Tensor, by: int) -> Tensor:
        """keys [Hkv, L, D] turned by so many positions; the dimensions past R stay."""
        angles = self._inv_freq.double() * by
        cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
        half = len(angles)
        low, high, rest = keys.split([half, half, keys.shape[-1] - 2 * half], -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)

    # ---- what transformers asks of a layer ------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("is_initialized says that there is nothing to do")

    def get_seq_length(self) -> int:
        """Tokens of a view so far."""
        return self._shared[0].shape[1] + sum(key.shape[1] for key, _ in self._own)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + self.workers, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.10


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()
