"""CUDA graphs of a step, captured and replayed by the emulated runtime."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import hogwild_ext as hx
from compare import assert_same_bits
from conftest import EMULATED
from emulator.backend import EmulatedGraph
from graph_turns import (
    DIM,
    HEADS,
    INV_FREQ,
    KV_HEADS,
    LAYERS,
    Model,
    Views,
    append,
    make_cache,
    play,
)
from hogwild_ext.cache import SegmentCache

if EMULATED is None:
    pytest.skip("needs HOGWILD_EMULATE=1; test_emulated.py sets it", allow_module_level=True)


def capture(cache: SegmentCache, model: Model, views: Views, sizes: Sequence[int]) -> EmulatedGraph:
    """A graph of a step, which it runs too."""
    with cache.step(views, sizes) as step:
        step.prepare(HEADS)
        with EMULATED.backend.capture() as graph:
            model.attend(step, sum(sizes))
        step.replay(graph)
    return graph


@pytest.mark.parametrize(
    ("dtype", "workers"), [(torch.float16, 1), (torch.float32, 3), (torch.bfloat16, 7)]
)
def test_replays_equal_plain_steps(dtype: torch.dtype, workers: int, seed: int) -> None:
    replayed = play(dtype, workers, seed, capture)
    for got, expected in zip(replayed, play(dtype, workers, seed, None), strict=True):
        assert_same_bits(got, expected)


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
    rows = [torch.zeros(1, n, DIM).half() for n in (HEADS, KV_HEADS, KV_HEADS)]
    with pytest.raises(ValueError, match=r"\[1\] were not"), cache.step([[a]], [1]) as step:
        step.attend(0, *rows)
        with EMULATED.backend.capture():  # no prepare was needed, and yet it must not count
            step.attend(1, *rows)
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
