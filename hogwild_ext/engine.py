"""The engine: several workers of one model write on one page, each reading the others' live text.

See sections 3 and 4 of arXiv 2504.06261. A *step* is one forward pass; every worker that has not
ended gets one token from each. A *paragraph* is what a worker writes until a finished sentence and
an empty line; it then moves into the history, which all workers read first.

Every token is encoded exactly once. In the step that brings the last token of a paragraph, its
writer therefore stands twice: once to store that token at the end of the old paragraph, and once
with the heading of its next one, whose last token gives the prediction. Everybody reads the old
paragraph at the end of the history already in that step. The commit after it moves the keys to
just these positions, so it changes nothing of what anyone reads.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch

from . import checks
from .cache import OutOfPages, Segment, SegmentCache
from .layouts import Layout, Page, layout_from
from .patching import forward, patch
from .prompts import Prompts, prompts_for

try:
    from transformers import GenerationConfig
    from transformers.generation import logits_process as processors
except ImportError as error:
    raise ImportError(
        "the engine needs transformers: pip install 'hogwild_ext[run]'", name="transformers"
    ) from error

NAMES = (
    "Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi",
    "Ivan", "Judy", "Kevin", "Laura", "Mallory", "Niaj", "Olivia", "Peggy",
)  # fmt: skip

EVENT_KINDS = ("start", "token", "commit", "end", "stop")
STOP_REASONS = ("answer", "end", "max_steps", "context", "interrupted")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: "start": a paragraph begins, `text` is its heading.
            "token": one generated token. `text` is what it adds, and empty while a character of
            several bytes is incomplete.
            "commit": a finished paragraph joined the history; `text` is all of it, without heading.
            "end": the worker has ended; `token` is its end-of-sequence token.
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
    encoded_tokens: int = 0  # prompt, headings and generated ones, each once
    committed_tokens: int = 0

    @property
    def engine_seconds(self) -> float:
        """The engine's own Python: views, text, bookkeeping."""
        return max(0.0, self.seconds - self.forward_seconds - self.sampling_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together, over the whole run."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Result:
    """A run, finished or not.

    Attributes:
        answer: the final answer, None if no worker gave one.
        text: the page: the history, then the paragraphs that were left unfinished, with headings.
        workers: in order; each has .name, .text and .tokens.
        steps: forward passes.
        stopped_by: one of `STOP_REASONS`, None for a run that is still going on.
        seed: repeats the run, with the same team, problem, machine and number of threads.
    """

    answer: str | None
    text: str
    workers: list[WorkerResult]
    steps: int
    stats: Stats
    stopped_by: str | None
    seed: int


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
        final_answer: called with a worker's paragraph so far whenever it grows; what it returns,
            unless None, is the final answer and ends the run. By default `boxed_answer`.
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
        final_answer: Callable[[str], str | None] | None = None,
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
        if prompts is None:
            prompts = prompts_for(sum(weight.numel() for weight in model.parameters()))
        elif not isinstance(prompts, Prompts):
            raise TypeError(f"prompts: expected Prompts, got {checks.describe(prompts)}")
        self.prompts = prompts
        never = (self.encode(text) for text in prompts.forbidden(self.names))
        self.sampler = Sampler(
            generation_config, logits_processors, [tokens for tokens in never if tokens]
        )
        self.ends_of_sequence = _ends_of_sequence(generation_config, tokenizer)
        self.final_answer = _callable("final_answer", final_answer, boxed_answer)
        self.paragraph_ends = _callable("paragraph_ends", paragraph_ends, prompts.ends_paragraph)
        if linear is not None:
            patch(model, linear=linear)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that goes on in the middle of the page."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def run(self, problem: str, max_steps: int = 2048) -> Result:
        """Works on the problem until a final answer, the end of all workers, `max_steps` forward
        passes or the end of the context. Ctrl-C ends it too: `stopped_by` is then "interrupted".

        Raises TypeError and ValueError for a bad argument, and for a problem too long to begin.
        """
        with self.stream(problem, max_steps) as events:
            try:
                for _ in events:
                    pass
            except KeyboardInterrupt:
                events.stop()
            return events.result()

    def stream(self, problem: str, max_steps: int = 2048) -> Run:
        """The same as an iterator of events; nothing is computed before the first is asked for.

        Several streams may be open at once, each with its own page.
        """
        if not isinstance(problem, str):
            raise TypeError(f"problem: expected a string, got {checks.describe(problem)}")
        if not problem.strip():
            raise ValueError("problem: expected some text, got none")
        return Run(self, problem, checks.is_integer("max_steps", max_steps, 1))


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


def _ends_of_sequence(config: GenerationConfig, tokenizer: Any) -> frozenset[int]:
    ids = config.eos_token_id
    ends = set(ids) if isinstance(ids, (list, tuple)) else {ids}
    return frozenset({*ends, getattr(tokenizer, "eos_token_id", None)} - {None})


# ---- the final answer ----------------------------------------------------------------------------


def boxed_answer(text: str) -> str | None:
    """What stands in the last complete `\\boxed{...}` of the text, None without one.

    Nothing, and mere dots, are not an answer: models quote the instruction to write one.
    """
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        content = _within_braces(text, start + len("\\boxed{"))
        if content is not None and content.strip(" .\u2026"):
            return content.strip()
        end = start
    return None


def _within_braces(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it, None if none does."""
    depth = 1
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start:i]
    return None


# ---- choosing a token ----------------------------------------------------------------------------

# Settings that mean another way of decoding -> the values that mean it is off.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "watermarking_config": (None,),
}


class Sampler:
    """Chooses the next token of one worker: transformers' processors, then a draw.

    `more`: processors after those that `config` asks for. `never`: runs of tokens that are never
    completed.

    Raises TypeError for what is not a GenerationConfig, ValueError for a setting that is not
    followed or out of its range.
    """

    def __init__(
        self,
        config: GenerationConfig,
        more: Sequence[Callable[..., torch.Tensor]] = (),
        never: Sequence[list[int]] = (),
    ) -> None:
        if not isinstance(config, GenerationConfig):
            raise TypeError(
                f"generation_config: expected a GenerationConfig, got {checks.describe(config)}"
            )
        for name, off in _REFUSED.items():
            if (value := getattr(config, name, None)) not in off:
                raise ValueError(
                    f"generation_config: expected {name} not to be set, got {name}={value}"
                )
        try:
            self._build(config, never)
        except ValueError as error:  # of a processor of transformers
            raise ValueError(f"generation_config: {error}") from None
        checks.is_sequence("logits_processors", more, "logits processors")
        for i, process in enumerate(more):
            if not callable(process):
                raise TypeError(
                    f"logits_processors[{i}]: expected a logits processor, got "
                    f"{checks.describe(process)}"
                )
        self._processors += list(more)

    def _build(self, config: GenerationConfig, never: Sequence[list[int]]) -> None:
        # Those that look at tokens, over the whole vocabulary.
        self._processors: list[Callable[..., torch.Tensor]] = []
        if config.repetition_penalty not in (None, 1.0):
            self._processors.append(
                processors.RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty))
            )
        if config.no_repeat_ngram_size:
            self._processors.append(
                processors.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
            )
        if bad_words := [*(config.bad_words_ids or ()), *never]:
            self._processors.append(processors.NoBadWordsLogitsProcessor(bad_words))
        if config.suppress_tokens:
            self._processors.append(
                processors.SuppressTokensLogitsProcessor(config.suppress_tokens)
            )

        # Those that look at scores only, over the top_k best tokens. In the order of `generate`,
        # but for the temperature, which does not change who is best, after the choice of them.
        self._warpers: list[Callable[..., torch.Tensor]] = []
        self._top_k = 0
        self.greedy = not config.do_sample or config.temperature == 0
        if self.greedy:
            return
        self._top_k = 50 if config.top_k is None else checks.is_integer("top_k", config.top_k, 0)
        if config.temperature not in (None, 1.0):
            self._warpers.append(processors.TemperatureLogitsWarper(float(config.temperature)))
        if config.top_p not in (None, 1.0):
            self._warpers.append(processors.TopPLogitsWarper(float(config.top_p)))
        if config.min_p is not None:
            self._warpers.append(processors.MinPLogitsWarper(float(config.min_p)))
        if config.typical_p not in (None, 1.0):
            self._warpers.append(processors.TypicalLogitsWarper(float(config.typical_p)))

    def __call__(
        self,
        logits: torch.Tensor,
        written: list[int],
        generator: torch.Generator,
        forbidden: Sequence[int] = (),
    ) -> int:
        """Chooses a token.

        Args:
            logits: [vocab] of one worker.
            written: its own tokens so far.
            generator: its random numbers, on the CPU.
            forbidden: tokens that must not be chosen.
        """
        scores = logits.float().unsqueeze(0)  # [1, vocab]
        if forbidden:
            where = torch.tensor(forbidden, device=scores.device)
            scores = scores.index_fill(1, where, float("-inf"))
        if self._processors:
            tokens = torch.tensor([written], dtype=torch.int64, device=scores.device)
            for process in self._processors:
                scores = process(tokens, scores)
        if self.greedy:
            return int(scores.argmax())
        best: torch.Tensor | None = None
        if 0 < self._top_k < scores.shape[-1]:
            scores, best = scores.topk(self._top_k)
        scores = scores.cpu()  # the generator is there, so that a seed means the same everywhere
        for warp in self._warpers:
            scores = warp(None, scores)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        return int(drawn if best is None else best[0, int(drawn)])


def _generator(seed: int, worker: int) -> torch.Generator:
    """A worker's random numbers: a function of the seed and of its place in the team."""
    state = np.random.SeedSequence([seed, worker]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


# ---- text ----------------------------------------------------------------------------------------


class TextDecoder:
    """Tokens to text, one at a time: what was returned is never taken back.

    `before` are tokens that stand in front. Some tokenizers decode a token differently where it
    is the first.
    """

    # A character has at most 4 bytes, a token at least one. Past that, it is not incomplete but
    # wrong, and is shown as it is.
    _MOST_PENDING = 3

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before)[-8:]
        self._start = 0  # from here on tokens are decoded together
        self._shown = len(self._tokens)

    def add(self, token: int) -> str:
        """The text that the token adds; empty while it ends within a character."""
        self._tokens.append(token)
        return self._advance(self._MOST_PENDING)

    def flush(self) -> str:
        """The text of what is left, an incomplete character as U+FFFD."""
        return self._advance(0)

    def _advance(self, most_pending: int) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        text = self._decode(self._tokens[self._start :])
        pending = len(self._tokens) - self._shown
        if pending == 0 or (text.endswith("\ufffd") and pending <= most_pending):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text


# ---- a run ---------------------------------------------------------------------------------------


@dataclass
class _Paragraph:
    number: int  # of the worker's, from 1
    heading: str
    text: str = ""

    def on_page(self) -> str:
        """As a reader of the whole page sees it."""
        gap = "" if not self.text or self.text[0].isspace() else " "
        return (self.heading + gap + self.text).strip()


@dataclass
class _Worker:
    """What a run knows of a worker, apart from the page."""

    index: int
    name: str
    generator: torch.Generator
    spare: Segment  # empty: the next paragraph goes there
    decoder: TextDecoder
    paragraphs: list[_Paragraph] = field(default_factory=list)  # the last one is being written
    pending: list[int] = field(default_factory=list)  # tokens that the next step encodes
    opens: bool = True  # they are the heading of a paragraph
    closes: bool = False  # they are the end of one
    tokens: list[int] = field(default_factory=list)  # generated
    committed: int = 0  # paragraphs
    ended: bool = False


@dataclass(frozen=True)
class _Row:
    """One view in a step and what is written to its end; `worker` gets the prediction, if any."""

    view: list[Segment]
    tokens: list[int]
    worker: _Worker | None = None


class Run:
    """A run of a team: an iterator of events. Made by `Hogwild.stream`.

    `result()` tells at any time, afterwards too, what there is. The memory of the page is given
    back at the end of the run, by `close()`, and on leaving `with`.
    """

    def __init__(self, team: Hogwild, problem: str, max_steps: int) -> None:
        self.seed = secrets.randbits(32) if team.seed is None else team.seed
        self._team = team
        self._max_steps = max_steps
        self._steps = 0
        self._stats = Stats()
        self._history: list[str] = []
        self._answer: str | None = None
        self._answered_by: str | None = None
        self._stopped_by: str | None = None
        self._stop_wanted = False

        self._opening_text = team.prompts.opening(team.tokenizer, team.names, problem)
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
                generator=_generator(self.seed, index),
                spare=segment(f"{name}: live, two"),
                decoder=TextDecoder(team.tokenizer),
            )
            for index, name in enumerate(names)
        ]
        first = [self._team.encode(text) for text in team.prompts.forbidden_first(names)]
        self._not_first = sorted({tokens[0] for tokens in first if tokens})
        self._events = self._play()

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
        )

    # ---- the loop ---------------------------------------------------------------------------

    def _play(self) -> Generator[Event, None, None]:
        stats, clock = self._stats, time.perf_counter
        try:
            started = clock()
            rows = self._opening_rows()
            while self._stopped_by is None:
                events = self._step(rows)
                if self._stopped_by is None:
                    rows = self._next_rows()
                    self._stopped_by = self._obstacle(rows)
                if self._stopped_by is not None:
                    events.append(
                        Event("stop", self._steps, self._answered_by, text=self._stopped_by)
                    )
                stats.seconds += clock() - started
                if self._steps == 1:
                    stats.first_token_seconds = stats.seconds
                yield from events
                started = clock()
        except KeyboardInterrupt:
            self._stopped_by = "interrupted"
            raise
        finally:
            self._release()

    def _release(self) -> None:
        """Lets go of keys and values."""
        for name in ("_cache", "_page"):
            self.__dict__.pop(name, None)
        for worker in self._workers:
            worker.__dict__.pop("spare", None)

    # ---- what a step brings -----------------------------------------------------------------

    def _opening_rows(self) -> list[_Row]:
        """The fixed texts, and the headings of everybody's first paragraph: all in one step."""
        team, page, prompts = self._team, self._page, self._team.prompts
        texts = {
            page.prompt: self._opening_text,
            page.others_heading: prompts.others_heading,
            page.own_heading: prompts.own_heading,
            **dict.fromkeys(page.unfinished, prompts.unfinished),
        }
        rows = []
        for view in team.layout.opening(page):
            if tokens := self._team.encode(texts[view[-1]]):
                rows.append(_Row(view, tokens))
        for worker in self._workers:
            self._open_paragraph(worker)
            rows.append(_Row(team.layout.view(page, worker.index), worker.pending, worker))

        self._stats.prompt_tokens = sum(len(row.tokens) for row in rows)
        # Every view shows nearly everything, so the limits are the same but for a few headings.
        needed = max(self._longest_view(rows), self._stats.prompt_tokens)
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
                if layout.commits:
                    page.live[worker.index].truncate(0)  # a heading without a text
        closing = [worker for worker in self._workers if worker.closes]
        rows = [_Row(layout.view(page, worker.index), worker.pending) for worker in closing]
        for worker in closing:
            live = page.live[worker.index]
            page.finishing.append(live)
            page.live[worker.index], worker.spare = worker.spare, live
            if worker.ended:
                page.writing.remove(worker.index)
            else:
                self._open_paragraph(worker)
        for worker in self._workers:
            if not worker.ended:
                rows.append(_Row(layout.view(page, worker.index), worker.pending, worker))
        return rows

    def _open_paragraph(self, worker: _Worker) -> None:
        number = len(worker.paragraphs) + 1
        heading = self._team.prompts.paragraph_heading(worker.name, number)
        worker.paragraphs.append(_Paragraph(number, heading))
        worker.pending = self._team.encode(heading)
        worker.decoder = TextDecoder(self._team.tokenizer, worker.pending)
        worker.opens = True

    def _obstacle(self, rows: list[_Row]) -> str | None:
        """Why the next step cannot or must not be done."""
        if self._stop_wanted:
            return "interrupted"
        if self._steps >= self._max_steps:
            return "max_steps"
        if self._longest_view(rows) > self._team.max_position:
            return "context"
        return None

    @staticmethod
    def _longest_view(rows: list[_Row]) -> int:
        """Tokens in the longest view after the step."""
        new = {row.view[-1]: len(row.tokens) for row in rows}
        return max(sum(len(part) + new.get(part, 0) for part in row.view) for row in rows)

    # ---- a step -----------------------------------------------------------------------------

    def _step(self, rows: list[_Row]) -> list[Event]:
        """One forward pass; what it brings into the history; a token for every worker."""
        team, stats, cache, clock = self._team, self._stats, self._cache, time.perf_counter
        started = clock()
        try:
            logits = forward(
                team.model, cache, [row.view for row in rows], [row.tokens for row in rows]
            )
            if cache.device.type == "cuda":  # or the sampler would wait, and be charged with it
                torch.cuda.current_stream(cache.device).synchronize()
            forwarded = clock()
            self._steps += 1
            events = self._commit()
        except OutOfPages:
            self._stopped_by = "context"
            return []
        stats.forward_seconds += forwarded - started
        stats.attention_seconds = cache.stats.attention_seconds
        stats.encoded_tokens = cache.stats.appended_tokens
        stats.committed_tokens = cache.stats.committed_tokens

        started = clock()
        drawn = [
            (row.worker, self._choose(row.worker, scores))
            for row, scores in zip(rows, logits, strict=True)
            if row.worker is not None
        ]
        stats.sampling_seconds += clock() - started

        for worker, _ in drawn:
            if worker.opens:
                worker.opens = False
                events.append(self._event("start", worker, text=worker.paragraphs[-1].heading))
        for worker, token in drawn:
            events.append(self._take(worker, token))
        if self._stopped_by is None and all(worker.ended for worker in self._workers):
            self._stopped_by = "end"
        return events

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
                events.append(
                    Event("commit", self._steps, worker.name, paragraph.number, text=paragraph.text)
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
            worker.closes = team.layout.commits and paragraph.text != ""
            worker.pending = self._team.encode(team.prompts.paragraph_break)
            return self._event("end", worker, token, text)
        worker.tokens.append(token)
        worker.pending = [token]
        self._stats.generated_tokens += 1
        text = worker.decoder.add(token)
        if text:
            paragraph.text += text
            worker.closes = team.layout.commits and team.paragraph_ends(paragraph.text)
            answer = team.final_answer(paragraph.text)
            if answer is not None and self._stopped_by is None:
                self._answer, self._answered_by, self._stopped_by = answer, worker.name, "answer"
        return self._event("token", worker, token, text)

    def _event(self, kind: str, worker: _Worker, token: int | None = None, text: str = "") -> Event:
        return Event(kind, self._steps, worker.name, worker.paragraphs[-1].number, token, text)
