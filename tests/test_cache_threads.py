"""One cache and several threads: each change is refused or right, and so is each read."""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hogwild_ext as hx
from hogwild_ext.changes import Change, Turns
from hogwild_ext.pages import PagePool
from interrupts import Interrupt, Meanwhile, some_places
from models import plain_logits, random_tokens, tiny_model

DIM = 8
TOKENS = random_tokens(30, seed=1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows(ids: list[int]) -> torch.Tensor:
    """Numbers that tell which token they are of: [n, 1, D]."""
    return torch.tensor(ids, dtype=torch.float32)[:, None, None].expand(-1, 1, DIM).contiguous()


def append(cache: hx.SegmentCache, segment: hx.Segment, ids: list[int]) -> None:
    with torch.inference_mode(), cache.step([[segment]], [len(ids)], [ids]) as step:
        step.attend(0, rows(ids), rows(ids), rows(ids))


def assert_holds(segment: hx.Segment, ids: list[int]) -> None:
    assert segment.tokens == ids
    assert torch.equal(segment.values(0), rows(ids))


def assert_consistent(cache: hx.SegmentCache) -> None:
    cache.free(cache.segment("the next change tidies up"))
    pool, rebuilt = cache._pool, PagePool(cache._pool.count)
    rebuilt.rebuild(segment._content[:2] for segment in cache.segments)
    assert pool.free_pages() == rebuilt.free_pages() and pool.stored == rebuilt.stored
    assert pool._holders.tolist() == rebuilt._holders.tolist()


def small_cache(max_tokens: int = 640) -> tuple[hx.SegmentCache, hx.Segment, hx.Segment]:
    cache = hx.SegmentCache(1, 1, DIM, inv_freq=[], max_tokens=max_tokens, spare_pages=4)
    x, y = cache.segment("x"), cache.segment("y")
    append(cache, x, [1] * 60)
    append(cache, y, [2] * 70)
    return cache, x, y


def elsewhere(action: Callable[[], Any]) -> Any:
    """What `action` returns or raises in another thread."""
    other = Meanwhile(0, action)
    other.strike()
    return other.result


CHANGES: dict[str, Callable[[hx.SegmentCache, hx.Segment, hx.Segment], Any]] = {
    "segment": lambda cache, x, y: cache.segment("b"),
    "fork": lambda cache, x, y: cache.fork(y, "b"),
    "truncate": lambda cache, x, y: y.truncate(65),
    "free": lambda cache, x, y: cache.free(y),
    "commit": lambda cache, x, y: cache.commit(y, x),
    "step": lambda cache, x, y: append(cache, y, [3] * 60),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_while_another_threads_step_is_open(name: str) -> None:
    cache, x, y = small_cache()
    with torch.inference_mode(), cache.step([[y, x]], [60], [[4] * 60]) as step:
        error = elsewhere(lambda: CHANGES[name](cache, x, y))
        assert isinstance(error, RuntimeError) and not isinstance(error, hx.OutOfPages)
        assert f"'step' in thread '{threading.current_thread().name}'" in str(error)
        assert elsewhere(lambda: (y.tokens, y.keys(0).shape[0], len(x))) == ([2] * 70, 70, 60)
        assert elsewhere(lambda: cache.used_tokens) == 190, "an open step's tokens count"
        step.attend(0, rows([4] * 60), rows([4] * 60), rows([4] * 60))
    assert_holds(x, [1] * 60 + [4] * 60)
    assert_holds(y, [2] * 70)
    assert_consistent(cache)


def test_a_step_belongs_to_the_thread_that_entered_it() -> None:
    cache, x, _ = small_cache()
    new = rows([4])
    with torch.inference_mode(), cache.step([[x]], [1], [[4]]) as step:
        uses: list[Callable[[], Any]] = [
            lambda: step.attend(0, new, new, new),
            lambda: step.prepare(1),
            lambda: step.replay(object()),
            lambda: step.__exit__(None, None, None),
            lambda: step.__exit__(ValueError, ValueError(), None),
            step.abandon,
            step.__enter__,
        ]
        for use in uses:
            error = elsewhere(use)
            assert isinstance(error, RuntimeError) and "open in thread" in str(error)
        step.attend(0, new, new, new)
    assert_holds(x, [1] * 60 + [4])
    assert_consistent(cache)


def test_a_thread_that_ends_with_an_open_step() -> None:
    cache, x, y = small_cache()
    steps = []
    elsewhere(lambda: steps.append(cache.step([[x]], [200]).__enter__()))
    steps[0].abandon()
    assert cache.used_tokens == 130
    append(cache, y, [5])
    with pytest.raises(RuntimeError, match="over"):
        steps[0].attend(0, rows([1] * 200), rows([1] * 200), rows([1] * 200))
    assert_holds(x, [1] * 60)
    assert_holds(y, [2] * 70 + [5])
    assert_consistent(cache)


def test_a_generator_with_an_open_step_that_another_thread_goes_on_with() -> None:
    cache, x, y = small_cache()

    def steps() -> Iterator[int]:  # without a mode of torch's, which would stay with this thread
        with cache.step([[x]], [1], [[4]]) as step:
            yield 1
            step.attend(0, rows([4]), rows([4]), rows([4]))
        yield 2

    generator = steps()
    assert next(generator) == 1
    held = [generator]
    del generator
    error = elsewhere(lambda: next(held[0]))
    assert isinstance(error, RuntimeError) and "open in thread" in str(error)
    del error, held[:]
    gc.collect()
    append(cache, y, [5])
    assert_holds(x, [1] * 60)
    assert_consistent(cache)


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_two_changes_at_once(first: str, second: str) -> None:
    """Another thread does the second one at any line of the first: both are right, or refused."""
    cache, x, y = small_cache()
    with Interrupt(-1) as count:
        CHANGES[first](cache, x, y)
    refused = 0
    for at in some_places(count.places, 25, seed=len(first)):
        cache, x, y = small_cache()
        before = {"x": [1] * 60, "y": [2] * 70}
        z, after = cache.segment("z"), dict(before)
        append(cache, z, [9] * 10)
        with Meanwhile(at, lambda c=cache, z=z: CHANGES[second](c, z, c.fork(z, "w"))) as other:
            try:
                CHANGES[first](cache, x, y)
                done = True
            except RuntimeError as error:
                done = False
                assert "thread" in str(error) or "changed" in str(error), other.struck
            except ValueError as error:
                done = False
                assert "no live segment has" in str(error), "the other one has taken the name"
        if done:
            after = expected_after(first, before)
        found = {s.name: s.tokens for s in cache.segments if s.name in ("x", "y")}
        assert found == {k: v for k, v in after.items() if k in ("x", "y")}, other.struck
        refused += isinstance(other.result, RuntimeError)
        assert other.result is None or isinstance(
            other.result, (RuntimeError, ValueError, hx.Segment)
        )
        if isinstance(other.result, hx.Segment):
            assert other.result in cache.segments, f"lost: {other.struck}"
        for segment in cache.segments:
            assert torch.equal(segment.values(0), rows(segment.tokens)), other.struck
        assert_consistent(cache)
    assert refused > 5


def expected_after(name: str, before: dict[str, list[int]]) -> dict[str, list[int]]:
    x, y = before["x"], before["y"]
    return {
        "truncate": {"x": x, "y": y[:65]},
        "free": {"x": x},
        "commit": {"x": x + y, "y": []},
        "step": {"x": x, "y": y + [3] * 60},
    }.get(name, before)


@pytest.mark.parametrize("name", ["truncate", "free", "commit"])
def test_a_read_while_another_thread_changes_the_segment(name: str) -> None:
    """It returns what was there or raises: never what another segment wrote into its pages."""
    cache, x, y = small_cache()
    with Interrupt(-1) as count:
        y.values(0)

    def change_and_write(cache: hx.SegmentCache, x: hx.Segment, y: hx.Segment) -> None:
        CHANGES[name](cache, x, y)
        append(cache, cache.segment("new"), [7] * 300)

    raised = 0
    for at in range(count.places):
        cache, x, y = small_cache()
        with Meanwhile(at, lambda c=cache, x=x, y=y: change_and_write(c, x, y)) as other:
            try:
                found = y.values(0)
                assert torch.equal(found, rows([2] * 70)) or at == 0 or len(found) in (0, 65)
                assert (found == 2).all(), other.struck
            except (RuntimeError, ValueError) as error:
                raised += 1
                assert "thread" in str(error) or "live" in str(error)
        assert other.result is None
    assert raised > 0


def test_many_threads_on_one_cache() -> None:
    """Each with segments of its own, which it knows; what is refused has changed nothing."""
    cache = hx.SegmentCache(1, 1, DIM, inv_freq=[], max_tokens=4096, spare_pages=64)
    prompt = cache.segment("prompt")
    append(cache, prompt, [1] * 100)
    wrong: list[str] = []
    counts = {"refused": 0, "done": 0}
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def play(number: int) -> None:
        rng = random.Random(number)
        mine: list[tuple[hx.Segment, list[int]]] = []
        for turn in range(400):
            try:
                kind = rng.choice(["segment", "fork", "step", "step", "truncate", "commit", "free"])
                if kind == "segment" or len(mine) < 2:
                    mine.append((cache.segment(f"{number}.{turn}"), []))
                elif kind == "fork":
                    mine.append((cache.fork(prompt, f"{number}.{turn}"), [1] * 100))
                elif kind == "free":
                    cache.free(mine[-1][0])
                    mine.pop()
                else:
                    (one, ids), (other, others) = rng.sample(mine, 2)
                    place, other_place = mine.index((one, ids)), mine.index((other, others))
                    if kind == "truncate":
                        keep = rng.randint(0, len(ids))
                        one.truncate(keep)
                        mine[place] = one, ids[:keep]
                    elif kind == "commit" and len(ids) + len(others) < 300:
                        cache.commit(one, other)
                        mine[place], mine[other_place] = (one, []), (other, others + ids)
                    elif len(ids) < 300:
                        new = [number + 10] * rng.choice([1, 1, 5, 70])
                        append(cache, one, new)
                        mine[place] = one, ids + new
                counts["done"] += 1
            except hx.OutOfPages:
                cache.free(mine.pop()[0]) if len(mine) > 2 else None
            except RuntimeError as error:
                counts["refused"] += 1
                if "thread" not in str(error) and "changed" not in str(error):
                    wrong.append(repr(error))
            try:
                for segment, ids in mine[-2:]:
                    assert_holds(segment, ids)
            except AssertionError as error:
                wrong.append(f"{number}, {turn}: {error!r}"[:300])
            if cache.used_tokens > cache.max_tokens or cache.free_tokens < 0:
                wrong.append("counts")

    def guarded(number: int) -> None:
        try:
            play(number)
        except hx.OutOfPages:
            pass
        except RuntimeError as error:  # a refused free
            if "thread" not in str(error):
                wrong.append(repr(error))
        except BaseException as error:
            wrong.append(repr(error))

    try:
        threads = [threading.Thread(target=guarded, args=(n,)) for n in range(1, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrong
    assert counts["done"] > 100 and counts["refused"] > 0
    assert_holds(prompt, [1] * 100)
    assert_consistent(cache)


@pytest.mark.cpu
def test_two_threads_that_patch_one_model() -> None:
    """The second one runs a whole step at any place of the first one's."""
    reference = tiny_model("llama")

    def run(model: Any) -> torch.Tensor:
        cache = hx.SegmentCache.for_model(model, max_tokens=128)
        logits = hx.forward(model, cache, [[cache.segment("a")]], [TOKENS])
        assert isinstance(logits, torch.Tensor)
        return logits

    expected, plain = run(reference), plain_logits(reference, TOKENS)
    files = ("patching.py", "packed_linear.py")
    with Interrupt(-1, files=files) as count:
        run(tiny_model("llama"))
    for at in some_places(count.places, 60, seed=1):
        model = tiny_model("llama")
        with Meanwhile(at, lambda m=model: run(m), files=files) as other:
            assert torch.equal(run(model), expected), other.struck
        assert torch.equal(other.result, expected), other.struck
        assert torch.equal(plain_logits(model, TOKENS), plain)


def test_of_two_that_follow_the_same_change_one_has_the_turn() -> None:
    """The second one, at any place of the first one's taking, takes its own and keeps it."""
    with Interrupt(-1, files=("changes.py",), opcodes=True) as count:
        Turns().take(Change("a", sys._getframe()))
    refused = {"a": 0, "b": 0}
    for at in range(count.places):
        turns, has = Turns(), dict.fromkeys("ab", False)
        settled, leave = threading.Event(), threading.Event()

        def take(name: str, turns: Turns = turns, has: dict[str, bool] = has) -> None:
            try:
                turns.take(Change(name, sys._getframe()))
                has[name] = True
            except RuntimeError:
                refused[name] += 1

        def keep(take: Any = take, settled: Any = settled, leave: Any = leave) -> None:
            take("b")
            settled.set()
            leave.wait(60)

        def strike(settled: Any = settled, keep: Any = keep) -> None:
            threading.Thread(target=keep).start()
            settled.wait(60)

        with Meanwhile(at, keep, files=("changes.py",), opcodes=True) as other:
            other.strike = strike  # type: ignore[method-assign]
            take("a")
        leave.set()
        assert has["a"] != has["b"], other.struck
    assert refused["a"] > 5 and refused["b"] > 5
