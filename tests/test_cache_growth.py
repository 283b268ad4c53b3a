"""What a change of a cache costs does not grow with what the cache holds beside it.

Counted are the lines of the package's own Python that run: no clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import hogwild_ext as hx
from hogwild_ext.pages import PAGE_SIZE, PagePool
from hogwild_ext.token_log import BLOCK, TokenLog
from interrupts import Interrupt

DIM = 8


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def append(cache: hx.SegmentCache, segment: hx.Segment, count: int) -> None:
    with torch.inference_mode(), cache.step([[segment]], [count], [[5] * count]) as step:
        step.attend(0, *torch.zeros(3, count, 1, DIM))


def lines(action: Callable[[], Any]) -> int:
    with Interrupt(-1) as count:
        action()
    return count.places


class World:
    """Two segments of `tokens`, and `others` with one token each, every third of them a fork."""

    def __init__(self, tokens: int = 300, others: int = 0) -> None:
        self.cache = hx.SegmentCache(
            1, 1, DIM, inv_freq=[], max_tokens=40_000, spare_pages=others + 8
        )
        self.a, self.b, self.short = (self.cache.segment(name) for name in ("a", "b", "short"))
        for i in range(others):
            if i % 3:
                append(self.cache, self.cache.segment(str(i)), 1)
            else:
                self.cache.fork(self.b, str(i))
        append(self.cache, self.a, tokens)
        append(self.cache, self.b, tokens)
        append(self.cache, self.short, 3)


OPERATIONS: dict[str, Callable[[World], Any]] = {
    "segment": lambda w: w.cache.segment("new"),
    "fork": lambda w: w.cache.fork(w.a, "new"),
    "fork without a name": lambda w: w.cache.fork(w.a),
    "truncate": lambda w: w.a.truncate(len(w.a) - 1),
    "truncate by a block": lambda w: w.a.truncate(len(w.a) - BLOCK),
    "free": lambda w: w.cache.free(w.short),
    "commit": lambda w: w.cache.commit(w.short, w.a),
    "commit to empty": lambda w: w.cache.commit(w.a, w.cache.segment("new")),
    "step": lambda w: append(w.cache, w.a, 1),
    "counts": lambda w: (w.cache.used_tokens, w.cache.free_tokens, len(w.a)),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_changes_do_not_get_slower_with_other_segments(name: str) -> None:
    few, many = (lines(partial(OPERATIONS[name], World(others=n))) for n in (30, 120))
    assert many <= few + 3


@pytest.mark.cpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_changes_do_not_get_slower_with_longer_segments(name: str) -> None:
    short, long = (lines(partial(OPERATIONS[name], World(n))) for n in (830, 13_130))
    assert long <= short + 3


@pytest.mark.cpu
def test_the_nth_fork_is_named_as_fast_as_the_first() -> None:
    world = World()
    counts = [lines(lambda: world.cache.fork(world.a)) for _ in range(60)]
    assert max(counts) <= counts[1], "the second one finds the first one's name taken"
    assert world.cache.segments[-1].name == "a.60"


def test_forks_of_forks_and_odd_names_get_the_first_free_number() -> None:
    world = World(tokens=1)
    cache = world.cache
    odd = ["a.0", "a.02", "a.-1", "a.²", "a." + "9" * 5000, "a.x", "a.1.1"]
    for name in odd:
        cache.segment(name)
    forks = [cache.fork(world.a) for _ in range(5)]
    assert [fork.name for fork in forks] == [f"a.{n}" for n in range(1, 6)]
    for fork in (forks[3], forks[1], *(s for s in cache.segments if s.name in odd)):
        cache.free(fork)
    assert [cache.fork(world.a).name for _ in range(3)] == ["a.2", "a.4", "a.6"]
    assert cache.fork(cache.fork(world.a, "a.1.2")).name == "a.1.2.1"
    assert cache.fork(forks[0]).name == "a.1.1"


@pytest.mark.cpu
def test_a_log_shares_what_it_is_made_from() -> None:
    log = TokenLog()
    for i in range(20 * BLOCK):
        log = log.extended([i])
    ids = list(range(20 * BLOCK))
    assert log.read() == ids and len(list(log.pieces())) == 20, "blocks, however they came"
    longer, shorter = log.extended([7]), log.head(log.length - 1)
    kept = {id(piece) for piece in log.pieces()}
    for other, expected in ((longer, [*ids, 7]), (shorter, ids[:-1])):
        assert other.read() == expected
        assert len([piece for piece in other.pieces() if id(piece) not in kept]) <= 1
    assert log.read() == ids


@pytest.mark.cpu
def test_a_long_log_of_single_ids_on_a_device_goes_away_quietly() -> None:
    log = TokenLog()
    one = torch.ones(1, dtype=torch.int64)
    for _ in range(100_000):
        log = log.extended(one)
    assert log.length == 100_000
    assert sum(log.read()) == 100_000
    del log


@pytest.mark.cpu
def test_a_pool_of_a_billion_tokens_costs_nothing_before_it_is_used() -> None:
    pool = PagePool(2**30 // PAGE_SIZE)
    assert pool.free == 2**30 // PAGE_SIZE and not pool._returned
    first, _ = pool.grow(hx.pages.EMPTY_TABLE, 0, 3 * PAGE_SIZE)
    second, _ = pool.grow(hx.pages.EMPTY_TABLE, 0, 1)
    assert (first.tolist(), second.tolist()) == ([0, 1, 2], [3])
    pool.cut(first, 3 * PAGE_SIZE, PAGE_SIZE)
    third, _ = pool.grow(second, 1, 3 * PAGE_SIZE)
    assert third.tolist() == [3, 1, 2, 4] and pool.stored == PAGE_SIZE + 3 * PAGE_SIZE + 1
