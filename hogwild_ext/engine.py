"""The engine: several workers of one model write on one page, each reading the others' live text.

See sections 3 and 4 of arXiv 2504.06261. A *step* is one forward pass; every worker that has not
ended gets one token from each. A *paragraph* is what a worker writes until a finished sentence and
an empty line; it then moves into the history, which all workers read first.

Every token is encoded exactly once. In the step that brings the last token of a paragraph, its
writer therefore stands twice: once to store that token at the end of the old paragraph, and once
with the heading of its next one, whose last token gives the prediction. Everybody reads the old
paragraph at the end of the history already in that step. The commit after it moves the keys to
just these positions, so it changes nothing of what anyone reads. (In layouts that do not commit
the heading simply follows that token.)

When the time is up, or at a snapshot, a worker is made to *conclude*: on a copy of its paragraph,
which shares the memory of the page, so the page never knows.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from . import checks
from .cache import OutOfPages, Segment, SegmentCache
from .layouts import Layout, Page, layout_from
from .pages import PAGE_SIZE
from .patching import forward, patch
from .prompts import Prompts, prompts_for
from .text_decoder import TextDecoder
from .trace import Piece, Recorder, token_count

try:
    from transformers import GenerationConfig

    from .answers import boxed_answer
    from .sampling import Sampler, check_config, generator_of
except ImportError as error:
    raise ImportError(
        "the engine needs transformers: pip install 'hogwild_ext[run]'", name="transformers"
    ) from error

NAMES = (
    "Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi",
    "Ivan", "Judy", "Kevin", "Laura", "Mallory", "Niaj", "Olivia", "Peggy",
)  # fmt: skip

EVENT_KINDS = ("start", "question", "token", "commit", "end", "conclusion", "stop")
STOP_REASONS = ("answer", "end", "max_steps", "context", "interrupted")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: "start": a paragraph begins, `text` is its heading.
            "question": behind its heading stands `Prompts.question`; `text` is that.
            "token": one generated token. `text` is what it adds, and empty while a character of
            several bytes is incomplete.
            "commit": a finished paragraph joined the history; `text` is all of it, without heading.
            "end": the worker has ended; `token` is its end-of-sequence token.
            "conclusion": the worker was made to give an answer, at a snapshot or because the time
            is up; `text` is the closing text and what the worker wrote behind it.
            "stop": the run is over; `text` says why (one of `STOP_REASONS`), `worker` is None
            unless it gave the final answer. The last event of every run.
        step: the forward pass, counting from 1.
        worker: its name.
        paragraph: which of the worker's paragraphs, counting from 1.
    """

    kind: str
    step: int
    worker: str | None = None
    paragraph: int | None = None
    token: int | None = None
    text: str = ""


@dataclass(frozen=True)
class WorkerResult:
    """What one worker wrote: `tokens` without end of sequence, and their `text`."""

    name: str
    text: str
    tokens: list[int]
    ended: bool  # by an end-of-sequence token


@dataclass
class Stats:
    """Where the time of a run went, and what was encoded. Seconds exclude those of the caller
    between two events."""

    seconds: float = 0.0
    first_token_seconds: float = 0.0
    forward_seconds: float = 0.0  # the model, attention included
    attention_seconds: float = 0.0
    sampling_seconds: float = 0.0
    generated_tokens: int = 0  # by all workers, ends of sequence not counted
    prompt_tokens: int = 0
    encoded_tokens: int = 0  # prompt, headings, questions and generated ones, each once
    committed_tokens: int = 0
    copied_bytes: int = 0  # keys and values, by commits; and a page at most for each conclusion
    concluding_tokens: int = 0  # encoded on copies, for conclusions: not among the encoded ones

    @property
    def engine_seconds(self) -> float:
        """The engine's own Python: views, text, bookkeeping."""
        return max(0.0, self.seconds - self.forward_seconds - self.sampling_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together, over the whole run."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Snapshot:
    """What the answer would have been after `steps` steps, None if there was none.

    `worker` gave it; `text` is what it was made to conclude, empty where the run had ended before.
    """

    steps: int
    answer: str | None
    worker: str | None
    text: str


@dataclass(frozen=True)
class Result:
    """A run, finished or not.

    Attributes:
        answer: the final answer, None if no worker gave one.
        text: the page: the history, then the paragraphs that were left unfinished, with headings.
        workers: in order; each has .name, .text and .tokens.
        steps: forward passes, without those of conclusions.
        stopped_by: one of `STOP_REASONS`, None for a run that is still going on.
        seed: repeats the run, with the same team, problem, machine and number of threads.
        snapshots: one for each budget that was asked for and reached, or that the run did not need.
    """

    answer: str | None
    text: str
    workers: list[WorkerResult]
    steps: int
    stats: Stats
    stopped_by: str | None
    seed: int
    snapshots: list[Snapshot] = field(default_factory=list)


# ---- the team ------------------------------------------------------------------------------------


class Hogwild:
    """A team of workers that share one model and one page.

    Args:
        model: a causal language model of transformers, of a supported family; see `patch`.
        tokenizer: its tokenizer.
        workers: how many, or their names.
        layout: what a worker sees, a name in `layouts.LAYOUTS` or a `Layout`.
        max_tokens: room for keys and values of this many tokens. None: as many as the model has
            positions, but at most 65536. A run that fills it ends with what there is.
        seed: of the workers' random numbers. None: a fresh one for every run, see `Result.seed`.
        generation_config: how to choose a token, in transformers' terms; None: the model's own.
            `do_sample` (greedy if it is unset or False), `temperature`, `top_k` (50 if unset, as
            in `generate`), `top_p`, `min_p`, `typical_p`, `repetition_penalty`,
            `no_repeat_ngram_size`, `bad_words_ids`, `suppress_tokens` and `eos_token_id` are
            followed. Penalties look at what the worker itself has written. Settings for other
            ways of decoding (beams and the like) are refused.
        logits_processors: more processors of transformers, each called with the worker's own
            tokens [1, n] and its logits [1, vocab].
        prompts: the words said to the model. None: those that suit its size.
        question_every: a worker that has written this many tokens since it was last asked finds
            `prompts.question` in front of its next paragraph: whether it does what another does
            already. None: never. A lone worker is not asked.
        final_answer: called with a worker's paragraph so far whenever it grows, and with a
            conclusion so far, closing text included; what it returns, unless None, is the final
            answer and ends the run. By default `boxed_answer`.
        answer_tokens: how long a worker may write behind `prompts.closing` when the steps or the
            context run out, or all have ended, without an answer; it does so greedily. Room for
            it is kept free. 0, or prompts without a closing text: the run ends without.
        paragraph_ends: called with a worker's paragraph so far; whether it is finished. By
            default `prompts.ends_paragraph`.
        linear: "packed" for packed linear layers; the model stays patched so. See `patch`.

    Raises TypeError and ValueError for a bad argument, by its name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        workers: int | Sequence[str] = 2,
        layout: str | Layout = "combined",
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processors: Sequence[Callable[..., torch.Tensor]] = (),
        prompts: Prompts | None = None,
        question_every: int | None = 1024,
        final_answer: Callable[[str], str | None] | None = None,
        answer_tokens: int = 64,
        paragraph_ends: Callable[[str], bool] | None = None,
        linear: str | None = None,
    ) -> None:
        from .model_support import read_model

        self.max_position = read_model(model).max_position
        self.model = model
        for method in ("encode", "decode"):
            if not callable(getattr(tokenizer, method, None)):
                raise TypeError(
                    f"tokenizer: expected a tokenizer of transformers, got "
                    f"{checks.describe(tokenizer)}"
                )
        self.tokenizer = tokenizer
        self.names = worker_names(workers)
        self.layout = layout_from(layout)
        if max_tokens is None:
            max_tokens = min(self.max_position, 65536)
        self.max_tokens = checks.is_integer("max_tokens", max_tokens, 1)
        self.seed = None if seed is None else checks.is_integer("seed", seed, 0, 2**63 - 1)
        if generation_config is None:
            generation_config = getattr(model, "generation_config", None) or GenerationConfig()
        check_config(generation_config)
        if prompts is None:
            prompts = prompts_for(model.num_parameters())
        elif not isinstance(prompts, Prompts):
            raise TypeError(f"prompts: expected Prompts, got {checks.describe(prompts)}")
        self.prompts = prompts
        if question_every is not None:
            question_every = checks.is_integer("question_every", question_every, 1)
        self.question_every = question_every if prompts.question and len(self.names) > 1 else None
        self.answer_tokens = checks.is_integer("answer_tokens", answer_tokens, 0)
        self.closing = self.encode(prompts.closing) if self.answer_tokens else []
        self.ends_of_sequence = _ends_of_sequence(generation_config, tokenizer)
        never = [self.encode(text) for text in prompts.forbidden(self.names)]
        never += [[token] for token in sorted(_special(tokenizer) - self.ends_of_sequence)]
        # A tokenizer may know tokens that the model has no logits for.
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        never = [tokens for tokens in never if tokens and max(tokens) < self.vocab_size]
        self.sampler = Sampler(generation_config, logits_processors, never)
        plain = GenerationConfig(
            bad_words_ids=generation_config.bad_words_ids,
            suppress_tokens=generation_config.suppress_tokens,
        )
        self.greedy = Sampler(plain, logits_processors, never)  # for conclusions
        self.final_answer = _callable("final_answer", final_answer, boxed_answer)
        self.paragraph_ends = _callable("paragraph_ends", paragraph_ends, prompts.ends_paragraph)
        if linear is not None:
            patch(model, linear=linear)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that goes on in the middle of the page."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def run(
        self,
        problem: str,
        max_steps: int = 2048,
        *,
        snapshots: Sequence[int] = (),
        trace: str | Path | None = None,
    ) -> Result:
        """Works on the problem until a final answer, the end of all workers, `max_steps` forward
        passes or the end of the context. Ctrl-C ends it too: `stopped_by` is then "interrupted".

        Args:
            snapshots: after each of these numbers of steps the team is asked for the answer that
                it would give if the time were up, and goes on as if it had not been asked. So one
                run tells what it would have been with smaller budgets. Needs `prompts.closing`.
            trace: a file for everything that happens; see `hogwild_ext.trace`.

        Raises TypeError and ValueError for a bad argument, and for a problem too long to begin,
        OSError for a trace that cannot be written.
        """
        with self.stream(problem, max_steps, snapshots=snapshots, trace=trace) as events:
            try:
                for _ in events:
                    pass
            except KeyboardInterrupt:
                events.stop()
            return events.result()

    def stream(
        self,
        problem: str,
        max_steps: int = 2048,
        *,
        snapshots: Sequence[int] = (),
        trace: str | Path | None = None,
    ) -> Run:
        """The same as an iterator of events; nothing is computed before the first is asked for.

        Several streams may be open at once, each with its own page.
        """
        if not isinstance(problem, str):
            raise TypeError(f"problem: expected a string, got {checks.describe(problem)}")
        if not problem.strip():
            raise ValueError("problem: expected some text, got none")
        max_steps = checks.is_integer("max_steps", max_steps, 1)
        checks.is_sequence("snapshots", snapshots, "numbers of steps")
        budgets = {checks.is_integer("snapshots", steps, 1, max_steps) for steps in snapshots}
        if budgets and not self.closing:
            raise ValueError(
                "snapshots: expected prompts with a closing text, and answer_tokens above 0, to "
                f"make the team answer, got {'no tokens' if self.prompts.closing else 'no text'}"
            )
        if trace is not None and not isinstance(trace, (str, Path)):
            raise TypeError(f"trace: expected a path, got {checks.describe(trace)}")
        return Run(self, problem, max_steps, budgets, trace)


def worker_names(workers: int | Sequence[str]) -> tuple[str, ...]:
    """Names for a number of workers, or the names given, checked."""
    if isinstance(workers, (list, tuple)):
        if not workers:
            raise ValueError("workers: expected at least one name, got none")
        for name in workers:
            if not isinstance(name, str):
                raise TypeError(f"workers: expected names, got {checks.describe(name)}")
            if not name.strip() or not name.isprintable():
                raise ValueError(f"workers: expected names of printable letters, got {name!r}")
        if len(set(workers)) < len(workers):
            raise ValueError(f"workers: expected different names, got {', '.join(workers)}")
        return tuple(workers)
    if isinstance(workers, str):
        raise TypeError(f"workers: expected a number or a list of names, got {workers!r}")
    count = checks.is_integer("workers", workers, 1, 1024)
    return (*NAMES[:count], *(f"Worker {i + 1}" for i in range(len(NAMES), count)))


def _callable(name: str, value: Any, default: Callable[..., Any]) -> Callable[..., Any]:
    if value is None:
        return default
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {checks.describe(value)}")
    checked: Callable[..., Any] = value
    return checked


def _special(tokenizer: Any) -> set[int]:
    """Tokens that mean something to a chat template: no worker writes them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, content in added.items() if content.special}
    return special | set(getattr(tokenizer, "all_special_ids", ()))


def _ends_of_sequence(config: GenerationConfig, tokenizer: Any) -> frozenset[int]:
    ids = config.eos_token_id
    ends = set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return frozenset({*ends, getattr(tokenizer, "eos_token_id", None)} - {None})


# ---- a run ---------------------------------------------------------------------------------------


@dataclass
class _Paragraph:
    number: int  # of the worker's, from 1
    start: int  # in its segment: where its heading begins
    heading: str
    question: str = ""
    text: str = ""

    def on_page(self) -> str:
        """As a reader of the whole page sees it."""
        above = self.heading + self.question
        gap = "" if not self.text or self.text[0].isspace() else " "
        return (above + gap + self.text).strip()


@dataclass
class _Worker:
    """What a run knows of a worker, apart from the page."""

    index: int
    name: str
    generator: torch.Generator
    spare: Segment  # empty: the next paragraph goes there
    decoder: TextDecoder
    paragraphs: list[_Paragraph] = field(default_factory=list)  # the last one is being written
    pending: list[Piece] = field(default_factory=list)  # what the next step encodes
    opens: bool = True  # they end with the heading of a paragraph
    closes: bool = False  # they are the end of one
    tokens: list[int] = field(default_factory=list)  # generated
    heading_tokens: list[int] = field(default_factory=list)  # of the last heading, and a question
    asked_at: int = 0  # how many there were when it was last asked whether its work is redundant
    committed: int = 0  # paragraphs
    ended: bool = False


@dataclass(frozen=True)
class _Row:
    """One view in a step and what its writer, if it has one, writes to its end."""

    view: list[Segment]
    pieces: list[Piece]
    writer: _Worker | None = None
    speaks: bool = False  # the writer draws a token from it

    @property
    def tokens(self) -> list[int]:
        return [token for tokens, _ in self.pieces for token in tokens]


class Run:
    """A run of a team: an iterator of events. Made by `Hogwild.stream`.

    `result()` tells at any time, afterwards too, what there is. The memory of the page is given
    back at the end of the run, by `close()`, and on leaving `with`.
    """

    def __init__(
        self,
        team: Hogwild,
        problem: str,
        max_steps: int,
        budgets: set[int],
        trace: str | Path | None,
    ) -> None:
        self.seed = secrets.randbits(32) if team.seed is None else team.seed
        self._team = team
        self._max_steps = max_steps
        self._budgets = budgets
        self._snapshots: list[Snapshot] = []
        self._steps = 0
        self._stats = Stats()
        self._history: list[str] = []
        self._answer: str | None = None
        self._answered_by: str | None = None
        self._stopped_by: str | None = None
        self._stop_wanted = False
        self._is_full = False  # in the middle of a step
        self._resumed = 0.0  # when the engine's turn began: the caller has it between two events

        self._opening_text = team.prompts.opening(team.tokenizer, team.names, problem, team.layout)
        self._cache = SegmentCache.for_model(team.model, max_tokens=team.max_tokens)
        segment, names = self._cache.segment, team.names
        self._page = Page(
            prompt=segment("prompt"),
            history=segment("history"),
            others_heading=segment("others heading"),
            own_heading=segment("own heading"),
            live=[segment(f"{name}: live, one") for name in names],
            unfinished=[segment(f"{name}: unfinished") for name in names],
            writing=list(range(len(names))),
        )
        self._workers = [
            _Worker(
                index=index,
                name=name,
                generator=generator_of(self.seed, index),
                spare=segment(f"{name}: live, two"),
                decoder=TextDecoder(team.tokenizer),
            )
            for index, name in enumerate(names)
        ]
        first = [self._team.encode(text) for text in team.prompts.forbidden_first(names)]
        known = team.vocab_size
        self._not_first = sorted({tokens[0] for tokens in first if tokens and tokens[0] < known})
        self._recorder = None if trace is None else self._open_trace(trace, problem)
        self._events = self._play()

    def _open_trace(self, path: str | Path, problem: str) -> Recorder:
        from . import __version__

        team = self._team
        return Recorder(
            path,
            self._cache.segments,
            {
                "hogwild_ext": __version__,
                "model": Path(team.model.name_or_path).name or None,
                "problem": problem,
                "layout": team.layout.name,
                "workers": list(team.names),
                "seed": self.seed,
                "max_steps": self._max_steps,
                "bytes_per_token": self._cache.bytes_per_token,
            },
        )

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def stop(self) -> None:
        """Ends the run after the current step, as Ctrl-C would. Signal handlers may call it."""
        self._stop_wanted = True

    def close(self) -> None:
        """Gives back the page's memory. No more events come."""
        self._events.close()
        self._release()

    def result(self) -> Result:
        """What there is so far."""
        paragraphs = list(self._history)
        for worker in self._workers:
            paragraphs += [p.on_page() for p in worker.paragraphs[worker.committed :] if p.text]
        return Result(
            answer=self._answer,
            text="\n\n".join(paragraphs),
            workers=[
                WorkerResult(
                    name=worker.name,
                    text="".join(paragraph.text for paragraph in worker.paragraphs),
                    tokens=list(worker.tokens),
                    ended=worker.ended,
                )
                for worker in self._workers
            ],
            steps=self._steps,
            stats=copy.copy(self._stats),
            stopped_by=self._stopped_by,
            seed=self.seed,
            snapshots=[*self._snapshots, *self._later_snapshots()],
        )

    def _later_snapshots(self) -> list[Snapshot]:
        """With a larger budget than it needed, a run that ended by itself gives the same answer."""
        if self._stopped_by is None or self._stopped_by == "interrupted":
            return []
        taken = {snapshot.steps for snapshot in self._snapshots}
        return [
            Snapshot(steps, self._answer, self._answered_by, "")
            for steps in sorted(self._budgets - taken)
        ]

    # ---- the loop ---------------------------------------------------------------------------

    def _play(self) -> Generator[Event, None, None]:
        stats, clock = self._stats, time.perf_counter
        try:
            self._resumed = clock()
            rows = self._opening_rows()
            while self._stopped_by is None:
                events = self._step(rows)
                wanted = self._steps in self._budgets and not self._stop_wanted
                if self._stopped_by is None and wanted:
                    events += self._take_snapshot()
                if self._stopped_by is None:
                    self._stopped_by = self._limit()
                if self._stopped_by is None:
                    rows = self._next_rows()
                    if self._longest_view(rows) > self._team.max_position:
                        self._stopped_by = "context"
                if self._stopped_by is not None:
                    events += self._ending()
                stats.seconds = self._now()
                if self._steps == 1:
                    stats.first_token_seconds = stats.seconds
                yield from events
                self._resumed = clock()
        except KeyboardInterrupt:
            self._stopped_by = "interrupted"
            self._record("stop", worker=None, reason=self._stopped_by, answer=None)
            raise
        finally:
            self._release()

    def _now(self) -> float:
        """Seconds of the run, without those of the caller."""
        return self._stats.seconds + time.perf_counter() - self._resumed

    def _release(self) -> None:
        """Lets go of keys and values."""
        if self._recorder is not None:
            self._recorder.close()
        for name in ("_cache", "_page"):
            self.__dict__.pop(name, None)
        for worker in self._workers:
            worker.__dict__.pop("spare", None)

    def _limit(self) -> str | None:
        """Why there must be no next step."""
        if self._stop_wanted:
            return "interrupted"
        if self._steps >= self._max_steps:
            return "max_steps"
        return "context" if self._reserve and self._room_is_short() else None

    def _room_is_short(self) -> bool:
        """Whether the next step could leave no room for a conclusion, whatever it brings.

        Asked before the page changes for that step: the conclusion is to see all of it.
        """
        page, cache = self._page, self._cache
        heading = max(len(worker.heading_tokens) for worker in self._workers) + 2  # longer numbers
        new = sum(token_count(worker.pending) + heading for worker in self._workers)
        views = [self._team.layout.view(page, worker.index) for worker in self._workers]
        longest = max(sum(map(len, view)) for view in views)
        if longest + new + self._reserve > self._team.max_position:
            return True
        moved = sum(
            len(page.live[w.index]) for w in self._workers if w.closes
        )  # copied, then freed
        # The copy that a conclusion writes to shares all but a part of a page.
        return new + moved + self._reserve + PAGE_SIZE > cache.free_tokens

    def _ending(self) -> list[Event]:
        """The last events: a conclusion if nobody has given an answer yet, and the stop."""
        team, events = self._team, []
        can_answer = self._stopped_by != "interrupted" and not self._is_full
        if self._answer is None and can_answer and team.closing:
            taken = [shot for shot in self._snapshots if shot.steps == self._steps]
            last = taken[0] if taken else self._conclude()
            if not taken:
                events.append(Event("conclusion", self._steps, last.worker, text=last.text))
            if last.answer is not None:
                self._answer, self._answered_by = last.answer, last.worker
        assert self._stopped_by is not None
        events.append(Event("stop", self._steps, self._answered_by, text=self._stopped_by))
        self._record("stop", worker=self._answered_by, reason=self._stopped_by, answer=self._answer)
        return events

    # ---- what a step brings -----------------------------------------------------------------

    def _opening_rows(self) -> list[_Row]:
        """The fixed texts, and the headings of everybody's first paragraph: all in one step."""
        team, page, prompts = self._team, self._page, self._team.prompts
        for worker in self._workers:
            self._open_paragraph(worker)
        speaking = [self._speaking_row(worker) for worker in self._workers]
        texts = {
            page.prompt: self._opening_text,
            page.others_heading: prompts.others_heading,
            page.own_heading: prompts.own_heading,
            **dict.fromkeys(page.unfinished, prompts.unfinished),
        }
        rows = []
        for view in (row.view for row in speaking):
            for i, segment in enumerate(view):
                if (text := texts.pop(segment, None)) and (tokens := team.encode(text)):
                    rows.append(_Row(view[: i + 1], [(tokens, text)]))
        rows += speaking

        self._stats.prompt_tokens = sum(token_count(row.pieces) for row in rows)
        # Every view shows nearly everything, so the limits are the same but for a few headings.
        needed = max(self._longest_view(rows), self._stats.prompt_tokens) + self._reserve
        if needed >= min(team.max_position, team.max_tokens):
            raise ValueError(
                f"problem: expected one that leaves room for an answer, got {needed} tokens with "
                f"the instructions; the model has {team.max_position} positions, max_tokens is "
                f"{team.max_tokens}"
            )
        return rows

    def _next_rows(self) -> list[_Row]:
        """What everybody brings next. Finished paragraphs are on their way into the history."""
        page, layout = self._page, self._team.layout
        for worker in self._workers:
            if worker.ended and not worker.closes and worker.index in page.writing:
                page.writing.remove(worker.index)
                self._drop_paragraph(worker)
        closing = [worker for worker in self._workers if worker.closes]
        rows = [self._row(worker) for worker in closing if layout.commits or worker.ended]
        for worker in closing:
            if layout.commits:
                live = page.live[worker.index]
                page.finishing.append(live)
                page.live[worker.index], worker.spare = worker.spare, live
            if worker.ended:
                page.writing.remove(worker.index)
            else:
                self._open_paragraph(worker)
            worker.closes = layout.commits  # until the commit
        rows += [self._speaking_row(worker) for worker in self._workers if not worker.ended]
        return rows

    def _row(self, worker: _Worker) -> _Row:
        view = self._team.layout.view(self._page, worker.index)
        return _Row(view, worker.pending, worker)

    def _speaking_row(self, worker: _Worker) -> _Row:
        return replace(self._row(worker), speaks=True)

    def _open_paragraph(self, worker: _Worker) -> None:
        """Begins a paragraph in the worker's live segment, behind what is pending there."""
        team, prompts = self._team, self._team.prompts
        number = len(worker.paragraphs) + 1
        paragraph = _Paragraph(number, 0, prompts.paragraph_heading(worker.name, number))
        every = team.question_every
        if every is not None and len(worker.tokens) - worker.asked_at >= every:
            worker.asked_at = len(worker.tokens)
            paragraph.question = prompts.paragraph_question(worker.name, number)
        worker.paragraphs.append(paragraph)

        above = paragraph.heading + paragraph.question
        tokens = team.encode(above)
        if team.layout.commits or number == 1:
            worker.pending = []
        paragraph.start = len(self._page.live[worker.index]) + token_count(worker.pending)
        worker.pending = [*worker.pending, (tokens, above)]
        worker.decoder = TextDecoder(team.tokenizer, tokens)
        worker.heading_tokens = team.encode(
            paragraph.heading + prompts.paragraph_question(worker.name, number)
        )
        worker.opens = True

    def _drop_paragraph(self, worker: _Worker) -> None:
        """A heading under which nothing was written goes away."""
        live, start = self._page.live[worker.index], worker.paragraphs[-1].start
        live.truncate(start)
        if self._recorder is not None:
            self._record("truncate", segment=self._recorder.number(live), length=start)

    @property
    def _reserve(self) -> int:
        """Tokens that must be left for a conclusion."""
        closing = self._team.closing
        return len(closing) + self._team.answer_tokens if closing else 0

    @staticmethod
    def _longest_view(rows: list[_Row]) -> int:
        """Tokens in the longest view after the step."""
        new = {row.view[-1]: token_count(row.pieces) for row in rows}
        return max(sum(len(part) + new.get(part, 0) for part in row.view) for row in rows)

    # ---- a step -----------------------------------------------------------------------------

    def _step(self, rows: list[_Row]) -> list[Event]:
        """One forward pass; what it brings into the history; a token for every worker."""
        stats, recorder = self._stats, self._recorder
        try:
            logits = self._forward([row.view for row in rows], [row.tokens for row in rows])
            self._steps += 1
            seen = [recorder.seen(row.view) for row in rows] if recorder else []
            moved = [(worker.spare, len(worker.spare)) for worker in self._workers if worker.closes]
            commits = self._commit()
        except OutOfPages:
            self._stopped_by, self._is_full = "context", True
            return []
        counted = self._cache.stats
        stats.attention_seconds = counted.attention_seconds
        stats.encoded_tokens = counted.appended_tokens - stats.concluding_tokens
        stats.committed_tokens = counted.committed_tokens
        stats.copied_bytes = counted.copied_bytes

        started = time.perf_counter()
        drawn = [
            (row.writer, self._choose(row.writer, scores))
            for row, scores in zip(rows, logits, strict=True)
            if row.speaks and row.writer is not None
        ]
        stats.sampling_seconds += time.perf_counter() - started

        events = []
        for worker, _ in drawn:
            if worker.opens:
                worker.opens = False
                paragraph = worker.paragraphs[-1]
                events.append(self._event("start", worker, text=paragraph.heading))
                if paragraph.question:
                    events.append(self._event("question", worker, text=paragraph.question))
        for worker, token in drawn:
            events.append(self._take(worker, token))
        if recorder is not None:
            self._record_step(recorder, rows, seen, events, list(zip(commits, moved, strict=True)))
        if self._stopped_by is None and all(worker.ended for worker in self._workers):
            self._stopped_by = "end"
        return commits + events

    def _forward(self, views: list[list[Segment]], tokens: list[list[int]]) -> torch.Tensor:
        """The logits behind each view's last token: [len(views), vocab]."""
        started, cache = time.perf_counter(), self._cache
        logits = forward(self._team.model, cache, views, tokens)
        assert isinstance(logits, torch.Tensor)
        if cache.device.type == "cuda":  # or the sampler would wait, and be charged with it
            torch.cuda.current_stream(cache.device).synchronize()
        self._stats.forward_seconds += time.perf_counter() - started
        return logits

    def _choose(self, worker: _Worker, logits: torch.Tensor) -> int:
        """A token for the worker; `logits` are its [vocab]."""
        forbidden: Sequence[int] = ()
        if worker.paragraphs[-1].text == "":
            forbidden = self._not_first
            if not worker.tokens:  # nobody ends without having written anything
                forbidden = [*forbidden, *self._team.ends_of_sequence]
        return self._team.sampler(logits, worker.tokens, worker.generator, forbidden)

    def _commit(self) -> list[Event]:
        """The paragraphs whose last token was encoded just now move into the history."""
        events = []
        for worker in self._workers:
            if worker.closes:
                worker.closes = False
                self._cache.commit(worker.spare, self._page.history)
                paragraph = worker.paragraphs[worker.committed]
                worker.committed += 1
                self._history.append(paragraph.on_page())
                text = paragraph.question + paragraph.text
                events.append(
                    Event("commit", self._steps, worker.name, paragraph.number, text=text)
                )
        self._page.finishing.clear()
        return events

    def _take(self, worker: _Worker, token: int) -> Event:
        """What a worker's new token means."""
        team, paragraph = self._team, worker.paragraphs[-1]
        if token in team.ends_of_sequence:
            worker.ended = True
            text = worker.decoder.flush()
            paragraph.text += text
            worker.closes = paragraph.text != ""
            gap = team.prompts.paragraph_break
            worker.pending = [(team.encode(gap), text + gap)]
            return self._event("end", worker, text=text, token=token)
        worker.tokens.append(token)
        self._stats.generated_tokens += 1
        text = worker.decoder.add(token)
        worker.pending = [([token], text)]
        if text:
            paragraph.text += text
            worker.closes = team.paragraph_ends(paragraph.text)
            answer = team.final_answer(paragraph.text)
            if answer is not None and self._stopped_by is None:
                self._answer, self._answered_by, self._stopped_by = answer, worker.name, "answer"
        return self._event("token", worker, text=text, token=token)

    def _event(
        self, kind: str, worker: _Worker, *, text: str = "", token: int | None = None
    ) -> Event:
        return Event(kind, self._steps, worker.name, worker.paragraphs[-1].number, token, text)

    # ---- being asked for an answer ----------------------------------------------------------

    def _take_snapshot(self) -> list[Event]:
        snapshot = self._conclude()
        if snapshot.answer is not None or not self._stop_wanted:  # else it was cut short
            self._snapshots.append(snapshot)
        return [Event("conclusion", self._steps, snapshot.worker, text=snapshot.text)]

    def _conclude(self) -> Snapshot:
        """Has a worker give its answer now, on a copy of its live segment.

        It is the first one that has not ended, or else one that ended in this very step.
        """
        team, cache, stats = self._team, self._cache, self._stats
        worker = next(
            (worker for worker in self._workers if not worker.ended),
            self._workers[self._page.writing[0]],
        )
        *before, live = team.layout.view(self._page, worker.index)
        copied = cache.fork(live)
        view = [*before, copied]
        new = [token for tokens, _ in worker.pending for token in tokens] + team.closing
        text, answer, written = team.prompts.closing, None, list[int]()
        decoder = TextDecoder(team.tokenizer, new)
        try:
            while answer is None and len(written) < team.answer_tokens and not self._stop_wanted:
                if sum(map(len, view)) + len(new) > team.max_position:
                    break
                logits = self._forward([view], [new])
                stats.concluding_tokens += len(new)
                token = team.greedy(logits[0], worker.tokens + written, worker.generator)
                if token in team.ends_of_sequence:
                    text += decoder.flush()
                    break
                written.append(token)
                new = [token]
                text += decoder.add(token)
                answer = team.final_answer(text)
        except OutOfPages:
            pass  # then there is none
        finally:
            cache.free(copied)
        stats.copied_bytes = cache.stats.copied_bytes
        self._record("conclusion", worker=worker.name, text=text, answer=answer)
        return Snapshot(self._steps, answer, worker.name, text)

    # ---- the trace --------------------------------------------------------------------------

    def _record(self, kind: str, **content: Any) -> None:
        if self._recorder is not None:
            self._recorder.write(
                {"kind": kind, "step": self._steps, "time": round(self._now(), 6), **content}
            )

    def _record_step(
        self,
        recorder: Recorder,
        rows: list[_Row],
        seen: list[list[list[int]]],
        events: list[Event],
        commits: list[tuple[Event, tuple[Segment, int]]],
    ) -> None:
        """A step and what came of it. Commits last: what was seen, was seen before them."""
        stats = self._stats
        self._record(
            "step",
            rows=[
                {
                    "worker": row.writer.name if row.writer else None,
                    "segment": recorder.number(row.view[-1]),
                    "tokens": tokens,
                    "text": text,
                }
                for row in rows
                for tokens, text in row.pieces
            ],
            encoded_tokens=stats.encoded_tokens,
            committed_tokens=stats.committed_tokens,
            copied_bytes=stats.copied_bytes,
            forward_seconds=round(stats.forward_seconds, 6),
            sampling_seconds=round(stats.sampling_seconds, 6),
        )
        sees = {
            row.writer.name: view
            for row, view in zip(rows, seen, strict=True)
            if row.speaks and row.writer is not None
        }
        for event in events:
            more: dict[str, Any] = {}
            if event.kind in ("token", "end"):
                assert event.worker is not None
                more = {"token": event.token, "sees": sees[event.worker]}
            self._record(
                event.kind,
                worker=event.worker, paragraph=event.paragraph, text=event.text, **more,
            )  # fmt: skip
        for event, (source, count) in commits:
            self._record(
                "commit",
                worker=event.worker,
                paragraph=event.paragraph,
                segment=recorder.number(source),
                into=recorder.number(self._page.history),
                tokens=count,
                text=event.text,
            )
