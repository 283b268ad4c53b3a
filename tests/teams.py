"""One team of workers run twice, by the package and by the eager implementation, and compared."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import torch
import transformers

import hogwild_ext as hx
from eager import EagerSegment, EagerWorkers, exact_angles
from models import random_tokens

PROMISED = 1e-4  # of any float32 model's logits, against the unpatched model
ROUNDING = 2e-5  # of the tiny models' logits, against angles in float64


def assert_logits(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst <= limit, f"logits differ by up to {worst:.3g}, limit {limit:g}"


def random_split(total: int, parts: int, rng: random.Random) -> list[int]:
    """`parts` numbers from 1 that add up to `total`."""
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


class Both:
    """One team twice: on the package's cache, and on the eager implementation."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        window: int | None = None,
        limit: float = ROUNDING,
        eager_model: transformers.PreTrainedModel | None = None,
    ) -> None:
        self.limit = limit
        self.model = model
        self.eager_model = eager_model or copy.deepcopy(model)  # never patched, on the CPU
        self.cache = hx.SegmentCache.for_model(model, max_tokens=8192)
        self.eager = EagerWorkers(self.eager_model, window)
        self.segments: dict[str, hx.Segment] = {}
        self.twins: dict[str, EagerSegment] = {}
        self.steps = 0

    def segment(self, name: str) -> str:
        self.segments[name] = self.cache.segment(name)
        self.twins[name] = self.eager.segment()
        return name

    def fork(self, name: str, fork: str) -> str:
        self.segments[fork] = self.cache.fork(self.segments[name], fork)
        self.twins[fork] = self.twins[name].fork()
        return fork

    def commit(self, source: str, target: str) -> None:
        self.cache.commit(self.segments[source], self.segments[target])
        self.twins[source].commit_to(self.twins[target])

    def truncate(self, name: str, length: int) -> None:
        self.segments[name].truncate(length)
        self.twins[name].truncate(length)

    def free(self, name: str) -> None:
        self.cache.free(self.segments.pop(name))
        del self.twins[name]

    def step(self, views: Sequence[Sequence[str]], tokens: list[list[int]]) -> None:
        """Raises AssertionError unless logits and tokens are the same."""
        self.steps += 1
        with exact_angles(self.eager_model):
            expected = self.eager.step([[self.twins[n] for n in view] for view in views], tokens)
        got = hx.forward(
            self.model,
            self.cache,
            [[self.segments[n] for n in view] for view in views],
            tokens,
            logits="all",
        )
        for mine, theirs in zip(got, expected, strict=True):
            assert_logits(mine.cpu(), theirs, self.limit)
        for name, segment in self.segments.items():
            assert segment.tokens == self.twins[name].tokens, name
            assert len(segment) == len(self.twins[name]), name


def play(
    team: Both,
    rng: random.Random,
    rounds: int,
    prompt_length: int,
    draw: Callable[[int], list[int]] | None = None,
) -> None:
    """A random game of all that segments can do, each worker in its own order of the others.

    Each kind of event comes at least once; `rounds` is 4 or more. `draw(n)` makes n token ids;
    random ones of the tiny models' vocabulary unless given.
    """
    draw = draw or (lambda count: random_tokens(count, seed=rng.getrandbits(31)))
    prompt, history = team.segment("prompt"), team.segment("history")
    team.step([[prompt]], [draw(prompt_length)])
    workers = [team.segment(name) for name in ("alice", "bob", "carol")]
    shared = [prompt, history]  # what all begin with
    events = rng.sample(range(4), 4) + [rng.randrange(5) for _ in range(rounds - 4)]
    for turn, event in enumerate(events):
        speakers = rng.sample(workers, rng.randint(1, len(workers)))
        views = []
        for worker in speakers:
            others = [w for w in workers if w != worker]
            rng.shuffle(others)
            views.append([*shared, *others[: rng.randint(0, len(others))], worker])
        team.step(views, [draw(rng.choice((1, 1, 2, 17))) for _ in speakers])

        if event == 0:
            team.commit(rng.choice(workers), history)
        elif event == 1:
            team.truncate(worker := rng.choice(workers), rng.randint(0, len(team.twins[worker])))
        elif event == 2:  # somebody goes on in a fork of its own text, then takes its place
            worker = rng.choice(workers)
            fork = team.fork(worker, f"{worker} {turn}")
            team.step([[*shared, worker], [*shared, fork]], [draw(2), draw(3)])
            team.free(worker)
            workers[workers.index(worker)] = fork
        elif event == 3:  # two write behind the same shared text
            fork = team.fork(history, f"history {turn}")
            team.step([[prompt, history], [prompt, *workers, fork]], [draw(1), draw(5)])
            team.free(fork)
