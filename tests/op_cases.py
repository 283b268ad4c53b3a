"""Inputs of the attention op: whole layouts drawn by hypothesis, tensors with ugly strides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

import hogwild_ext as hx
import real_gpu
from emulator import session as emulated_gpu
from hogwild_ext._reference import eager_attention, reference_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HIDDEN = -(2**31)
FURTHEST = 2**31 - 1
ON_A_GPU = emulated_gpu.wanted() or real_gpu.wanted()  # it gets what would go to the CPU
GPU_DIMS = [64, 96, 128, 256]  # head dimensions of keys and of values alike
TILE = 64  # tokens that the op loads together: a key may reach the rows of its tile, no others

# How a [tokens, heads, dim] tensor lies in memory.
MEMORY = ["dense", "heads first", "inside", "every other token", "misaligned"]


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    query: torch.Tensor  # [W, Q, Hq, D]
    keys: list[torch.Tensor]  # [L, Hkv, D] a segment
    values: list[torch.Tensor]  # [L, Hkv, Dv] a segment
    offsets: Any  # [W, S]
    options: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        return self.query, self.keys, self.values, self.offsets

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of the op."""
        out, lse = hx.concurrent_attention(*self.arguments(), **self.options, return_lse=True)
        return out, lse

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of the oracle, float64."""
        return reference_attention(*self.arguments(), **self.options)

    def eager(self) -> torch.Tensor:
        """out of the eager reference, in the storage type."""
        return eager_attention(*self.arguments(), **self.options)

    def worker(self, w: int) -> Case:
        """Worker `w` by itself, without rows past its query length; the same segments."""
        lengths = self.options.get("query_lengths")
        tokens = self.query.shape[1] if lengths is None else int(lengths[w])
        alone = {**self.options, "query_lengths": None}
        offsets = [list(map(int, self.offsets[w]))]
        return replace(self, query=self.query[w : w + 1, :tokens], offsets=offsets, options=alone)


@dataclass(frozen=True)
class Layout:
    """Everything about a call but the numbers in the tensors, which `build` draws from `seed`."""

    seed: int
    dtype: torch.dtype
    query_tokens: int
    query_lengths: list[int] | None
    lengths: list[int]
    offsets: list[list[int]]
    kv_heads: int
    group: int
    dim: int
    value_dim: int
    rotary_dim: int
    rope_base: float
    interleaved: bool
    rope_scale: float
    softcap: float
    window: int | None
    scale: float | None
    host: str
    memory: list[str]

    def build(self) -> Case:
        """The tensors, standard normal."""
        generator = torch.Generator().manual_seed(self.seed)
        workers, heads = len(self.offsets), self.kv_heads * self.group
        memory = [self.memory[i % len(self.memory)] for i in range(1 + 2 * len(self.lengths))]

        def tensor(shape: tuple[int, ...], how: str) -> torch.Tensor:
            return laid_out(torch.randn(shape, generator=generator).to(self.dtype), how)

        query = tensor((workers, self.query_tokens, heads, self.dim), memory[0])
        keys = [
            tensor((n, self.kv_heads, self.dim), how)
            for n, how in zip(self.lengths, memory[1::2], strict=True)
        ]
        values = [
            tensor((n, self.kv_heads, self.value_dim), how)
            for n, how in zip(self.lengths, memory[2::2], strict=True)
        ]
        offsets = np.array(self.offsets, dtype=np.int32).reshape(workers, len(self.lengths))
        options = {
            "inv_freq": as_host(inverse_frequencies(self.rotary_dim, self.rope_base), self.host),
            "query_lengths": self.query_lengths,
            "scale": self.scale,
            "rope_scale": self.rope_scale,
            "interleaved": self.interleaved,
            "softcap": self.softcap,
            "window": self.window,
        }
        if self.query_lengths is not None:
            options["query_lengths"] = as_host(np.array(self.query_lengths, np.int32), self.host)
        return Case(query, keys, values, as_host(offsets, self.host), options)


def pooled_errors(cases: Iterable[Case]) -> tuple[float, float]:
    """Relative errors of the op and of the eager reference, by norm over all cases."""
    ours = eager = size = 0.0
    for case in cases:
        expected, _ = case.reference()
        unit = expected.abs().max().item() or 1.0  # squares of large values would overflow
        ours += ((case.run()[0].double() - expected) / unit).square().sum().item()
        eager += ((case.eager().double() - expected) / unit).square().sum().item()
        size += (expected / unit).square().sum().item()
    return (ours / size) ** 0.5, (eager / size) ** 0.5


def inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> np.ndarray[Any, Any]:
    """Llama's: base ** (-2j / R), float32 [R/2]."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / max(rotary_dim, 1)
    return (base**-exponents).astype(np.float32)


def as_host(data: np.ndarray[Any, Any], kind: str) -> Any:
    """Host data in each of the forms that the op takes."""
    return {"list": data.tolist, "numpy": lambda: data, "torch": lambda: torch.from_numpy(data)}[
        kind
    ]()


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """`x` [..., tokens, heads, dim] with the same elements and other strides.

    What lies between and around them is nan, so that whoever reads it shows it.
    """
    *outer, tokens, heads, dim = x.shape
    if how == "dense":
        return x.contiguous()
    if how == "heads first":
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if how == "inside":
        buffer = x.new_full((*outer, tokens + 70, heads + 2, dim + 24), torch.nan)
        view = buffer[..., 3 : 3 + tokens, 1 : 1 + heads, 8 : 8 + dim]
    elif how == "misaligned":
        buffer = x.new_full((*outer, tokens + 2, heads, dim + 3), torch.nan)
        view = buffer[..., 1 : 1 + tokens, :, 1 : 1 + dim]
    elif how == "every other token":
        buffer = x.new_full((*outer, 2 * tokens + 2, heads, dim), torch.nan)
        view = buffer[..., 1 : 1 + 2 * tokens : 2, :, :]
    else:
        raise ValueError(f"how: expected one of {MEMORY}, got {how!r}")
    view.copy_(x)
    return view


def offsets_of_views(
    views: Sequence[Sequence[int]], lengths: Sequence[int], query_lengths: Sequence[int]
) -> list[list[int]]:
    """Position of each worker's first new token, counted from each segment's first token."""
    table = [[HIDDEN] * len(lengths) for _ in views]
    for row, view, brought in zip(table, views, query_lengths, strict=True):
        for place, segment in enumerate(view):
            row[segment] = sum(lengths[s] for s in view[place:]) - brought
    return table


def random_case(
    generator: torch.Generator,
    dtype: torch.dtype,
    views: Sequence[Sequence[int]],
    lengths: Sequence[int],
    query_lengths: Sequence[int],
    *,
    kv_heads: int = 2,
    group: int = 3,
    dim: int = 64,
    value_dim: int | None = None,
    rotary_dim: int | None = None,
    **options: Any,
) -> Case:
    """A plain case of workers with views, standard normal and dense.

    On a GPU the head dimension is the next one that it has.
    """
    if ON_A_GPU:
        dim = value_dim = next(d for d in GPU_DIMS if d >= max(dim, value_dim or dim))

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = tensor(len(views), max(query_lengths), kv_heads * group, dim)
    keys = [tensor(n, kv_heads, dim) for n in lengths]
    values = [tensor(n, kv_heads, value_dim or dim) for n in lengths]
    given = {
        "inv_freq": inverse_frequencies(dim if rotary_dim is None else rotary_dim),
        "query_lengths": list(query_lengths),
        **options,
    }
    return Case(query, keys, values, offsets_of_views(views, lengths, query_lengths), given)


UGLY_LENGTHS = [0, 1, 2, 3, 17, 63, 64, 65, 127, 128, 129, 192, 255, 256, 257]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that the op accepts, small enough for the oracle."""
    workers = draw(st.integers(1, 5))
    segments = draw(st.integers(1, 6))
    query_tokens = draw(st.integers(1, 4) | st.integers(1, 20))
    lengths = draw(
        st.lists(
            st.sampled_from(UGLY_LENGTHS) | st.integers(0, 300),
            min_size=segments,
            max_size=segments,
        )
    )
    query_lengths = draw(
        st.none() | st.lists(st.integers(0, query_tokens), min_size=workers, max_size=workers)
    )
    if draw(st.booleans()):
        offsets = draw(_offsets_of_drawn_views(workers, lengths, query_tokens, query_lengths))
    else:
        offsets = [[draw(_any_offset(n, query_tokens)) for n in lengths] for _ in range(workers)]

    dim, value_dim = draw(_head_dims())
    half_rotary = draw(st.just(dim // 2) | st.integers(0, dim // 2))
    return Layout(
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=draw(st.sampled_from(DTYPES)),
        query_tokens=query_tokens,
        query_lengths=query_lengths,
        lengths=lengths,
        offsets=offsets,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8])),
        dim=dim,
        value_dim=value_dim,
        rotary_dim=2 * half_rotary,
        rope_base=draw(st.sampled_from([0.25, 2.0, 10000.0, 500000.0])),
        interleaved=draw(st.booleans()),
        rope_scale=draw(st.just(1.0) | st.floats(0.5, 1.5)),
        softcap=draw(st.just(0.0) | st.floats(0.25, 50.0)),
        window=draw(st.none() | st.integers(1, 400) | st.sampled_from([1, 64, FURTHEST])),
        scale=draw(st.none() | st.floats(-1.0, 1.0).map(lambda x: x * dim**-0.5)),
        host=draw(st.sampled_from(["list", "numpy", "torch"])),
        memory=draw(st.lists(st.sampled_from(MEMORY), min_size=1, max_size=4)),
    )


@st.composite
def _head_dims(draw: st.DrawFn) -> tuple[int, int]:
    """D and Dv: the usual ones, or any multiples of 8 up to 256; on a GPU the usual ones, equal."""
    usual = st.sampled_from(GPU_DIMS)
    if ON_A_GPU:
        return (dim := draw(usual)), dim
    any_dim = st.integers(1, 32).map(lambda n: 8 * n)
    dim = draw(usual | any_dim)
    return dim, draw(st.just(dim) | usual | any_dim)


def _any_offset(length: int, query_tokens: int) -> st.SearchStrategy[int]:
    return st.one_of(
        st.just(HIDDEN),
        st.integers(0, length + query_tokens),
        st.integers(-query_tokens - 2, 2),  # nothing is seen, or by the last queries only
        st.integers(HIDDEN + 1, FURTHEST),
        st.sampled_from([HIDDEN + 1, -1, 2**20 + 7, FURTHEST]),
    )


@st.composite
def _offsets_of_drawn_views(
    draw: st.DrawFn,
    workers: int,
    lengths: list[int],
    query_tokens: int,
    query_lengths: list[int] | None,
) -> list[list[int]]:
    """What a cache would ask: workers read some of the segments, each in its own order."""
    order = st.permutations(range(len(lengths)))
    views = [draw(order)[: draw(st.integers(0, len(lengths)))] for _ in range(workers)]
    brought = [query_tokens] * workers if query_lengths is None else query_lengths
    return offsets_of_views(views, lengths, brought)
