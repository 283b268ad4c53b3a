"""What a step costs outside of the model: the same at the end of a long run, and no more than the
square of the workers. Work is counted, not timed."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hogwild_ext import trace
from hogwild_ext.layouts import LAYOUTS, Page
from no_model import PARAGRAPH, NoModel, large_team, work_of_steps

pytestmark = pytest.mark.usefixtures("one_thread")


def calls_of(work: Callable[[], Any]) -> int:
    """How many functions were called and generators resumed, Python's and C's."""
    count = 0

    def counted(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def memory_of(work: Callable[[], Any]) -> int:
    """Bytes of Python's that are in use at once for a while, more than before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_of_a_long_run_does_as_much_as_an_early_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str
) -> None:
    NoModel(monkeypatch)
    workers, last = 4, 800
    path = tmp_path / "run.jsonl"
    run = large_team(workers, last + 100, layout=layout).stream("p", last + 90, trace=path)
    steps = work_of_steps(run)
    # The lines of a trace would hide what else is needed for a while.
    untold = large_team(workers, last + 100, layout=layout).stream("p", last + 90)
    more_steps = work_of_steps(untold)
    calls, memory = {}, {}
    for window in (100, last):
        for one in (steps, more_steps):
            while next(one) < window:
                pass
        calls[window] = calls_of(lambda: [next(steps) for _ in range(PARAGRAPH)])
        # Of single steps the least: now and then a list moves, as it grows.
        memory[window] = min(memory_of(lambda: next(more_steps)) for _ in range(PARAGRAPH))
    assert calls[last] < 1.02 * calls[100]
    # 700 tokens more of a worker are 5.6 kB as a list.
    assert memory[last] < memory[100] + 4_000
    untold.close()
    run.close()
    # So does the trace.
    sizes: dict[int, int] = {}
    for text in path.read_bytes().splitlines():
        for window in (100, last):
            for step in range(window, window + PARAGRAPH):
                if b'"step": %d,' % step in text:
                    sizes[window] = sizes.get(window, 0) + len(text)
    assert sizes[last] < 1.1 * sizes[100]  # numbers have more digits
    assert len(trace.read(path).lines) > workers * last


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_grows_with_the_square_of_the_workers_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str
) -> None:
    calls, sizes = {}, {}
    for workers in (16, 32, 64):
        with monkeypatch.context() as patched:
            NoModel(patched)
            path = tmp_path / f"{workers}.jsonl"
            run = large_team(workers, 100, layout=layout).stream("p", 60, trace=path)
            steps = work_of_steps(run)
            next(steps)
            before = path.stat().st_size
            calls[workers] = calls_of(lambda steps=steps: [next(steps) for _ in range(PARAGRAPH)])
            sizes[workers] = path.stat().st_size - before
            run.close()
    # Of a b W + c W^2 each doubling is at most four times as much.
    assert calls[64] < 4 * calls[32] < 16 * calls[16]
    assert sizes[64] < 2.3 * sizes[32] < 5.3 * sizes[16]


class Touched(list[int]):
    """Counts how many of its items are looked at."""

    count = 0

    def __contains__(self, item: object) -> bool:
        Touched.count += self.index(item) + 1 if super().__contains__(item) else len(self)
        return super().__contains__(item)

    def __iter__(self) -> Any:
        Touched.count += len(self)
        return super().__iter__()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_views_of_all_workers_look_at_each_pair_once(layout: str) -> None:
    count = 64
    rows: list[Any] = [[(name, w) for w in range(count)] for name in ("live", "unfinished")]
    page: Any = Page("prompt", "history", "others", "own", *rows, Touched(range(0, count, 2)))
    Touched.count = 0
    views = [LAYOUTS[layout]().view(page, worker) for worker in range(count)]
    assert Touched.count <= count * count
    assert all(len(set(view)) == len(view) for view in views)


def test_a_step_of_16_workers_takes_little_more_than_its_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    NoModel(monkeypatch)
    path = tmp_path / "run.jsonl"
    large_team(16, 200).run("p", 200, trace=path)
    lines = path.read_bytes().splitlines()
    tokens = sum(len(line) for line in lines if b'"kind": "token"' in line)
    assert sum(map(len, lines)) < 1.6 * tokens
