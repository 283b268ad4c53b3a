"""Random lives of a segment cache, checked step by step against a float64 oracle.

A game draws the shape of a cache, then segments, forks, truncations, commits and steps of several
workers. Free pages hold nan. Every output is compared with the oracle over what is stored, and
what is stored with keys and values that never went through a cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

import hogwild_ext as hx
from compare import assert_close, assert_out_near, assert_same_bits
from hogwild_ext._reference import eager_attention, reference_attention, reference_rotate
from hogwild_ext.cache import SegmentCache
from op_cases import DTYPES, GPU_DIMS, inverse_frequencies, laid_out

# Rounding of a key that is rotated once; each commit rotates, and rounds, again.
KEY_ERROR = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
PACKED = ["dense", "heads first", "inside", "every other token", "misaligned"]
SIZES = [1, 1, 1, 1, 2, 3, 17, 63, 64, 65, 80]


@dataclass
class Twin:
    """A segment as the numbers of its tokens, in a list of all tokens that there ever were."""

    segment: hx.Segment
    tokens: list[int] = field(default_factory=list)
    rotations: int = 1  # of the key that was rotated most often


class Game:
    """One cache, everything about it drawn from `seed` unless given."""

    def __init__(self, seed: int, **given: Any) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        draw = self.rng.choice
        self.dtype: torch.dtype = given.get("dtype", draw(DTYPES))
        self.dim: int = given.get("dim", draw(GPU_DIMS))
        self.kv_heads: int = given.get("kv_heads", draw([1, 2, 3]))
        self.group: int = given.get("group", draw([1, 2, 3, 4, 5, 7, 8]))
        self.layers: int = given.get("layers", draw([1, 2]))
        self.device: str = given.get("device", "cpu")
        self.cache = SegmentCache(
            self.layers,
            self.kv_heads,
            self.dim,
            inv_freq=inverse_frequencies(draw([self.dim, self.dim, self.dim // 2, 6, 0])),
            max_tokens=given.get("max_tokens", 2048),
            spare_pages=given.get("spare_pages", 64),
            dtype=self.dtype,
            device=self.device,
            rope_scale=draw([1.0, 1.0, 1.25]),
            interleaved=draw([False, False, True]),
            softcap=draw([0.0, 0.0, 20.0]),
            window=given.get("window", draw([None, None, 1, 50, 64, 100])),
        )
        self.twins: list[Twin] = []
        self.keys = [torch.empty(0, self.kv_heads, self.dim, dtype=self.dtype)] * self.layers
        self.values = list(self.keys)
        self.made = 0
        self.worst = 0.0  # error of an output, as a share of its limit

    # ---- what can happen ------------------------------------------------------------------------

    def play(self, turns: int) -> None:
        """Every kind of event now and then, a step after each. Raises AssertionError."""
        for _ in range(self.rng.randint(2, 5)):
            self.segment()
        for _ in range(turns):
            self.rng.choice([self.segment, self.fork, self.truncate, self.commit, self.free])()
            self.some_step()
        self.assert_stored()

    def segment(self) -> Twin:
        self.made += 1
        self.twins.append(Twin(self.cache.segment(f"segment {self.made}")))
        return self.twins[-1]

    def fork(self) -> None:
        twin = self.rng.choice(self.twins)
        fork = self.cache.fork(twin.segment)
        self.twins.append(Twin(fork, list(twin.tokens), twin.rotations))

    def truncate(self) -> None:
        twin = self.rng.choice(self.twins)
        length = self.rng.randint(0, len(twin.tokens))
        twin.segment.truncate(length)
        del twin.tokens[length:]

    def commit(self) -> None:
        if len(self.twins) < 2:
            return
        source, target = self.rng.sample(self.twins, 2)
        if source.tokens and target.tokens:
            target.rotations = max(target.rotations, source.rotations + 1)
        elif source.tokens:
            target.rotations = source.rotations
        self.cache.commit(source.segment, target.segment)
        target.tokens, source.tokens = target.tokens + source.tokens, []

    def free(self) -> None:
        if len(self.twins) > 3:
            self.cache.free(self.twins.pop(self.rng.randrange(len(self.twins))).segment)

    def some_step(self) -> None:
        """Some workers, each with a view of its own and some new tokens."""
        writers = self.rng.sample(self.twins, self.rng.randint(1, min(4, len(self.twins))))
        views = []
        for writer in writers:
            others = [twin for twin in self.twins if twin is not writer]
            views.append([*self.rng.sample(others, self.rng.randint(0, len(others))), writer])
        self.step(views, [self.rng.choice(SIZES) for _ in writers])

    def step(self, views: list[list[Twin]], sizes: list[int]) -> None:
        """A step on random numbers; checks its outputs."""
        for storage in (*self.cache._keys, *self.cache._values):
            storage[self.cache._pool.free_pages()] = torch.nan
        total = sum(sizes)
        heads = self.kv_heads * self.group
        queries = [self._draw(total, heads) for _ in range(self.layers)]
        first = len(self.keys[0])
        for layer in range(self.layers):
            for rows in (self.keys, self.values):
                rows[layer] = torch.cat((rows[layer], self._draw(total, self.kv_heads)))
        outs = []
        with self.cache.step([[t.segment for t in view] for view in views], sizes) as step:
            for layer in range(self.layers):
                rows = queries[layer], self.keys[layer][first:], self.values[layer][first:]
                outs.append(step.attend(layer, *(self._somehow(x) for x in rows)))
        for view, size in zip(views, sizes, strict=True):
            view[-1].tokens += range(first, first + size)
            first += size
        for layer, out in enumerate(outs):
            self._assert_step(layer, queries[layer], out.cpu(), views, sizes)

    def _draw(self, tokens: int, heads: int) -> torch.Tensor:
        shape = tokens, heads, self.dim
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def _somehow(self, x: torch.Tensor) -> torch.Tensor:
        return laid_out(x.to(self.device), self.rng.choice(PACKED))

    # ---- what must hold -------------------------------------------------------------------------

    def _assert_step(
        self,
        layer: int,
        query: torch.Tensor,
        out: torch.Tensor,
        views: list[list[Twin]],
        sizes: list[int],
    ) -> None:
        seen = [twin for twin in self.twins if any(twin in view for view in views)]
        padded = query.new_zeros(len(views), max(sizes), *query.shape[1:])
        for w, rows in enumerate(query.split(sizes)):
            padded[w, : len(rows)] = rows
        arguments = (
            padded,
            [twin.segment.keys(layer).cpu() for twin in seen],
            [twin.segment.values(layer).cpu() for twin in seen],
            hx.view_offsets(
                [[seen.index(twin) for twin in view] for view in views],
                [len(twin.tokens) for twin in seen],
                sizes,
            ),
        )
        options = {
            "inv_freq": self.cache.inv_freq,
            "query_lengths": sizes,
            "scale": self.cache.scale,
            "rope_scale": self.cache.rope_scale,
            "interleaved": self.cache.interleaved,
            "softcap": self.cache.softcap,
            "window": self.cache.window,
        }

        def packed(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[w, :size] for w, size in enumerate(sizes)])

        expected = packed(reference_attention(*arguments, **options)[0])
        share = assert_out_near(
            out, expected, lambda: packed(eager_attention(*arguments, **options))
        )
        self.worst = max(self.worst, share)

    def assert_stored(self) -> None:
        """Every segment holds the keys and values of its tokens, in every layer."""
        for twin in self.twins:
            assert len(twin.segment) == len(twin.tokens)
            for layer in range(self.layers):
                values = twin.segment.values(layer).cpu()
                assert_same_bits(values, self.values[layer][twin.tokens])
                expected = reference_rotate(
                    self.keys[layer][twin.tokens],
                    self.cache.inv_freq,
                    range(len(twin.tokens)),
                    rope_scale=self.cache.rope_scale,
                    interleaved=self.cache.interleaved,
                )
                limit = KEY_ERROR[self.dtype] * twin.rotations
                assert_close(twin.segment.keys(layer).cpu(), expected, relative=limit, name="keys")
