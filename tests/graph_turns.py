"""Steps that a CUDA graph captures and replays, as a test would run them without one.

A captured launch keeps its grid, its kernel and its addresses; everything else must come from the
tables of the step that replays it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hogwild_ext.cache import Segment, SegmentCache
from hogwild_ext.step import Step

LAYERS, KV_HEADS, HEADS, DIM = 2, 2, 6, 64
INV_FREQ = 1e4 ** (-torch.arange(0, DIM, 2) / DIM)

Views = list[list[Segment]]


class Model:
    """Queries, keys and values in tensors that stay where they are, as a graph needs."""

    def __init__(self, tokens: int, dtype: torch.dtype, device: str = "cpu") -> None:
        def zeros(heads: int) -> list[torch.Tensor]:
            shape = tokens, heads, DIM
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(LAYERS)]

        self.query, self.key, self.value = zeros(HEADS), zeros(KV_HEADS), zeros(KV_HEADS)
        self.out = zeros(HEADS)

    def draw(self, generator: torch.Generator, tokens: int) -> None:
        """New numbers in the first `tokens` rows, nan where nobody should look."""
        for tensor in (*self.query, *self.key, *self.value):
            tensor.fill_(torch.nan)
            tensor[:tokens] = torch.randn((tokens, *tensor.shape[1:]), generator=generator)

    def attend(self, step: Step, tokens: int) -> None:
        for layer in range(LAYERS):
            rows = [t[layer][:tokens] for t in (self.query, self.key, self.value)]
            step.attend(layer, *rows, out=self.out[layer][:tokens])


Capture = Callable[[SegmentCache, Model, Views, Sequence[int]], Any]


def make_cache(dtype: torch.dtype, device: str = "cpu") -> SegmentCache:
    return SegmentCache(
        LAYERS, KV_HEADS, DIM, inv_freq=INV_FREQ, max_tokens=4096, spare_pages=100, dtype=dtype,
        device=device,
    )  # fmt: skip


def append(cache: SegmentCache, segment: Segment, tokens: int) -> None:
    model = Model(tokens, cache.dtype, str(cache.device))
    model.draw(torch.Generator().manual_seed(tokens), tokens)
    with cache.step([[segment]], [tokens]) as step:
        model.attend(step, tokens)


def segments(cache: SegmentCache, *words: str) -> Views:
    """A view for each word: one letter is one segment."""
    known = {segment.name: segment for segment in cache.segments}
    return [[known[letter] for letter in word] for word in words]


def play(
    dtype: torch.dtype, workers: int, seed: int, capture: Capture | None, device: str = "cpu"
) -> list[torch.Tensor]:
    """Every output of six steps and every key and value at their ends.

    The captured step, the first, has short segments; later ones have longer and more segments,
    other views, fewer workers, results to merge, and pages that a commit moved about. Without
    `capture` they are plain steps.
    """
    names = "abcdefg"[:workers]
    more = "0123456789"
    # (what happens before, the views, the tokens of each)
    turns: list[tuple[str, list[str], list[int]]] = [
        ("", list(names), [2] * workers),
        ("", ["p" + name for name in names], [2] * workers),
        ("append", ["p" + name for name in reversed(names)], [1] * workers),
        ("", ["pa"], [2 * workers]),
        ("commit", ["ph" + name for name in names], [1] * workers),
        ("more", ["p" + more + "a"], [2]),
    ]
    cache = make_cache(dtype, device)
    for name in "ph" + names:
        cache.segment(name)
    (prompt, history, first) = segments(cache, "pha")[0]
    append(cache, prompt, 3)
    model = Model(2 * workers, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    graph, results = None, []
    for before, words, sizes in turns:
        if before == "append":
            append(cache, prompt, 140)
        elif before == "commit":
            cache.commit(first, history)
        elif before == "more":
            for i, name in enumerate(more):
                append(cache, cache.segment(name), 3 * i + 1)
        views, tokens = segments(cache, *words), sum(sizes)
        model.draw(generator, tokens)
        if capture is not None and graph is None:
            graph = capture(cache, model, views, sizes)
        else:
            with cache.step(views, sizes) as step:
                if graph is None:
                    model.attend(step, tokens)
                else:
                    step.replay(graph)
        results += [out[:tokens].clone() for out in model.out]
        for segment in cache.segments:
            results += [segment.keys(1), segment.values(0)]
    return results
