"""The segment cache: what it stores, what it shares, and what is left after something fails."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import hogwild_ext as hx
import real_gpu
from compare import LIMITS, assert_close, assert_out_matches, assert_same_bits
from hogwild_ext import _C
from hogwild_ext._reference import reference_attention, reference_rotate
from hogwild_ext.cache import OutOfPages, Segment, SegmentCache
from hogwild_ext.pages import pages_for
from hogwild_ext.token_log import TokenLog
from op_cases import ON_A_GPU

LAYERS, KV_HEADS, HEADS = 2, 2, 6
# On a GPU keys and values have one of few dimensions, and the same.
DIM, VALUE_DIM = (64, 64) if ON_A_GPU else (16, 24)
IDS = 512  # different tokens that there are
PAGE = 64
# Steep, so that one position more or less is far from rounding; partial: 8 of 16 dims rotate.
INV_FREQ = np.array([1.0, 0.31, 0.07, 0.011], np.float32)
ROPE_SCALE = 1.25

Ids = Sequence[Sequence[int]]


class Numbers:
    """Unrotated queries, keys and values of every token id: a model that knows no context."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(LAYERS, IDS, *shape, generator=generator).to(dtype)

        self.query = normal(HEADS, DIM)
        self.key = normal(KV_HEADS, DIM)
        self.value = normal(KV_HEADS, VALUE_DIM)

    def of(self, layer: int, ids: Ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = [token for row in ids for token in row]
        return self.query[layer][flat], self.key[layer][flat], self.value[layer][flat]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors: a second thread would only wait."""
    torch.set_num_threads(1)


@pytest.fixture
def numbers(generator: torch.Generator) -> Numbers:
    return Numbers(generator)


def make_cache(**changed: Any) -> SegmentCache:
    sizes: dict[str, Any] = {
        "inv_freq": INV_FREQ,
        "max_tokens": 4096,
        "value_dim": VALUE_DIM,
        "rope_scale": ROPE_SCALE,
    }
    return SegmentCache(LAYERS, KV_HEADS, DIM, **{**sizes, **changed})


def run_step(
    cache: SegmentCache, numbers: Numbers, views: Sequence[Sequence[Segment]], ids: Ids
) -> list[torch.Tensor]:
    """A whole step; the output of each layer."""
    with cache.step(views, [len(row) for row in ids], ids) as step:
        return [step.attend(layer, *numbers.of(layer, ids)) for layer in range(LAYERS)]


def append(
    cache: SegmentCache, numbers: Numbers, segment: Segment, ids: Sequence[int]
) -> list[torch.Tensor]:
    return run_step(cache, numbers, [[segment]], [ids])


def filled(cache: SegmentCache, numbers: Numbers, name: str, ids: Sequence[int]) -> Segment:
    segment = cache.segment(name)
    if ids:
        append(cache, numbers, segment, ids)
    return segment


def some_ids(count: int, start: int = 0) -> list[int]:
    return [(start + i) % IDS for i in range(count)]


def stored_keys(numbers: Numbers, layer: int, ids: Sequence[int]) -> torch.Tensor:
    """What the keys of a segment with these tokens are, float64."""
    raw = numbers.key[layer][list(ids)].double()
    half = len(INV_FREQ)
    angles = torch.outer(
        torch.arange(len(ids), dtype=torch.float64), torch.tensor(INV_FREQ).double()
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = raw[..., :half], raw[..., half : 2 * half]
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), -1) * ROPE_SCALE
    return torch.cat((rotated, raw[..., 2 * half :]), -1)


def assert_holds(segment: Segment, numbers: Numbers, ids: Sequence[int]) -> None:
    """The segment has exactly these tokens, with their keys and values in every layer."""
    assert len(segment) == len(ids)
    assert segment.tokens == list(ids)
    for layer in range(LAYERS):
        keys, values = segment.keys(layer), segment.values(layer)
        assert keys.shape == (len(ids), KV_HEADS, DIM)
        assert values.shape == (len(ids), KV_HEADS, VALUE_DIM)
        assert_close(keys, stored_keys(numbers, layer, ids), relative=2e-6, name="keys")
        assert_same_bits(values, numbers.value[layer][list(ids)], "values")


def assert_consistent(cache: SegmentCache) -> None:
    """Pages, tables and counters agree; no page is lost or held by nobody."""
    pool = cache._pool
    held = [0] * pool.count
    rows = set()
    for segment in cache.segments:
        table = segment._table.tolist()
        assert len(table) == pages_for(len(segment)) == len(set(table))
        assert len(segment.tokens) == len(segment)
        for page in table:
            held[page] += 1
        rows |= {(table[i // PAGE], i % PAGE) for i in range(len(segment))}
    assert [pool.holders(page) for page in range(pool.count)] == held
    free = [page for page in range(pool.count) if not held[page]]
    assert pool.free_pages() == free and pool.free == len(free)
    assert cache.used_tokens == len(rows) <= cache.max_tokens
    assert cache.free_tokens == min(cache.max_tokens - len(rows), PAGE * len(free))
    assert cache._turns.newest().over


def snapshot(cache: SegmentCache) -> list[Any]:
    """Everything that must not change when something fails."""
    segments = [
        (
            segment.name,
            segment._serial,
            segment.tokens,
            segment._table.tolist(),
            [segment.keys(layer).numpy().tobytes() for layer in range(LAYERS)],
            [segment.values(layer).numpy().tobytes() for layer in range(LAYERS)],
        )
        for segment in cache.segments
    ]
    return [segments, cache._pool.free_pages(), cache.used_tokens, cache.free_tokens]


def poison_free_pages(cache: SegmentCache) -> None:
    """NaN wherever nobody should look."""
    for storage in (*cache._keys, *cache._values):
        storage[cache._pool.free_pages()] = torch.nan


def expected_attention(
    cache: SegmentCache,
    views: Sequence[Sequence[Segment]],
    query: torch.Tensor,
    sizes: Sequence[int],
    layer: int,
    attention: Callable[..., Any] = reference_attention,
) -> torch.Tensor:
    """Attention over plain tensors read from the cache after the step: [T, Hq, Dv]."""
    segments = list(cache.segments)
    indices = [[segments.index(segment) for segment in view] for view in views]
    padded = query.new_zeros(len(views), max(sizes), *query.shape[1:])
    for w, rows in enumerate(query.split(list(sizes))):
        padded[w, : len(rows)] = rows
    result = attention(
        padded,
        [segment.keys(layer) for segment in segments],
        [segment.values(layer) for segment in segments],
        hx.view_offsets(indices, [len(segment) for segment in segments], list(sizes)),
        inv_freq=cache.inv_freq,
        query_lengths=list(sizes),
        scale=cache.scale,
        rope_scale=cache.rope_scale,
        interleaved=cache.interleaved,
        softcap=cache.softcap,
        window=cache.window,
    )
    out = result[0] if isinstance(result, tuple) else result
    return torch.cat([out[w, :size] for w, size in enumerate(sizes)])


# ---- life of a segment --------------------------------------------------------------------------


def test_a_segment_from_beginning_to_end(numbers: Numbers) -> None:
    cache = make_cache()
    prompt, alice = cache.segment("prompt"), cache.segment("alice")
    assert cache.segments == (prompt, alice)
    assert (len(prompt), prompt.tokens, prompt.name, prompt.cache) == (0, [], "prompt", cache)
    assert bool(prompt), "an empty segment is not nothing"
    append(cache, numbers, prompt, some_ids(70))
    append(cache, numbers, prompt, some_ids(1, 70))
    run_step(cache, numbers, [[prompt, alice]], [[300, 301]])
    assert_holds(prompt, numbers, some_ids(71))
    assert_holds(alice, numbers, [300, 301])
    assert (cache.used_tokens, cache.free_tokens) == (73, 4096 - 73)
    assert "71 tokens" in repr(prompt) and "73 of 4096 tokens in 2 segments" in repr(cache)

    prompt.truncate(64)
    assert_holds(prompt, numbers, some_ids(64))
    assert len(prompt._table) == 1
    append(cache, numbers, prompt, [7])
    assert_holds(prompt, numbers, [*some_ids(64), 7])
    cache.free(prompt)
    assert cache.segments == (alice,)
    assert "freed" in repr(prompt)
    again = cache.segment("prompt")
    assert len(again) == 0 and again is not prompt
    assert_consistent(cache)


def test_unknown_tokens_are_minus_one(numbers: Numbers) -> None:
    cache = make_cache()
    segment = cache.segment("a")
    for tokens in (None, [[5]]):
        with cache.step([[segment]], [1], tokens) as step:
            for layer in range(LAYERS):
                step.attend(layer, *numbers.of(layer, [[5]]))
    assert segment.tokens == [-1, 5]


@pytest.mark.parametrize("kind", ["lists", "tensor", "int32 tensor"])
def test_tokens_are_kept_apart_from_the_callers(numbers: Numbers, kind: str) -> None:
    cache = make_cache()
    a, b = cache.segment("a"), cache.segment("b")
    ids: Any = [[1, 2], [3, 4]]
    if kind != "lists":
        ids = torch.tensor(ids, dtype=torch.int32 if kind == "int32 tensor" else torch.int64)
    with cache.step([[a], [b]], [2, 2], ids) as step:
        for layer in range(LAYERS):
            step.attend(layer, *numbers.of(layer, [[1, 2], [3, 4]]))
    ids[0][0] = 99
    a.tokens.append(77)
    assert (a.tokens, b.tokens) == ([1, 2], [3, 4])


def test_tokens_on_a_device_are_not_read_back(numbers: Numbers) -> None:
    # Nobody can read a meta tensor: whoever tries raises.
    cache = make_cache()
    a, b = cache.segment("a"), cache.segment("b")
    ids = torch.zeros(2, 2, dtype=torch.int64, device="meta")
    with cache.step([[a], [b]], [2, 2], ids) as step:
        for layer in range(LAYERS):
            step.attend(layer, *numbers.of(layer, [[1, 2], [3, 4]]))
    for segment in (a, b):  # and no longer the caller's, who may overwrite them
        (piece,) = segment._content.log.pieces()
        assert isinstance(piece, torch.Tensor)
        assert piece.untyped_storage()._cdata != ids.untyped_storage()._cdata
    fork = cache.fork(a)
    a.truncate(1)
    cache.commit(a, b)
    assert (len(a), len(b), len(fork)) == (0, 3, 2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        _ = fork.tokens


@given(st.lists(st.tuples(st.sampled_from("atcx"), st.integers(0, 9), st.booleans()), max_size=12))
def test_token_log_behaves_like_a_list(actions: list[tuple[str, int, bool]]) -> None:
    log, other, expected, expected_other = TokenLog(), TokenLog(), [], []
    made = []  # every log there was, with what it has to hold for ever
    for number, (action, size, flag) in enumerate(actions):
        size = size**3  # up to several blocks
        if action == "a":
            ids = [1000 * number + i for i in range(size)]
            log = log.extended(torch.tensor(ids, dtype=torch.int64) if flag else ids)
            expected = expected + ids
        elif action == "t":
            log, expected = log.head(size), expected[:size]
        elif action == "c":
            other, expected_other = (log, expected) if flag else (log.head(size), expected[:size])
        else:
            log, expected = log.joined(other), expected + expected_other
        made.append((log, expected))
        if flag:
            assert log.read() == expected
    for one, ids in [*made, (other, expected_other)]:
        assert one.length == len(ids) and one.read() == ids


def test_a_cache_goes_with_its_last_reference() -> None:
    gc.collect()
    gc.disable()
    try:
        cache = make_cache()
        segment = cache.segment("a")
        storage = weakref.ref(cache._keys[0])
        del cache
        assert storage() is None, "gigabytes would wait for the garbage collector"
        with pytest.raises(ValueError, match="deleted"):
            segment.truncate(0)
    finally:
        gc.enable()


def test_stats(numbers: Numbers) -> None:
    cache = make_cache()
    a, b = filled(cache, numbers, "a", [1, 2, 3]), filled(cache, numbers, "b", [4])
    cache.commit(a, b)
    stats = cache.stats
    assert (stats.steps, stats.appended_tokens, stats.committed_tokens) == (2, 4, 3)
    assert 0 < stats.attention_seconds < 10
    with pytest.raises(ValueError), cache.step([[a]], [1]):
        pass
    assert (stats.steps, stats.appended_tokens) == (2, 4)


# ---- forks --------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[SegmentCache, Numbers, Segment], list[int] | None]] = {}


def change(function: Callable[..., Any]) -> Callable[..., Any]:
    CHANGES[function.__name__] = function
    return function


@change
def nothing(cache: SegmentCache, numbers: Numbers, segment: Segment) -> list[int]:
    return segment.tokens


@change
def append_one(cache: SegmentCache, numbers: Numbers, segment: Segment) -> list[int]:
    before, new = segment.tokens, [200 + segment._serial]
    append(cache, numbers, segment, new)
    return before + new


@change
def append_a_page(cache: SegmentCache, numbers: Numbers, segment: Segment) -> list[int]:
    before, new = segment.tokens, some_ids(65, 300 + segment._serial)
    append(cache, numbers, segment, new)
    return before + new


@change
def truncate_and_append(cache: SegmentCache, numbers: Numbers, segment: Segment) -> list[int]:
    keep, new = len(segment) * 2 // 3, [400 + segment._serial]
    before = segment.tokens[:keep]
    segment.truncate(keep)
    append(cache, numbers, segment, new)
    return before + new


@change
def commit_into(cache: SegmentCache, numbers: Numbers, segment: Segment) -> list[int]:
    before, new = segment.tokens, some_ids(3, 450 + segment._serial)
    source = filled(cache, numbers, f"into {segment.name}", new)
    cache.commit(source, segment)
    assert_holds(source, numbers, [])
    return before + new


@change
def commit_elsewhere(cache: SegmentCache, numbers: Numbers, segment: Segment) -> list[int]:
    target = filled(cache, numbers, f"from {segment.name}", [480])
    moved = segment.tokens
    cache.commit(segment, target)
    assert_holds(target, numbers, [480, *moved])
    return []


@change
def freed(cache: SegmentCache, numbers: Numbers, segment: Segment) -> None:
    cache.free(segment)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("first", CHANGES)
@pytest.mark.parametrize("second", CHANGES)
def test_a_fork_and_its_original_go_their_own_ways(
    numbers: Numbers, length: int, first: str, second: str
) -> None:
    cache = make_cache()
    original = filled(cache, numbers, "original", some_ids(length))
    fork = cache.fork(original)
    witness = cache.fork(original, "witness") if length % 2 else None
    assert fork.name == "original.1"
    assert cache.used_tokens == length, "forks cost nothing"
    expected = [
        CHANGES[first](cache, numbers, original),
        CHANGES[second](cache, numbers, fork),
    ]
    for segment, ids in zip((original, fork), expected, strict=True):
        if ids is None:
            assert segment not in cache.segments
        else:
            assert_holds(segment, numbers, ids)
    if witness is not None:
        assert_holds(witness, numbers, some_ids(length))
    assert_consistent(cache)


@pytest.mark.parametrize("cut", [65, 66, 100, 126, 127])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("fails", [False, True])
def test_forks_that_share_a_page_grow_in_one_step(
    numbers: Numbers, cut: int, order: tuple[int, ...], fails: bool
) -> None:
    # The three end in different rows of one page; whoever writes into it in place must not hit
    # what another would have again if the step failed.
    cache = make_cache()
    ids = some_ids(127)
    segments = [filled(cache, numbers, "a", ids)]
    segments += [cache.fork(segments[0], "b"), cache.fork(segments[0], "c")]
    segments[1].truncate(cut)
    segments[2].truncate(66)
    before = [segment.tokens for segment in segments]
    views = [[segments[i]] for i in order]
    new = [[400 + i, 410 + i] for i in order]
    if fails:
        with pytest.raises(ZeroDivisionError), cache.step(views, [2, 2, 2], new) as step:
            for layer in range(LAYERS):
                step.attend(layer, *numbers.of(layer, new))
            raise ZeroDivisionError
        new = [[], [], []]
    else:
        run_step(cache, numbers, views, new)
        own_pages = sum(pages_for(len(segment)) - 1 for segment in segments)
        assert cache._pool.used == 1 + own_pages, "the last to write needs no copy"
    for i, extra in zip(order, new, strict=True):
        assert_holds(segments[i], numbers, before[i] + extra)
    assert_consistent(cache)


def test_forks_get_the_first_free_name(numbers: Numbers) -> None:
    cache = make_cache()
    a = cache.segment("a")
    cache.segment("a.2")
    assert [cache.fork(a).name for _ in range(3)] == ["a.1", "a.3", "a.4"]
    assert cache.fork(a, "else").name == "else"


# ---- commit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 63, 64, 129])
@pytest.mark.parametrize("count", [0, 1, 64, 130])
def test_commit_moves_tokens_behind_others(numbers: Numbers, start: int, count: int) -> None:
    cache = make_cache()
    source = filled(cache, numbers, "source", some_ids(count, 100))
    target = filled(cache, numbers, "target", some_ids(start))
    cache.commit(source, target)
    assert_holds(target, numbers, some_ids(start) + some_ids(count, 100))
    assert_holds(source, numbers, [])
    assert cache.stats.committed_tokens == count
    append(cache, numbers, source, [7])
    assert_holds(source, numbers, [7])
    assert_consistent(cache)


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray, list])
def test_frequencies_are_kept_apart_from_the_callers(
    numbers: Numbers, kind: Callable[[np.ndarray], Any]
) -> None:
    theirs = kind(INV_FREQ.copy())
    cache = make_cache(inv_freq=theirs)
    for j in range(len(INV_FREQ)):
        theirs[j] = 0.5
    assert_holds(filled(cache, numbers, "a", some_ids(9)), numbers, some_ids(9))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inv_freq", [INV_FREQ, INV_FREQ[:0], np.repeat(INV_FREQ, 2)])
def test_commit_rotates_like_the_reference(
    numbers: Numbers, interleaved: bool, inv_freq: np.ndarray
) -> None:
    cache = make_cache(interleaved=interleaved, inv_freq=inv_freq)
    target = filled(cache, numbers, "target", some_ids(65))
    cache.commit(filled(cache, numbers, "source", some_ids(70, 65)), target)
    for layer in range(LAYERS):
        expected = reference_rotate(
            numbers.key[layer][some_ids(135)],
            inv_freq,
            range(135),
            rope_scale=ROPE_SCALE,
            interleaved=interleaved,
        )
        assert_close(target.keys(layer), expected, relative=2e-6, name="keys")


def test_rope_scale_is_applied_once_however_often_keys_move(numbers: Numbers) -> None:
    cache = make_cache(rope_scale=ROPE_SCALE)
    segment = filled(cache, numbers, "0", some_ids(5, 50))
    ids = some_ids(5, 50)
    for i in range(1, 6):
        target = filled(cache, numbers, str(i), [i] * i)
        cache.commit(segment, target)
        segment, ids = target, [i] * i + ids
    assert_holds(segment, numbers, ids)


def test_expected_keys_are_those_of_the_reference(numbers: Numbers) -> None:
    ids = some_ids(67)
    reference = reference_rotate(numbers.key[0][ids], INV_FREQ, range(67), rope_scale=ROPE_SCALE)
    assert_close(stored_keys(numbers, 0, ids), reference, relative=1e-14)


@pytest.mark.parametrize("dtype", LIMITS)
def test_half_types_store_the_rounded_rotation(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    numbers = Numbers(generator, dtype)
    cache = make_cache(dtype=dtype)
    a, b = filled(cache, numbers, "a", some_ids(70)), filled(cache, numbers, "b", some_ids(9, 80))
    eps = torch.finfo(dtype).eps
    raw = stored_keys(numbers, 1, some_ids(70))
    assert ((a.keys(1).double() - raw).abs() <= 0.5 * eps * raw.abs() + 4e-6).all()
    cache.commit(a, b)
    raw = stored_keys(numbers, 1, some_ids(9, 80) + some_ids(70))
    assert ((b.keys(1).double() - raw).abs() <= 2 * eps * (raw.abs() + 2)).all()
    assert_same_bits(b.values(1), numbers.value[1][some_ids(9, 80) + some_ids(70)])


# ---- room ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare_pages", [0, 64])
def test_exactly_max_tokens_fit(numbers: Numbers, spare_pages: int) -> None:
    cache = make_cache(max_tokens=100, spare_pages=spare_pages)
    a, b = cache.segment("a"), cache.segment("b")
    append(cache, numbers, a, some_ids(60))
    assert cache.free_tokens == 40
    before = snapshot(cache)
    with pytest.raises(OutOfPages, match=r"60 tokens are stored, 40 are free, 41 were asked for"):
        append(cache, numbers, a, some_ids(41, 60))
    with pytest.raises(OutOfPages, match=r"60 tokens are stored, 40 are free, 42 were asked for"):
        run_step(cache, numbers, [[b, a], [b]], [some_ids(21), some_ids(21)])
    assert snapshot(cache) == before
    append(cache, numbers, a, some_ids(40, 60))
    assert cache.free_tokens == 0
    with pytest.raises(OutOfPages, match="max_tokens=100") as caught:
        append(cache, numbers, b, [1])
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert (error.max_tokens, error.stored, error.free, error.asked) == (100, 100, 0, 1)
    a.truncate(99)
    append(cache, numbers, b, [1]) if spare_pages else append(cache, numbers, a, [1])
    assert_consistent(cache)


def test_pages_can_run_out_before_tokens(numbers: Numbers) -> None:
    cache = make_cache(max_tokens=128, spare_pages=1)
    segments = [filled(cache, numbers, str(i), [i]) for i in range(3)]
    assert (cache.used_tokens, cache.free_tokens) == (3, 0)
    before = snapshot(cache)
    with pytest.raises(OutOfPages, match=r"0 are free, 1 were asked .* whole pages"):
        filled(cache, numbers, "one too many", [1])
    cache.free(cache.segments[-1])
    assert snapshot(cache) == before
    run_step(cache, numbers, [[s] for s in segments], [some_ids(40)] * 3)
    cache.free(segments[2])
    fork = cache.fork(segments[0])
    append(cache, numbers, fork, [1])  # takes the last page, for a copy
    before = snapshot(cache)
    second = cache.fork(segments[1])
    with pytest.raises(OutOfPages, match="shared with a fork"):
        append(cache, numbers, second, [1])
    cache.free(second)
    assert snapshot(cache) == before
    assert_consistent(cache)


@pytest.mark.cpu
@given(data=st.data())
@hypothesis_settings(max_examples=40)
def test_max_tokens_fit_however_they_are_spread(data: st.DataObject) -> None:
    segments = data.draw(st.integers(1, 5), "segments")
    cache = make_cache(max_tokens=300, spare_pages=segments)
    rest = 300
    names = [cache.segment(str(i)) for i in range(segments)]
    numbers = Numbers(torch.Generator().manual_seed(0))
    while rest:
        size = data.draw(st.integers(1, min(rest, 100)), "size")
        append(cache, numbers, data.draw(st.sampled_from(names), "segment"), some_ids(size))
        rest -= size
    assert cache.used_tokens == 300
    with pytest.raises(OutOfPages):
        append(cache, numbers, names[0], [1])


def test_commit_without_room_changes_nothing(numbers: Numbers) -> None:
    cache = make_cache(max_tokens=128, spare_pages=1)
    source = filled(cache, numbers, "source", some_ids(60))
    target = filled(cache, numbers, "target", some_ids(60, 60))
    keeper = cache.fork(source)
    before = snapshot(cache)
    # 60 tokens stay with the fork: 180 in all
    with pytest.raises(OutOfPages, match="120 tokens are stored, 8 are free, 60 were asked for"):
        cache.commit(source, target)
    assert snapshot(cache) == before
    cache.free(keeper)
    cache.commit(source, target)
    assert_holds(target, numbers, some_ids(60, 60) + some_ids(60))
    assert_consistent(cache)


def test_a_full_cache_can_still_commit(numbers: Numbers) -> None:
    cache = make_cache(max_tokens=128)
    source = filled(cache, numbers, "source", some_ids(64))
    target = filled(cache, numbers, "target", some_ids(64, 64))
    assert cache.free_tokens == 0
    cache.commit(source, target)
    assert_holds(target, numbers, some_ids(64, 64) + some_ids(64))
    assert cache.used_tokens == 128


def test_memory_is_used_from_the_low_end(numbers: Numbers) -> None:
    # What the operating system commits on first touch stays small if low pages come first.
    cache = make_cache()
    a, b = filled(cache, numbers, "a", some_ids(129)), filled(cache, numbers, "b", [1])
    cache.free(a)
    c = filled(cache, numbers, "c", some_ids(200))
    assert (b._table.tolist(), c._table.tolist()) == ([3], [0, 1, 2, 4])


# ---- what attend computes -----------------------------------------------------------------------


@contextmanager
def team(cache: SegmentCache, numbers: Numbers) -> Iterator[list[list[Segment]]]:
    """Views of three workers over segments of ugly lengths, an empty one among them."""
    prompt = filled(cache, numbers, "prompt", some_ids(131))
    empty = cache.segment("empty")
    alice, bob = filled(cache, numbers, "alice", some_ids(17, 140)), cache.segment("bob")
    carol = filled(cache, numbers, "carol", some_ids(64, 200))
    hidden = filled(cache, numbers, "hidden", some_ids(3, 300))
    assert len(empty) == 0 and len(hidden) == 3
    yield [[prompt, empty, bob, alice], [prompt, carol, alice, bob], [bob, carol]]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 70},
    "softcap": {"softcap": 3.0},
    "interleaved": {"interleaved": True},
    "scale": {"scale": 0.5 * DIM**-0.5},  # larger ones make rounding the query weigh more
    "no rotation": {"inv_freq": []},
    "values as wide as keys": {"value_dim": None},
}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attend_is_the_op_over_what_is_stored(
    generator: torch.Generator, dtype: torch.dtype, variant: str
) -> None:
    numbers = Numbers(generator, dtype)
    if variant == "values as wide as keys":
        numbers.value = numbers.value[..., :DIM]
    cache = make_cache(dtype=dtype, **VARIANTS[variant])
    with team(cache, numbers) as views:
        for sizes in ([1, 1, 1], [2, 65, 1], [1, 3, 130]):
            ids = [some_ids(size, 400 + w) for w, size in enumerate(sizes)]
            outs = run_step(cache, numbers, views, ids)
            for layer, out in enumerate(outs):
                query = numbers.of(layer, ids)[0]
                assert out.shape == (sum(sizes), HEADS, cache.value_dim)
                expected = expected_attention(cache, views, query, sizes, layer)
                assert_out_matches(out, expected)
                on_tensors = expected_attention(
                    cache, views, query, sizes, layer, hx.concurrent_attention
                )
                assert_same_bits(out, on_tensors, "paged against plain tensors")


def test_attend_from_raw_keys_to_output(numbers: Numbers) -> None:
    # Nothing is read back from the cache: keys rotated by the reference, a commit in between.
    cache = make_cache()
    prompt, alice = cache.segment("prompt"), cache.segment("alice")
    append(cache, numbers, prompt, some_ids(40))
    run_step(cache, numbers, [[prompt, alice]], [some_ids(30, 40)])
    cache.commit(alice, prompt)
    ids = [some_ids(5, 70)]
    outs = run_step(cache, numbers, [[prompt, alice]], ids)
    everything = some_ids(75)
    for layer in range(LAYERS):
        query, _, _ = numbers.of(layer, ids)
        _, key, value = numbers.of(layer, [everything])
        keys = reference_rotate(key, INV_FREQ, range(75), rope_scale=ROPE_SCALE)
        expected, _ = reference_attention(
            query[None], [keys], [value], [[70]], inv_freq=INV_FREQ, rope_scale=ROPE_SCALE
        )
        assert_out_matches(outs[layer], expected[0])


def test_offsets_are_those_of_view_offsets(numbers: Numbers) -> None:
    cache = make_cache()
    with team(cache, numbers) as views:
        sizes = [3, 1, 70]
        step = cache.step(views, sizes)
        order = sorted({s for view in views for s in view}, key=lambda s: s._serial)
        lengths = {s: len(s) for s in order}
        for view, size in zip(views, sizes, strict=True):
            lengths[view[-1]] += size
        indices = [[order.index(s) for s in view] for view in views]
        expected = hx.view_offsets(indices, [lengths[s] for s in order], sizes)
        assert np.array_equal(step._offsets, expected.numpy())
        assert (step.query_lengths, step.num_tokens) == ((3, 1, 70), 74)


@pytest.mark.parametrize("others", [1, 3, pytest.param(30, marks=pytest.mark.cpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whoever_else_is_in_the_step(
    generator: torch.Generator, others: int, dtype: torch.dtype
) -> None:
    numbers = Numbers(generator, dtype)

    def run(company: int, threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        cache = make_cache(dtype=dtype, max_tokens=2**15)
        prompt = filled(cache, numbers, "prompt", some_ids(300))
        strangers = []
        for i in range(company):  # created between the segments that our worker sees
            strangers.append(filled(cache, numbers, f"stranger {i}", some_ids(33 * i % 257, i)))
        note, mine = filled(cache, numbers, "note", some_ids(77, 9)), cache.segment("mine")
        views, ids = [[note, prompt, mine]], [[1, 2, 3]]
        for i, stranger in enumerate(strangers):
            views.insert(i % 2, [prompt, *strangers[:i], stranger])
            ids.insert(i % 2, some_ids(100 if i == 0 else 1, i))
        place = next(w for w, view in enumerate(views) if view[-1] is mine)
        start = sum(len(row) for row in ids[:place])
        return [out[start : start + 3] for out in run_step(cache, numbers, views, ids)]

    alone = run(0, 1)
    for threads in (1, 2, 3):
        for mine, expected in zip(run(others, threads), alone, strict=True):
            assert_same_bits(mine, expected)


def test_same_bits_in_any_pages(numbers: Numbers) -> None:
    def run(cache: SegmentCache) -> torch.Tensor:
        prompt = filled(cache, numbers, "prompt", some_ids(200))
        return run_step(cache, numbers, [[prompt, cache.segment("a")]], [[1]])[1]

    fresh, used = make_cache(), make_cache()
    for i in range(9):
        filled(used, numbers, str(i), some_ids(65))
    for i in (7, 2, 4):
        used.free(used.segments[i])
    poison_free_pages(used)
    assert_same_bits(run(used), run(fresh))


def test_recycled_pages_leave_no_trace(numbers: Numbers) -> None:
    cache = make_cache()
    poison_free_pages(cache)
    with team(cache, numbers) as views:
        outs = run_step(cache, numbers, views, [[1, 2], [3], some_ids(66)])
        for out in outs:
            assert torch.isfinite(out).all()
        for segment in list(cache.segments):
            assert torch.isfinite(segment.keys(0)).all() and torch.isfinite(segment.values(1)).all()
        cache.commit(views[0][-1], views[2][-1])
        fork = cache.fork(views[2][-1])
        poison_free_pages(cache)
        outs = run_step(cache, numbers, [[fork], views[2]], [[1], [2]])
        assert all(torch.isfinite(out).all() for out in outs)


def test_strided_tensors_and_out(numbers: Numbers) -> None:
    plain, strided = make_cache(), make_cache()
    ids = [some_ids(5), some_ids(3, 9)]
    outs = run_step(plain, numbers, [[plain.segment("a")], [plain.segment("b")]], ids)
    with strided.step([[strided.segment("a")], [strided.segment("b")]], [5, 3], ids) as step:
        for layer in range(LAYERS):
            query, key, value = numbers.of(layer, ids)
            heads_first = query.transpose(0, 1).contiguous().transpose(0, 1)
            fused = torch.cat((torch.zeros(8, KV_HEADS, 3), key, value), -1)
            key, value = fused[..., 3 : 3 + DIM], fused[..., 3 + DIM :]
            assert not key.is_contiguous() and key.data_ptr() % 8
            room = torch.full((HEADS, 9, VALUE_DIM), torch.nan)
            out = room[:, 1:].transpose(0, 1)
            result = step.attend(layer, heads_first, key, value, out=out)
            assert result is out
            assert_same_bits(out, outs[layer])
            assert room[:, 0].isnan().all()
    for mine, theirs in zip(strided.segments, plain.segments, strict=True):
        assert_same_bits(mine.keys(1), theirs.keys(1))
        assert_same_bits(mine.values(0), theirs.values(0))


def test_layers_in_any_order_and_with_other_head_counts(numbers: Numbers) -> None:
    cache, ids = make_cache(), [some_ids(4)]
    segment = cache.segment("a")
    with cache.step([[segment]], [4], ids) as step:
        query, key, value = numbers.of(1, ids)
        wide = step.attend(1, query, key, value)
        query, key, value = numbers.of(0, ids)
        narrow = step.attend(0, query[:, :2].contiguous(), key, value)
    assert_holds(segment, numbers, ids[0])
    assert_out_matches(wide, expected_attention(cache, [[segment]], numbers.of(1, ids)[0], [4], 1))
    query = numbers.of(0, ids)[0][:, :2]
    assert_out_matches(narrow, expected_attention(cache, [[segment]], query, [4], 0))


# ---- when something fails -----------------------------------------------------------------------


@pytest.fixture
def crowd(numbers: Numbers) -> tuple[SegmentCache, list[list[Segment]], Ids]:
    """A cache with forks and an argument list for a step that copies, fills and opens pages."""
    cache = make_cache()
    a, b = filled(cache, numbers, "a", some_ids(70)), filled(cache, numbers, "b", some_ids(63, 70))
    c = cache.fork(a)
    c.truncate(66)
    views = [[b, a], [a, c], [a, c, b]]
    return cache, views, [[1, 2], [3], some_ids(70)]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, MemoryError])
@pytest.mark.parametrize("layers_done", range(LAYERS + 1))
def test_an_exception_in_a_step_leaves_everything(
    numbers: Numbers, crowd: Any, layers_done: int, error: type[BaseException]
) -> None:
    cache, views, ids = crowd
    before = snapshot(cache)
    with pytest.raises(error, match=r"^on purpose$"), cache.step(views, [2, 1, 70], ids) as step:
        for layer in range(layers_done):
            step.attend(layer, *numbers.of(layer, ids))
        raise error("on purpose")
    assert snapshot(cache) == before
    assert_consistent(cache)
    run_step(cache, numbers, views, ids)
    a, b, c = cache.segments
    assert_holds(a, numbers, some_ids(70) + ids[0])
    assert_holds(c, numbers, some_ids(66) + ids[1])
    assert_holds(b, numbers, some_ids(63, 70) + ids[2])
    assert_consistent(cache)


@pytest.mark.parametrize("layers", [[], [0], [1]])
def test_a_step_needs_every_layer(numbers: Numbers, crowd: Any, layers: list[int]) -> None:
    cache, views, ids = crowd
    before = snapshot(cache)
    missing = [layer for layer in range(LAYERS) if layer not in layers]
    with (
        pytest.raises(ValueError, match=rf"^step: .* layers \[{', '.join(map(str, missing))}\]"),
        cache.step(views, [2, 1, 70], ids) as step,
    ):
        for layer in layers:
            step.attend(layer, *numbers.of(layer, ids))
    assert snapshot(cache) == before


def test_a_layer_twice_is_refused(numbers: Numbers, crowd: Any) -> None:
    cache, views, ids = crowd
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"^layer: .*got 1"), cache.step(views, [2, 1, 70]) as step:
        step.attend(1, *numbers.of(1, ids))
        step.attend(1, *numbers.of(1, ids))
    assert snapshot(cache) == before


KERNELS = (
    [(_C.cuda, "append"), (_C.cuda, "attend"), (_C.cuda, "move"), (_C, "Plan")]
    if ON_A_GPU and not real_gpu.is_pretended()
    else [(_C, "append"), (_C, "attend_paged"), (_C, "copy_pages"), (_C, "Plan")]
)


@pytest.mark.parametrize(("module", "name"), KERNELS, ids=[name for _, name in KERNELS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kernel_that_raises(
    numbers: Numbers, crowd: Any, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, when: str
) -> None:
    cache, views, ids = crowd
    before = snapshot(cache)
    kernel, calls = getattr(module, name), []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(name)
        if when == "after":
            kernel(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, name, failing)
        with pytest.raises(KeyboardInterrupt):
            run_step(cache, numbers, views, ids)
    assert calls == [name]
    assert snapshot(cache) == before
    assert_consistent(cache)
    run_step(cache, numbers, views, ids)


def test_fresh_steps_after_a_failure_give_the_same_bits(numbers: Numbers) -> None:
    def run(fail: bool) -> list[torch.Tensor]:
        cache = make_cache()
        a = filled(cache, numbers, "a", some_ids(70))
        b = cache.fork(a)
        if fail:
            with pytest.raises(KeyboardInterrupt), cache.step([[b, a], [b]], [90, 9]) as step:
                step.attend(0, *numbers.of(0, [some_ids(90, 99), some_ids(9)]))
                raise KeyboardInterrupt
        outs = run_step(cache, numbers, [[b, a], [b]], [[1, 2], [3]])
        return [*outs, *(s.keys(0) for s in cache.segments)]

    for one, other in zip(run(True), run(False), strict=True):
        assert_same_bits(one, other)


def test_nothing_else_happens_while_a_step_is_open(numbers: Numbers, crowd: Any) -> None:
    cache, views, ids = crowd
    a, b, c = cache.segments
    forbidden: dict[str, Callable[[], Any]] = {
        "truncate": lambda: a.truncate(0),
        "commit": lambda: cache.commit(a, b),
        "free": lambda: cache.free(c),
        "fork": lambda: cache.fork(a),
        "segment": lambda: cache.segment("new"),
        "step": lambda: cache.step([[a]], [1]),
    }
    outer = cache.step(views, [2, 1, 70], ids)
    inner = cache.step([[a]], [1])
    with outer as step:
        for layer in range(LAYERS):
            for what, action in forbidden.items():
                with pytest.raises(RuntimeError, match=f"^{what}: .*'step'"):
                    action()
            with pytest.raises(RuntimeError, match=r"^step: .*'step'"), inner:
                pass
            with pytest.raises(RuntimeError, match=r"^step: .* open"), outer:
                pass
            step.attend(layer, *numbers.of(layer, ids))
            assert len(a) == 70 and a.tokens == some_ids(70), "grown only when the step has ended"
    assert_holds(a, numbers, [*some_ids(70), 1, 2])
    assert_holds(c, numbers, [*some_ids(66), 3])

    with pytest.raises(RuntimeError, match=r"^step: .* over"):
        step.attend(0, *numbers.of(0, ids))
    with pytest.raises(RuntimeError, match=r"^step: .* over"), step:
        pass
    with pytest.raises(RuntimeError, match="changed"), inner:
        pass
    stale = cache.step([[a]], [1])
    b.truncate(60)
    with pytest.raises(RuntimeError, match="changed"), stale:
        pass
    step.abandon()
    assert len(a) == 72, "too late to abandon"
    with pytest.raises(RuntimeError, match=r"^step: .* not entered"):
        cache.step([[a]], [1]).attend(0, *numbers.of(0, [[1]]))
    assert_consistent(cache)


def test_two_caches_may_step_at_once(numbers: Numbers) -> None:
    one, two = make_cache(), make_cache()
    a, b = one.segment("a"), two.segment("a")
    with one.step([[a]], [1], [[1]]) as first, two.step([[b]], [1], [[2]]) as second:
        for layer in range(LAYERS):
            first.attend(layer, *numbers.of(layer, [[1]]))
            second.attend(layer, *numbers.of(layer, [[2]]))
    assert_holds(a, numbers, [1])
    assert_holds(b, numbers, [2])


# ---- bad arguments ------------------------------------------------------------------------------


def test_max_position(numbers: Numbers) -> None:
    cache = make_cache(max_position=75)
    a, b = filled(cache, numbers, "a", some_ids(70)), cache.segment("b")
    run_step(cache, numbers, [[a, b]], [some_ids(5)])
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"^views\[1\]: .*max_position=75.*got 77"):
        cache.step([[b], [b, a]], [1, 1])
    with pytest.raises(ValueError, match=r"^views\[0\]: .*max_position=75.*got 76"):
        cache.step([[a, b]], [1])
    assert snapshot(cache) == before
    with cache.step([[a, b]], [1], allow_beyond=True) as step:
        for layer in range(LAYERS):
            step.attend(layer, *numbers.of(layer, [[1]]))
    assert len(b) == 6


BAD_CACHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_layers": 0}, ValueError, "num_layers"),
    ({"num_layers": 2.0}, TypeError, "num_layers"),
    ({"num_kv_heads": "2"}, TypeError, "num_kv_heads"),
    ({"num_kv_heads": -1}, ValueError, "num_kv_heads"),
    ({"head_dim": 12}, ValueError, "head_dim"),
    ({"head_dim": 264}, ValueError, "head_dim"),
    ({"head_dim": None}, TypeError, "head_dim"),
    ({"value_dim": 4}, ValueError, "value_dim"),
    ({"value_dim": True}, TypeError, "value_dim"),
    ({"inv_freq": [1.0] * (DIM // 2 + 1)}, ValueError, "inv_freq"),
    ({"inv_freq": [[1.0]]}, ValueError, "inv_freq"),
    ({"inv_freq": [float("nan")]}, ValueError, "inv_freq"),
    ({"inv_freq": "abc"}, TypeError, "inv_freq"),
    ({"max_tokens": 0}, ValueError, "max_tokens"),
    ({"max_tokens": 1e4}, TypeError, "max_tokens"),
    ({"spare_pages": -1}, ValueError, "spare_pages"),
    ({"dtype": torch.float64}, TypeError, "dtype"),
    ({"dtype": "float32"}, TypeError, "dtype"),
    ({"device": "cuda:99"}, ValueError, "device"),
    ({"device": "nowhere"}, ValueError, "device"),
    ({"device": 3}, TypeError, "device"),
    ({"rope_scale": "1"}, TypeError, "rope_scale"),
    ({"rope_scale": float("inf")}, ValueError, "rope_scale"),
    ({"interleaved": 1}, TypeError, "interleaved"),
    ({"scale": [1.0]}, TypeError, "scale"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"window": 0}, ValueError, "window"),
    ({"window": 1.5}, TypeError, "window"),
    ({"max_position": 0}, ValueError, "max_position"),
]


@pytest.mark.parametrize("changed, error, words", BAD_CACHES, ids=lambda x: str(x)[:40])
def test_bad_arguments_of_a_cache(
    changed: dict[str, Any], error: type[Exception], words: str
) -> None:
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": DIM, "inv_freq": INV_FREQ}
    with pytest.raises(error, match=f"^{words}.*: expected .*, got "):
        SegmentCache(**{**sizes, **changed})


BAD_CALLS: list[tuple[str, type[Exception], str, Callable[..., Any]]] = [
    # what, error, what the message says, call(cache, a, b, a stranger, a freed one)
    ("no name", ValueError, "name", lambda c, a, *_: c.segment("")),
    ("odd name", TypeError, "name", lambda c, a, *_: c.segment(3)),
    ("taken name", ValueError, "name: .*'a'", lambda c, a, *_: c.segment("a")),
    ("taken fork name", ValueError, "name: .*'b'", lambda c, a, *_: c.fork(a, "b")),
    ("odd fork name", TypeError, "name", lambda c, a, *_: c.fork(a, 3)),
    ("fork of a name", TypeError, "segment", lambda c, *_: c.fork("a")),
    ("fork of a stranger", ValueError, "segment: .*this cache", lambda c, a, b, s, g: c.fork(s)),
    ("fork of a freed one", ValueError, "segment: .*live", lambda c, a, b, s, g: c.fork(g)),
    ("free a stranger", ValueError, "segment: .*this cache", lambda c, a, b, s, g: c.free(s)),
    ("free twice", ValueError, "segment: .*live", lambda c, a, b, s, g: c.free(g)),
    ("free nothing", TypeError, "segment", lambda c, *_: c.free(None)),
    ("commit into itself", ValueError, "source: .*twice", lambda c, a, *_: c.commit(a, a)),
    ("commit a stranger", ValueError, "source: .*this", lambda c, a, b, s, g: c.commit(s, a)),
    ("commit into stranger", ValueError, "target: .*this", lambda c, a, b, s, g: c.commit(a, s)),
    ("commit a freed one", ValueError, "source: .*live", lambda c, a, b, s, g: c.commit(g, a)),
    ("commit into freed", ValueError, "target: .*live", lambda c, a, b, s, g: c.commit(a, g)),
    ("commit of a name", TypeError, "source", lambda c, a, *_: c.commit("b", a)),
    ("truncate longer", ValueError, "length", lambda c, a, *_: a.truncate(71)),
    ("truncate below 0", ValueError, "length", lambda c, a, *_: a.truncate(-1)),
    ("truncate by half", TypeError, "length", lambda c, a, *_: a.truncate(1.5)),
    ("truncate a freed one", ValueError, "segment: .*live", lambda c, a, b, s, g: g.truncate(0)),
    ("keys of a freed one", ValueError, "segment: .*live", lambda c, a, b, s, g: g.keys(0)),
    ("keys of no layer", ValueError, "layer", lambda c, a, *_: a.keys(LAYERS)),
    ("values of no layer", ValueError, "layer", lambda c, a, *_: a.values(-1)),
    ("values of a word", TypeError, "layer", lambda c, a, *_: a.values("0")),
    ("no views", ValueError, "views", lambda c, a, *_: c.step([], [])),
    ("one view only", TypeError, r"views\[0\]", lambda c, a, b, *_: c.step([a, b], [1, 1])),
    ("no list", TypeError, "views", lambda c, a, *_: c.step(a, [1])),
    ("empty view", ValueError, r"views\[1\]", lambda c, a, *_: c.step([[a], []], [1, 1])),
    ("names", TypeError, r"views\[0\]\[1\]", lambda c, a, *_: c.step([[a, "b"]], [1])),
    ("nested", TypeError, r"views\[0\]\[0\]", lambda c, a, *_: c.step([[[a]]], [1])),
    ("a stranger", ValueError, r"views\[0\]\[0\]: .*this",
     lambda c, a, b, s, g: c.step([[s, a]], [1])),
    ("a freed one", ValueError, r"views\[1\]\[0\]: .*live",
     lambda c, a, b, s, g: c.step([[b], [g, a]], [1, 1])),
    ("once more", ValueError, r"views\[0\]: .*once.*'a'",
     lambda c, a, b, *_: c.step([[a, b, a]], [1])),
    ("two writers", ValueError, r"views\[1\]: .*views\[0\]",
     lambda c, a, b, *_: c.step([[a], [b, a]], [1, 1])),
    ("nothing to say", ValueError, "query_lengths", lambda c, a, *_: c.step([[a]], [0])),
    ("lengths short", ValueError, "query_lengths", lambda c, a, b, *_: c.step([[a], [b]], [1])),
    ("lengths long", ValueError, "query_lengths", lambda c, a, *_: c.step([[a]], [1, 1])),
    ("a float length", TypeError, "query_lengths", lambda c, a, *_: c.step([[a]], [1.0])),
    ("a bare length", TypeError, "query_lengths", lambda c, a, *_: c.step([[a]], 1)),
    ("token count", ValueError, r"tokens\[0\]", lambda c, a, *_: c.step([[a]], [2], [[1]])),
    ("token lists", ValueError, "tokens", lambda c, a, *_: c.step([[a]], [1], [[1], [2]])),
    ("flat tokens", TypeError, r"tokens\[0\]", lambda c, a, *_: c.step([[a]], [1], [1])),
    ("token words", TypeError, r"tokens\[0\]\[1\]",
     lambda c, a, *_: c.step([[a]], [2], [[1, "x"]])),
    ("token -2", ValueError, r"tokens\[0\]\[0\]", lambda c, a, *_: c.step([[a]], [1], [[-2]])),
    ("token string", TypeError, "tokens", lambda c, a, *_: c.step([[a]], [1], "x")),
    ("token shape", ValueError, "tokens",
     lambda c, a, *_: c.step([[a]], [1], torch.ones(2, 1).long())),
    ("ragged token tensor", ValueError, "tokens",
     lambda c, a, b, *_: c.step([[a], [b]], [2, 1], torch.ones(2, 2).long())),
    ("float tokens", TypeError, "tokens", lambda c, a, *_: c.step([[a]], [1], torch.zeros(1, 1))),
    ("odd allow_beyond", TypeError, "allow_beyond",
     lambda c, a, *_: c.step([[a]], [1], None, "yes")),
]  # fmt: skip


@pytest.mark.parametrize("what, error, words, call", BAD_CALLS, ids=[row[0] for row in BAD_CALLS])
def test_bad_arguments_change_nothing(
    numbers: Numbers, what: str, error: type[Exception], words: str, call: Callable[..., Any]
) -> None:
    cache, other = make_cache(), make_cache()
    a, b = filled(cache, numbers, "a", some_ids(70)), filled(cache, numbers, "b", some_ids(1))
    gone, stranger = cache.segment("gone"), filled(other, numbers, "a", [1])
    cache.free(gone)
    before, version = snapshot(cache), cache._version
    with pytest.raises(error, match=f"^{words}") as caught:
        call(cache, a, b, stranger, gone)
    assert ": expected " in str(caught.value) and ", got " in str(caught.value)
    assert snapshot(cache) == before and cache._version == version
    assert_consistent(cache)
    append(cache, numbers, a, [1])


BAD_TENSORS: list[tuple[str, type[Exception], str, Callable[..., dict[str, Any]]]] = [
    ("layer too high", ValueError, "layer", lambda q, k, v: {"layer": LAYERS}),
    ("layer below 0", ValueError, "layer", lambda q, k, v: {"layer": -LAYERS}),
    ("layer no number", TypeError, "layer", lambda q, k, v: {"layer": "0"}),
    ("layer true", TypeError, "layer", lambda q, k, v: {"layer": True}),
    ("query none", TypeError, "query", lambda q, k, v: {"query": None}),
    ("key array", TypeError, "key", lambda q, k, v: {"key": k.numpy()}),
    ("value list", TypeError, "value", lambda q, k, v: {"value": v.tolist()}),
    ("query rank", ValueError, "query", lambda q, k, v: {"query": q[None]}),
    ("key rank", ValueError, "key", lambda q, k, v: {"key": k[0]}),
    ("query tokens", ValueError, "query", lambda q, k, v: {"query": q[1:]}),
    ("query heads", ValueError, "query", lambda q, k, v: {"query": q[:, :3]}),
    ("no query heads", ValueError, "query", lambda q, k, v: {"query": q[:, :0]}),
    ("query dim", ValueError, "query", lambda q, k, v: {"query": q[..., :8]}),
    ("key tokens", ValueError, "key", lambda q, k, v: {"key": k[:2]}),
    ("key heads", ValueError, "key", lambda q, k, v: {"key": k[:, :1]}),
    ("key dim", ValueError, "key", lambda q, k, v: {"key": torch.zeros(3, KV_HEADS, DIM + 8)}),
    ("value dim", ValueError, "value",
     lambda q, k, v: {"value": torch.zeros(3, KV_HEADS, VALUE_DIM + 8)}),
    ("query dtype", TypeError, "query", lambda q, k, v: {"query": q.half()}),
    ("key dtype", TypeError, "key", lambda q, k, v: {"key": k.double()}),
    ("value dtype", TypeError, "value", lambda q, k, v: {"value": v.bfloat16()}),
    ("query device", ValueError, "query", lambda q, k, v: {"query": q.to("meta")}),
    ("value device", ValueError, "value", lambda q, k, v: {"value": v.to("meta")}),
    ("query stride", ValueError, "query", lambda q, k, v: {"query": sparse(q)}),
    ("key stride", ValueError, "key", lambda q, k, v: {"key": sparse(k)}),
    ("value stride", ValueError, "value", lambda q, k, v: {"value": sparse(v)}),
    ("query grad", RuntimeError, "query", lambda q, k, v: {"query": q.requires_grad_()}),
    ("value grad", RuntimeError, "value", lambda q, k, v: {"value": v.requires_grad_()}),
    ("out no tensor", TypeError, "out", lambda q, k, v: {"out": 1}),
    ("out shape", ValueError, "out", lambda q, k, v: {"out": torch.empty(3, HEADS, VALUE_DIM + 8)}),
    ("out dtype", TypeError, "out", lambda q, k, v: {"out": out_like(q).half()}),
    ("out device", ValueError, "out", lambda q, k, v: {"out": out_like(q).to("meta")}),
    ("out stride", ValueError, "out", lambda q, k, v: {"out": sparse(out_like(q))}),
    ("out expanded", ValueError, "out", lambda q, k, v: {"out": out_like(q)[:1].expand(3, -1, -1)}),
    ("out overlaps itself", ValueError, "out", lambda q, k, v: {
        "out": torch.zeros(999).as_strided((3, HEADS, VALUE_DIM), (VALUE_DIM, VALUE_DIM, 1))}),
    ("out is the value", ValueError, "out", lambda q, k, v: {
        "value": (both := torch.zeros(3, HEADS + KV_HEADS, VALUE_DIM))[:, HEADS:],
        "out": both[:, :HEADS]}),
]  # fmt: skip


def sparse(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with every other element of the last dimension skipped."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def out_like(query: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(query), HEADS, VALUE_DIM)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("what, error, words, bad", BAD_TENSORS, ids=[r[0] for r in BAD_TENSORS])
def test_bad_tensors_touch_nothing(
    numbers: Numbers,
    planned: bool,
    what: str,
    error: type[Exception],
    words: str,
    bad: Callable[..., dict[str, Any]],
) -> None:
    cache, ids = make_cache(), [[1, 2, 3]]
    a = filled(cache, numbers, "a", some_ids(5))
    # The quick check compares with the layer before, and only where gradients are out of question.
    grad = torch.set_grad_enabled(not planned or error is RuntimeError)
    with grad, cache.step([[a]], [3], ids) as step:
        if planned:
            step.attend(1, *numbers.of(1, ids))
        storage = [tensor.clone() for tensor in (*cache._keys, *cache._values)]
        query, key, value = numbers.of(0, ids)
        arguments = {"layer": 0, "query": query, "key": key, "value": value}
        with pytest.raises(error, match=f"^{words}: expected "):
            step.attend(**{**arguments, **bad(query.clone(), key.clone(), value.clone())})
        for was, now in zip(storage, (*cache._keys, *cache._values), strict=True):
            assert_same_bits(now, was)
        for layer in (0,) if planned else (0, 1):
            step.attend(layer, *numbers.of(layer, ids))
    assert_holds(a, numbers, some_ids(5) + ids[0])


def test_gradients_are_fine_where_nobody_asks_for_them(numbers: Numbers) -> None:
    cache = make_cache()
    a = cache.segment("a")
    with torch.no_grad(), cache.step([[a]], [1], [[1]]) as step:
        for layer in range(LAYERS):
            query, key, value = numbers.of(layer, [[1]])
            out = step.attend(layer, query.requires_grad_(), key.requires_grad_(), value)
            assert not out.requires_grad
    assert_holds(a, numbers, [1])


# ---- everything at random, against plain lists --------------------------------------------------


class CacheMachine(RuleBasedStateMachine):
    """Random appends, forks, truncates, commits and frees on a small cache.

    The model of a segment is the list of its token ids, from which keys and values follow.
    """

    MAX_TOKENS, SPARE_PAGES = 400, 3
    SIZES = st.sampled_from([1, 2, 3, 17, 63, 64, 65, 129])

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers(torch.Generator().manual_seed(1))
        self.cache = make_cache(max_tokens=self.MAX_TOKENS, spare_pages=self.SPARE_PAGES)
        self.lists: dict[Segment, list[int]] = {}
        self.next_id = 0
        self.next_name = 0

    def name(self) -> str:
        self.next_name += 1
        return str(self.next_name)

    def pick(self, data: st.DataObject, label: str) -> Segment:
        return data.draw(st.sampled_from(list(self.lists)), label)

    def refused(self, error: OutOfPages, before: list[Any], asked: int) -> None:
        assert snapshot(self.cache) == before
        assert (error.stored, error.free) == (self.cache.used_tokens, self.cache.free_tokens)
        assert error.asked == asked
        shared = any(holders > 1 for holders in self.cache._pool._holders)
        if not shared and len(self.lists) <= self.SPARE_PAGES:
            assert error.asked > error.free, "without forks and with few segments tokens decide"

    @precondition(lambda self: len(self.lists) < 6)
    @rule()
    def segment(self) -> None:
        self.lists[self.cache.segment(self.name())] = []

    @precondition(lambda self: self.lists and len(self.lists) < 6)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        original = self.pick(data, "original")
        used = self.cache.used_tokens
        self.lists[self.cache.fork(original, self.name())] = list(self.lists[original])
        assert self.cache.used_tokens == used

    @precondition(lambda self: self.lists)
    @rule(data=st.data(), outcome=st.sampled_from(["well", "well", "well", "raises", "forgets"]))
    def step(self, data: st.DataObject, outcome: str) -> None:
        order = data.draw(st.permutations(list(self.lists)), "order")
        writers = order[: data.draw(st.integers(1, min(3, len(order))), "workers")]
        views, ids = [], []
        for writer in writers:
            others = [segment for segment in order if segment is not writer]
            seen = data.draw(st.integers(0, len(others)), "others seen")
            views.append([*others[:seen], writer])
            size = data.draw(self.SIZES, "new tokens")
            ids.append(some_ids(size, self.next_id))
            self.next_id += size
        layers = data.draw(st.integers(0, LAYERS), "layers") if outcome == "raises" else LAYERS
        layers -= outcome == "forgets"
        before = snapshot(self.cache)
        try:
            with self.cache.step(views, [len(row) for row in ids], ids) as step:
                for layer in range(layers):
                    out = step.attend(layer, *self.numbers.of(layer, ids))
                    assert torch.isfinite(out).all()
                if outcome == "raises":
                    raise KeyboardInterrupt
        except OutOfPages as error:
            self.refused(error, before, sum(map(len, ids)))
        except (KeyboardInterrupt, ValueError):
            assert outcome != "well"
            assert snapshot(self.cache) == before
        else:
            assert outcome == "well"
            for writer, new in zip(writers, ids, strict=True):
                self.lists[writer] += new

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        segment = self.pick(data, "segment")
        length = data.draw(st.integers(0, len(segment)), "length")
        segment.truncate(length)
        del self.lists[segment][length:]

    @precondition(lambda self: len(self.lists) >= 2)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        source, target = data.draw(st.permutations(list(self.lists)), "order")[:2]
        before, asked = snapshot(self.cache), len(source)
        try:
            self.cache.commit(source, target)
        except OutOfPages as error:
            assert snapshot(self.cache) == before
            assert error.asked == asked
        else:
            self.lists[target] += self.lists[source]
            self.lists[source] = []

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        segment = self.pick(data, "segment")
        self.cache.free(segment)
        del self.lists[segment]

    @invariant()
    def holds_what_the_lists_say(self) -> None:
        assert list(self.cache.segments) == list(self.lists)
        for segment, ids in self.lists.items():
            assert_holds(segment, self.numbers, ids)
        assert_consistent(self.cache)
        poison_free_pages(self.cache)

    def teardown(self) -> None:
        for segment in list(self.lists):
            self.cache.free(segment)
        assert self.cache._pool.used == 0, "pages leaked"


CacheMachine.TestCase.settings = hypothesis_settings(stateful_step_count=25)
TestCacheMachine = pytest.mark.cpu(CacheMachine.TestCase)
