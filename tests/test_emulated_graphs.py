"""CUDA graphs of a step, captured and replayed by the emulated runtime.

A captured launch keeps its grid, its kernel and its addresses; everything else must come from the
tables of the step that replays it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import hogwild_ext as hx
from compare import assert_same_bits
from conftest import EMULATED
from emulator.backend import EmulatedGraph
from hogwild_ext.cache import Segment, SegmentCache

if EMULATED is None:
    pytest.skip("needs HOGWILD_EMULATE=1; test_emulated.py sets it", allow_module_level=True)

LAYERS, KV_HEADS, HEADS, DIM = 2, 2, 6, 64
INV_FREQ = 1e4 ** (-torch.arange(0, DIM, 2) / DIM)


class Model:
    """Random queries, keys and values in tensors that stay where they are, as a graph needs."""

    def __init__(self, tokens: int, dtype: torch.dtype, heads: int = HEADS) -> None:
        self.query = [torch.zeros(tokens, heads, DIM, dtype=dtype) for _ in range(LAYERS)]
        self.key = [torch.zeros(tokens, KV_HEADS, DIM, dtype=dtype) for _ in range(LAYERS)]
        self.value = [torch.zeros(tokens, KV_HEADS, DIM, dtype=dtype) for _ in range(LAYERS)]
        self.out = [torch.zeros(tokens, heads, DIM, dtype=dtype) for _ in range(LAYERS)]

    def draw(self, generator: torch.Generator, tokens: int) -> None:
        """New numbers in the first `tokens` rows, nan where nobody should look."""
        for tensor in (*self.query, *self.key, *self.value):
            tensor.fill_(torch.nan)
            shape = tokens, *tensor.shape[1:]
            tensor[:tokens] = torch.randn(shape, generator=generator)

    def attend(self, step: hx.Step, tokens: int) -> None:
        for layer in range(LAYERS):
            rows = [t[layer][:tokens] for t in (self.query, self.key, self.value)]
            step.attend(layer, *rows, out=self.out[layer][:tokens])


def make_cache(dtype: torch.dtype) -> SegmentCache:
    return SegmentCache(
        LAYERS, KV_HEADS, DIM, inv_freq=INV_FREQ, max_tokens=4096, spare_pages=300, dtype=dtype
    )


def append(cache: SegmentCache, segment: Segment, tokens: int) -> None:
    model = Model(tokens, cache.dtype)
    model.draw(torch.Generator().manual_seed(tokens), tokens)
    with cache.step([[segment]], [tokens]) as step:
        model.attend(step, tokens)


Views = list[list[Segment]]


def capture(cache: SegmentCache, model: Model, views: Views, sizes: Sequence[int]) -> EmulatedGraph:
    """A graph of a step, which it runs too."""
    with cache.step(views, sizes) as step:
        step.prepare(HEADS)
        with EMULATED.backend.capture() as graph:
            model.attend(step, sum(sizes))
        step.replay(graph)
    return graph


def segments(cache: SegmentCache, *names: str) -> Views:
    """A view for each word: one letter is one segment."""
    known = {segment.name: segment for segment in cache.segments}
    return [[known[letter] for letter in name] for name in names]


@pytest.mark.parametrize(
    ("dtype", "workers"), [(torch.float16, 1), (torch.float32, 3), (torch.bfloat16, 7)]
)
def test_replays_equal_plain_steps(dtype: torch.dtype, workers: int, seed: int) -> None:
    """The captured step has one short segment; later ones have longer and more segments, other
    views, fewer workers, results to merge, and pages that a commit moved about."""
    names = "abcdefg"[:workers]
    # (what happens before, the views, the tokens of each)
    turns: list[tuple[str, tuple[str, ...], list[int]]] = [
        ("", tuple(names), [2] * workers),
        ("", tuple("p" + name for name in names), [2] * workers),
        ("append", tuple("p" + name for name in reversed(names)), [1] * workers),
        ("", ("pa",), [2 * workers]),
        ("commit", tuple("ph" + name for name in names), [1] * workers),
        ("many", ("p" + "".join(chr(0x4E00 + i) for i in range(12)) + "a",), [2]),
    ]
    outs: list[list[torch.Tensor]] = []
    for captured in (True, False):
        cache = make_cache(dtype)
        for name in "ph" + names:
            cache.segment(name)
        (prompt,), (first,) = segments(cache, "p", "a")
        append(cache, prompt, 3)
        model = Model(2 * workers, dtype)
        generator = torch.Generator().manual_seed(seed)
        graph = None
        outs.append([])
        for before, words, sizes in turns:
            if before == "append":
                append(cache, prompt, 140)
            elif before == "commit":
                cache.commit(first, segments(cache, "h")[0][0])
            elif before == "many":
                for i in range(12):
                    append(cache, cache.segment(chr(0x4E00 + i)), 3 * i + 1)
            views, tokens = segments(cache, *words), sum(sizes)
            model.draw(generator, tokens)
            if captured and graph is None:
                graph = capture(cache, model, views, sizes)
            else:
                with cache.step(views, sizes) as step:
                    if graph is not None:
                        step.replay(graph)
                    else:
                        model.attend(step, tokens)
            outs[-1] += [out[:tokens].clone() for out in model.out]
            outs[-1] += [s.keys(1) for s in cache.segments] + [s.values(0) for s in cache.segments]
    for replayed, plain in zip(*outs, strict=True):
        assert_same_bits(replayed, plain)


@pytest.mark.parametrize(
    ("tokens", "row_tiles"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 4), (30, 4)]
)
def test_the_captured_kernel_is_that_of_the_steps_own_rows(tokens: int, row_tiles: int) -> None:
    cache = make_cache(torch.bfloat16)
    graph = capture(cache, Model(tokens, cache.dtype), [[cache.segment("a")]], [tokens])
    kernels = [call.name for call in graph.calls if "attend_kernel" in call.name]
    assert len(kernels) == LAYERS
    assert all(f"Li{DIM}ELi{row_tiles}E" in name for name in kernels), kernels


def test_a_capture_is_launches_that_suit_longer_segments() -> None:
    cache = make_cache(torch.bfloat16)
    graph = capture(cache, Model(1, cache.dtype), [[cache.segment("a")]], [1])
    append_, attend, merge = graph.calls[:3]
    assert [len(graph.calls), append_.is_captured, merge.is_captured] == [3 * LAYERS, True, True]
    assert "append" in append_.name and "attend" in attend.name and "merge" in merge.name
    assert attend.grid[0] >= 1056
    assert merge.grid[:2] == (KV_HEADS, HEADS // KV_HEADS)


def test_every_layer_is_attended_by_a_replay_and_no_layer_by_a_capture() -> None:
    cache = make_cache(torch.float16)
    a, model = cache.segment("a"), Model(1, torch.float16)
    with (
        pytest.raises(ValueError, match=r"\[0, 1\] were not; .*replay"),
        cache.step([[a]], [1]) as step,
    ):
        step.prepare(HEADS)
        with EMULATED.backend.capture():
            model.attend(step, 1)
    assert len(a) == 0
    graph = capture(cache, model, [[a]], [1])
    with cache.step([[a]], [1]) as step:
        step.replay(graph)
        with pytest.raises(ValueError, match=r"^layer: .* got 1"):
            step.attend(1, *(torch.zeros(1, n, DIM).half() for n in (HEADS, KV_HEADS, KV_HEADS)))
    assert len(a) == 2


def test_what_cannot_be_replayed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = make_cache(torch.float16), make_cache(torch.float16)
    a = cache.segment("a")
    model = Model(2, torch.float16)
    graph = capture(cache, model, [[a]], [2])
    before = len(a)

    def refused(error: type[Exception], words: str, size: int = 1) -> None:
        with pytest.raises(error, match=words), cache.step([[a]], [size]) as step:
            step.replay(graph_or_not)
        assert len(a) == before

    graph_or_not: object = graph
    refused(ValueError, r"^graph: .* 3 new tokens, got one with 2", size=3)
    graph_or_not = "graph"
    refused(TypeError, r"^graph: expected a torch.cuda.CUDAGraph, got str 'graph'")
    graph_or_not = capture(other, model, [[other.segment("a")]], [2])
    refused(ValueError, r"^graph: expected one that captured a step of this cache")

    with pytest.raises(ValueError, match=r"^graph: .*no layer"), cache.step([[a]], [1]) as step:
        step.attend(0, *(torch.zeros(1, n, DIM).half() for n in (HEADS, KV_HEADS, KV_HEADS)))
        step.replay(graph)
    with (
        pytest.raises(ValueError, match=r"^graph: .*\[1\] are not"),
        cache.step([[a]], [1]) as step,
    ):
        step.prepare(HEADS)
        with EMULATED.backend.capture() as partial:
            step.attend(0, *(torch.zeros(1, n, DIM).half() for n in (HEADS, KV_HEADS, KV_HEADS)))
        step.replay(partial)
    with pytest.raises(RuntimeError, match=r"^step: .* over"):
        step.replay(graph)

    # A step whose tables outgrow the memory that they had.
    monkeypatch.setattr(type(cache._layers.step_memory), "TABLE_BYTES", 2**23)
    append(cache, a, 1)
    before = len(a)
    graph_or_not = graph
    refused(ValueError, r"^graph: .*outgrown .*capture it again")
    again = capture(cache, model, [[a]], [2])
    with cache.step([[a]], [2]) as step:
        step.replay(again)


def test_a_graph_goes_with_its_owner() -> None:
    cache = make_cache(torch.float16)
    graph = capture(cache, Model(1, torch.float16), [[cache.segment("a")]], [1])
    assert len(cache._graphs) == 1
    del graph
    assert len(cache._graphs) == 0


def test_what_copies_a_layout_is_refused_in_a_capture() -> None:
    """A graph would copy it again from memory that is no longer the step's."""
    cache = make_cache(torch.float16)
    a, b = cache.segment("a"), cache.segment("b")
    append(cache, a, 3)
    append(cache, b, 3)
    rows = [torch.zeros(1, n, DIM).half() for n in (HEADS, KV_HEADS, KV_HEADS)]
    memory = cache._layers.step_memory
    places = memory._tables.data_ptr(), memory._workspace.data_ptr()
    for prepared_for, query in ((None, rows[0]), (HEADS, rows[0][:, :4])):
        with pytest.raises(RuntimeError, match="prepare"), cache.step([[a]], [1]) as step:
            if prepared_for:
                step.prepare(prepared_for)
            with EMULATED.backend.capture():
                step.attend(0, query, *rows[1:])
    with pytest.raises(RuntimeError, match="CUDA graph"), EMULATED.backend.capture():
        cache.commit(a, b)
    with pytest.raises(RuntimeError, match="CUDA graph"), EMULATED.backend.capture():
        query = torch.zeros(1, 1, HEADS, DIM)
        key = torch.zeros(3, KV_HEADS, DIM)
        hx.concurrent_attention(query, [key], [key], [[2]], inv_freq=INV_FREQ)
    assert (memory._tables.data_ptr(), memory._workspace.data_ptr()) == places
    assert (len(a), len(b)) == (3, 3)


def test_prepare_checks_its_argument_and_its_time() -> None:
    cache = make_cache(torch.float16)
    a, model = cache.segment("a"), Model(1, torch.float16)
    step = cache.step([[a]], [1])
    with pytest.raises(RuntimeError, match=r"^step: .* not entered"):
        step.prepare(HEADS)
    with step:
        for bad, error in ((0, ValueError), (3, ValueError), (6.0, TypeError), (True, TypeError)):
            with pytest.raises(error, match=r"^num_heads: "):
                step.prepare(bad)
        step.prepare(HEADS)
        with EMULATED.backend.capture() as graph:
            model.attend(step, 1)
        with pytest.raises(RuntimeError, match=r"^step: .*before a capture"):
            step.prepare(HEADS)
        step.replay(graph)


def test_prepare_without_a_capture_is_an_ordinary_step(generator: torch.Generator) -> None:
    outs = []
    model = Model(3, torch.bfloat16)
    model.draw(generator, 3)
    for prepared in (False, True):
        cache = make_cache(torch.bfloat16)
        with cache.step([[cache.segment("a")]], [3]) as step:
            if prepared:
                step.prepare(HEADS)
            model.attend(step, 3)
        outs.append([out.clone() for out in model.out])
    for one, other in zip(*outs, strict=True):
        assert_same_bits(one, other)
