"""Streams of text that a model continues, a token each in a step: ours and what others would do.

All begin behind the same context, whose keys and values are random numbers: how long a step takes
does not depend on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from ..cache import Segment, SegmentCache
from ..model_support import ModelShape, read_model
from ..ops import rotate
from ..pages import PAGE_SIZE
from ..patching import forward, patch
from .slow_path import SlowPathCache

# Of the context's random keys and values. Larger ones would drown the model's own text in noise,
# and logits in half precision would be a matter of rounding alone.
CONTEXT_SCALE = 0.1
FIRST_TOKEN = 11  # of the first stream; the others begin with the next ones


class Streams(Protocol):
    """Several streams that take steps together."""

    workers: int
    tokens: list[int]  # [W], that the next step brings

    def logits(self) -> Tensor:
        """Runs a step; [W, vocab], for each stream's next token. The tokens are now read."""


def advance(streams: Streams) -> None:
    """A step, and each stream's likeliest token."""
    choose(streams, streams.logits())


def choose(streams: Streams, logits: Tensor) -> None:
    streams.tokens = logits.argmax(-1).tolist()


# ---- the context ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """A text's keys, before any rotation, and values: [L, Hkv, D] for each layer."""

    shape: ModelShape
    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def random(model: Any, tokens: int, seed: int = 0, scale: float = CONTEXT_SCALE) -> Context:
        shape = read_model(model)
        generator = torch.Generator().manual_seed(seed)
        size = (2, tokens, shape.num_kv_heads, shape.head_dim)
        pairs = [
            (scale * torch.randn(size, generator=generator)).to(shape.dtype)
            for _ in range(shape.num_layers)
        ]
        return Context(shape, [pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def __len__(self) -> int:
        return len(self.keys[0])

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token, all layers together."""
        shape = self.shape
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize

    def rotated(self) -> list[tuple[Tensor, Tensor]]:
        """Keys from position 0 on, and values, of each layer."""
        shape = self.shape
        return [
            (rotate(key, shape.inv_freq, 0, shape.rope_scale, shape.interleaved), value)
            for key, value in zip(self.keys, self.values, strict=True)
        ]

    def segment_cache(self, model: Any, room: int) -> tuple[SegmentCache, Segment]:
        """The context as a segment, in a cache with room for so many more tokens."""
        shape, length = self.shape, len(self)
        cache = SegmentCache.for_model(model, max_tokens=length + room + 2 * PAGE_SIZE)
        context = cache.segment("context")
        # Attending would cost more than all else. So the context comes in pages that do not see
        # each other, and that are committed one behind the other.
        pages = [
            (start, min(start + PAGE_SIZE, length), cache.segment(str(start)))
            for start in range(0, length, PAGE_SIZE)
        ]
        views, counts = [[page] for *_, page in pages], [end - start for start, end, _ in pages]
        unseen = self.keys[0].new_zeros((length, shape.num_kv_heads, shape.head_dim))
        with cache.step(views, counts) as step:
            for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
                step.attend(layer, unseen, key, value)
        for *_, page in pages:
            cache.commit(page, context)
            cache.free(page)
        return cache, context


# ---- ours ----------------------------------------------------------------------------------------


class Workers:
    """`forward`: each reads the context, what the others write, and what it has written."""

    def __init__(self, model: Any, cache: SegmentCache, context: Segment, workers: int) -> None:
        self.workers = workers
        self.tokens = first_tokens(workers)
        self.model = model
        self.cache = cache
        self.own = [cache.segment(f"{id(self)} {w}") for w in range(workers)]
        self.views = [
            [context, *(own for own in self.own if own is not mine), mine] for mine in self.own
        ]

    def logits(self) -> Tensor:
        # The text means nothing, so it may go past the positions that the model was made for.
        tokens = [[token] for token in self.tokens]
        out = forward(self.model, self.cache, self.views, tokens, allow_beyond=True)
        assert isinstance(out, Tensor)
        return out

    def free(self) -> None:
        for segment in self.own:
            self.cache.free(segment)


def twin(model: Any, linear: str | None = None) -> Any:
    """A model with the same weights, in the same memory, patched by itself."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return patch(copy.deepcopy(model, shared), linear=linear)


def first_tokens(workers: int) -> list[int]:
    return [FIRST_TOKEN + w for w in range(workers)]


# ---- transformers --------------------------------------------------------------------------------


class _Transformers:
    """Calls a plain model with a cache, as `generate` does."""

    def __init__(self, model: Any, cache: Any, workers: int) -> None:
        self.workers = workers
        self.tokens = first_tokens(workers)
        self._model = model
        self._cache = cache

    def positions(self) -> Tensor:
        """[W, 1] of the tokens that come."""
        raise NotImplementedError

    @torch.inference_mode()
    def logits(self) -> Tensor:
        # By position: newer versions of transformers have another name for the cache.
        tokens = torch.tensor(self.tokens)[:, None]
        output = self._model(tokens, None, self.positions(), self._cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits


class Batch(_Transformers):
    """Streams that know nothing of each other, each with the context in a cache of its own."""

    def __init__(self, model: Any, context: Context, workers: int, cache: Any) -> None:
        super().__init__(model, cache, workers)
        self._length = len(context)
        with torch.inference_mode():
            for layer, pair in enumerate(context.rotated()):
                keys, values = (
                    x.transpose(0, 1).expand(workers, *x.transpose(0, 1).shape) for x in pair
                )
                cache.update(keys, values, layer)

    def positions(self) -> Tensor:
        return torch.full((self.workers, 1), self._length)

    def logits(self) -> Tensor:
        logits = super().logits()
        self._length += 1
        return logits


def dynamic_batch(model: Any, context: Context, workers: int, steps: int) -> Streams:
    """With the cache that `generate` uses by default, which is copied whenever it grows."""
    return Batch(model, context, workers, DynamicCache(config=model.config))


def static_batch(model: Any, context: Context, workers: int, steps: int) -> Streams:
    """With a cache of the right size from the beginning."""
    cache = StaticCache(config=model.config, max_cache_len=len(context) + steps)
    return Batch(model, context, workers, cache)


class SlowPath(_Transformers):
    """The same as `Workers`, without our kernel: see slow_path.py."""

    def __init__(self, model: Any, context: Context, workers: int, steps: int) -> None:
        if context.shape.interleaved or context.shape.rope_scale != 1:
            raise ValueError(
                f"model: expected RoPE of halves and unscaled, got {model.config.model_type}"
            )
        self._cache: SlowPathCache
        cache = SlowPathCache(context.rotated(), workers, context.shape.inv_freq)
        super().__init__(model, cache, workers)

    def positions(self) -> Tensor:
        return self._cache.positions()


PEERS: dict[str, Callable[[Any, Context, int, int], Streams]] = {
    "batch, dynamic": dynamic_batch,
    "batch, static": static_batch,
    "slow path": SlowPath,
}
UNSHARED: Sequence[str] = ("batch, dynamic", "batch, static")
