"""Cells of the attention benchmark: heads of real models, who reads what, how many tokens come.

A worker's view is always `context` tokens long, its new ones included:

    few     one long segment, then a short one of each worker, the reader's own last
    many    64 segments of equal length, each worker in an order of its own, then the short ones

    decode   1 new token a worker
    ragged   3, 1, 2, 4, 3, ... new tokens
    prefill  as many as half of the context holds, at most 1024 a worker
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

SHORT_SEGMENT = 32  # tokens that a worker has written
MANY_SEGMENTS = 64
LONGEST_PREFILL = 1024  # new tokens of a worker
RAGGED = (3, 1, 2, 4)

STEPS = ("decode", "ragged", "prefill")
SEGMENTS = ("few", "many")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Heads:
    """The attention heads of a model."""

    model: str
    num_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.kv_heads}x{self.head_dim}"

    @property
    def title(self) -> str:
        return f"{self.model} {self}" if self.model else str(self)


MODELS = {
    "smollm2": Heads("SmolLM2-135M", 9, 3, 64),
    "qwen2.5": Heads("Qwen2.5-0.5B", 14, 2, 64),
    "llama-3": Heads("Llama-3-8B", 32, 8, 128),
    "qwq": Heads("QwQ-32B", 40, 8, 128),
}


def heads_from(text: str) -> Heads:
    """The heads named by a key of `MODELS` or written as query heads/KV heads x head_dim."""
    if text in MODELS:
        return MODELS[text]
    numbers = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)x([1-9]\d*)", text)
    if numbers is None:
        raise ValueError(f"expected {', '.join(MODELS)} or heads as in 32/8x128, got {text!r}")
    num_heads, kv_heads, head_dim = map(int, numbers.groups())
    if num_heads % kv_heads:
        raise ValueError(f"expected a multiple of {kv_heads} query heads, got {text!r}")
    return Heads("", num_heads, kv_heads, head_dim)


@dataclass(frozen=True)
class Layout:
    """Who reads what in a step; segments are numbered."""

    views: list[list[int]]  # one a worker, its own segment last
    lengths: list[int]  # of the segments, after the step's append
    query_lengths: list[int]  # new tokens of each worker

    def starts(self, worker: int) -> Iterator[tuple[int, int]]:
        """(segment, position of its first token) along a worker's view."""
        start = 0
        for segment in self.views[worker]:
            yield segment, start
            start += self.lengths[segment]


@dataclass(frozen=True)
class Cell:
    """One step on one layer."""

    heads: Heads
    dtype: str
    step: str
    segments: str
    context: int
    workers: int

    @property
    def query_lengths(self) -> list[int]:
        prefill = max(1, min(LONGEST_PREFILL, self.context // (2 * self.workers)))
        return {
            "decode": [1] * self.workers,
            "ragged": [RAGGED[w % len(RAGGED)] for w in range(self.workers)],
            "prefill": [prefill] * self.workers,
        }[self.step]

    def layout(self) -> Layout:
        """Raises ValueError if the context is too short for so many workers."""
        brought = self.query_lengths
        own = max(*brought, min(SHORT_SEGMENT, self.context // (2 * self.workers)), 1)
        shared = self.context - own * self.workers
        if shared < 1:
            raise ValueError(
                f"context: expected more than {own * self.workers} tokens for {self.workers} "
                f"workers ({self.step}), got {self.context}"
            )
        count = min(MANY_SEGMENTS, shared) if self.segments == "many" else 1
        ends = [shared * (i + 1) // count for i in range(count)]
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        written = range(count, count + self.workers)
        views = []
        for w in range(self.workers):
            first = w * count // self.workers
            order = [*range(first, count), *range(first)]
            views.append([*order, *(s for s in written if s != count + w), count + w])
        return Layout(views, [*lengths, *([own] * self.workers)], brought)


@dataclass(frozen=True)
class Grid:
    """What is benchmarked unless something else is asked for."""

    heads: Sequence[Heads]
    steps: Sequence[str]
    segments: Sequence[str]
    contexts: Sequence[int]
    workers: Sequence[int]


FULL = Grid(tuple(MODELS.values()), STEPS, SEGMENTS, (512, 2048, 4096, 16384, 65536), (1, 2, 4, 8))
QUICK = Grid((MODELS["llama-3"],), ("decode",), SEGMENTS, (2048, 16384), (1, 4, 8))


def cells(
    heads: Iterable[Heads], dtypes: Sequence[str], steps: Sequence[str], segments: Sequence[str],
    contexts: Sequence[int], workers: Sequence[int],
) -> list[Cell]:  # fmt: skip
    """The whole grid, the heads outermost and the workers innermost."""
    return [
        Cell(*values)
        for values in itertools.product(heads, dtypes, steps, segments, contexts, workers)
    ]
