"""Cells of the attention benchmark: heads of real models, who reads what, how many tokens come.

A worker's view is always `context` tokens long, its new ones included:

    few     one long segment, then a short one of each worker, the reader's own last
    many    64 segments of equal length, each worker in an order of its own, then the short ones
    17      as many as the number says

    decode   1 new token a worker
    ragged   3, 1, 2, 4, 3, ... new tokens
    prefill  as many as half of the context holds, at most 1024 a worker; on the CPU, at most 256
             of all workers
    prompt   the whole context, of one worker
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHORT_SEGMENT = 32  # tokens that a worker has written
MANY_SEGMENTS = 64
LONGEST_PREFILL = 1024  # new tokens of a worker
CPU_PREFILL = 256  # of all workers: with 64k tokens of context already seconds a call
RAGGED = (3, 1, 2, 4)

STEPS = ("decode", "ragged", "prefill", "prompt")
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

    def visible_pairs(self) -> int:
        """Pairs of a new token and a token that it sees: those of its view up to itself."""
        pairs = 0
        for w, new in enumerate(self.query_lengths):
            context = sum(self.lengths[segment] for segment in self.views[w])
            ends = np.arange(context - new, context) + 1
            for segment, start in self.starts(w):
                pairs += int(np.clip(ends - start, 0, self.lengths[segment]).sum())
        return pairs

    def seen_tokens(self) -> int:
        """Tokens of all segments that are in somebody's view, each once."""
        return sum(self.lengths[segment] for segment in {s for view in self.views for s in view})

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
    longest_prefill: int = LONGEST_PREFILL  # new tokens of a worker
    short_segments: int = 0  # at least so many, those of the workers among them

    @property
    def query_lengths(self) -> list[int]:
        prefill = max(1, min(self.longest_prefill, self.context // (2 * self.workers)))
        return {
            "decode": [1] * self.workers,
            "ragged": [RAGGED[w % len(RAGGED)] for w in range(self.workers)],
            "prefill": [prefill] * self.workers,
            "prompt": [self.context] * self.workers,
        }[self.step]

    def layout(self) -> Layout:
        """Raises ValueError if the context is too short for so many workers."""
        brought = self.query_lengths
        if self.step == "prompt":
            if self.workers != 1:
                raise ValueError(f"workers: expected 1 for a prompt, got {self.workers}")
            return Layout([[0]], [self.context], [self.context])
        shorts = max(self.workers, self.short_segments)
        own = max(*brought, min(SHORT_SEGMENT, self.context // (2 * shorts)), 1)
        shared = self.context - own * shorts
        if shared < 1:
            raise ValueError(
                f"context: expected more than {own * shorts} tokens for {self.workers} "
                f"workers ({self.step}), got {self.context}"
            )
        count = min(self._long_segments, shared)
        ends = [shared * (i + 1) // count for i in range(count)]
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        short = range(count, count + shorts)
        views = []
        for w in range(self.workers):
            first = w * count // self.workers
            order = [*range(first, count), *range(first)]
            views.append([*order, *(s for s in short if s != count + w), count + w])
        return Layout(views, [*lengths, *([own] * shorts)], brought)

    @property
    def _long_segments(self) -> int:
        named = {"few": 1, "many": MANY_SEGMENTS}
        return named[self.segments] if self.segments in named else int(self.segments)


@dataclass(frozen=True)
class Grid:
    """What is benchmarked unless something else is asked for."""

    heads: Sequence[Heads]
    dtypes: Sequence[str]
    steps: Sequence[str]
    segments: Sequence[str]
    contexts: Sequence[int]
    workers: Sequence[int]
    prefill: int | None = None  # new tokens of all workers in a prefill, at most

    def cells(self) -> list[Cell]:
        """All of them, the heads outermost and the workers innermost."""
        return [
            Cell(*values, longest_prefill=self._longest_prefill(values[-1]))
            for values in itertools.product(
                self.heads, self.dtypes, self.steps, self.segments, self.contexts, self.workers
            )
        ]

    def _longest_prefill(self, workers: int) -> int:
        of_all = self.prefill or LONGEST_PREFILL * workers
        return max(1, min(LONGEST_PREFILL, of_all // workers))


_WORKERS = (1, 2, 4, 8)
GPU = Grid(
    tuple(MODELS.values()), ("bfloat16",), ("decode", "ragged", "prefill"), SEGMENTS,
    (512, 2048, 4096, 16384, 65536), _WORKERS,
)  # fmt: skip
GPU_QUICK = Grid(
    (MODELS["llama-3"],), ("bfloat16",), ("decode",), SEGMENTS, (2048, 16384), (1, 4, 8)
)
CPU = Grid(
    tuple(MODELS.values()), ("bfloat16", "float32"), ("decode", "prefill"), SEGMENTS,
    (512, 4096, 16384, 65536), _WORKERS, CPU_PREFILL,
)  # fmt: skip
CPU_QUICK = Grid(
    (MODELS["llama-3"],), ("bfloat16",), ("decode",), SEGMENTS, (512, 8192), (1, 4), CPU_PREFILL
)
