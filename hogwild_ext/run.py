"""A run of a team: the steps, and what they bring.

See sections 3 and 4 of arXiv 2504.06261. A *step* is one forward pass; every worker that has not
ended gets one token from each. A *paragraph* is what a worker writes until `Hogwild.paragraph_ends`
says so: a finished sentence and an empty line, as a rule. It then moves into the history, which all
workers read first.

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
import inspect
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .answers import AnswerFinder
from .cache import Segment, SegmentCache
from .events import Event, Result, Snapshot, Stats, WorkerResult
from .layouts import Page
from .pages import PAGE_SIZE
from .patching import forward
from .sampling import Written, generator_of
from .text_decoder import TextDecoder
from .trace import Line, Piece, Recorder, token_count

if TYPE_CHECKING:
    from .engine import Hogwild


@dataclass
class _Paragraph:
    number: int  # of the worker's, from 1
    heading: str
    question: str
    start: int = 0  # in its segment: where its heading begins
    text: str = ""

    @property
    def above(self) -> str:
        """What stands above its text."""
        return self.heading + self.question

    def on_page(self) -> str:
        """As a reader of the whole page sees it."""
        gap = "" if not self.text or self.text[0].isspace() else " "
        return (self.above + gap + self.text).strip()


@dataclass
class _Worker:
    """What a run knows of a worker, apart from the page."""

    index: int
    name: str
    generator: torch.Generator
    spare: Segment  # empty: the next paragraph goes there
    decoder: TextDecoder
    answers: AnswerFinder  # told the text of the paragraph that is being written
    paragraphs: list[_Paragraph] = field(default_factory=list)  # the last one is being written
    pending: list[Piece] = field(default_factory=list)  # what the next step encodes
    opens: bool = True  # they end with the heading of a paragraph
    closes: bool = False  # they are the end of one
    tokens: Written = field(default_factory=Written)  # generated
    asked_at: int = 0  # how many there were when it was last asked whether its work is redundant
    committed: int = 0  # paragraphs
    ended: bool = False

    @property
    def writes(self) -> bool:
        """Whether the next step brings something of its: an ended one may have an end to write."""
        return self.closes or not self.ended


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
        self._history: list[_Paragraph] = []
        self._answer: str | None = None
        self._answered_by: str | None = None
        self._stopped_by: str | None = None
        self._stop_wanted = False
        self._is_over = False  # its end was told
        self._resumed = 0.0  # when the engine's turn began: the caller has it between two events

        self._opening_text = team.prompts.opening(team.tokenizer, team.names, problem, team.layout)
        self._cache = SegmentCache.for_model(
            team.model,
            max_tokens=team.max_tokens,
            spare_pages=5 + 3 * len(team.names),  # a segment each: those below, and a conclusion's
        )
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
                answers=team.answer_finder(),
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

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            "run: expected not to be copied or pickled, got one with a page of its own; "
            "run.result() tells what there is, and a trace keeps it"
        )

    def stop(self) -> None:
        """Ends the run after the current step, as Ctrl-C would: after the one whose events are
        coming, if it is over already. Signal handlers may call it."""
        self._stop_wanted = True

    def close(self) -> None:
        """Gives back the page's memory. No more events come: a run that is not over is ended."""
        if inspect.getgeneratorstate(self._events) == inspect.GEN_CREATED:
            self._resumed = time.perf_counter()
            self._interrupt()
        self._events.close()
        self._release()

    def result(self) -> Result:
        """What there is so far."""
        finished = {id(paragraph) for paragraph in self._history}  # the last one just now, maybe
        paragraphs = list(self._history)
        for worker in self._workers:
            live = worker.paragraphs[worker.committed :]
            paragraphs += [p for p in live if p.text and id(p) not in finished]
        return Result(
            answer=self._answer,
            text="\n\n".join(paragraph.on_page() for paragraph in paragraphs),
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
            trace_error=self._trace_error(),
        )

    def _trace_error(self) -> str | None:
        error = None if self._recorder is None else self._recorder.error
        return None if error is None else f"{error.filename}: {error.strerror}"

    def _later_snapshots(self) -> list[Snapshot]:
        """With a larger budget than it needed, a run that ended by itself gives the same answer."""
        was_cut = self._stop_wanted and self._answer is None
        if self._stopped_by is None or self._stopped_by == "interrupted" or was_cut:
            return []
        taken = {snapshot.steps for snapshot in self._snapshots}
        return [
            Snapshot(steps, self._answer, self._answered_by, "")
            for steps in sorted(self._budgets - taken)
        ]

    # ---- the loop ---------------------------------------------------------------------------

    def _play(self) -> Generator[Event, None, None]:
        try:
            self._resumed = time.perf_counter()
            rows = self._opening_rows()
            while True:
                yield from self._told(self._step(rows))
                if self._stopped_by is None:
                    if self._steps in self._budgets and not self._stop_wanted:
                        yield from self._told(self._take_snapshot())
                    self._stopped_by = self._limit()
                if self._stopped_by is not None:
                    break
                rows = self._next_rows()
            yield from self._told(self._ending())
        except (KeyboardInterrupt, GeneratorExit):  # the second: closed between two events
            self._interrupt()
            raise
        finally:
            self._release()

    def _told(self, events: list[Event]) -> Iterator[Event]:
        """Hands out events; the time that the caller takes for them is its own."""
        stats = self._stats
        stats.seconds = self._now()
        if not stats.first_token_seconds:
            stats.first_token_seconds = stats.seconds
        try:
            yield from events
        finally:
            self._resumed = time.perf_counter()

    def _interrupt(self) -> None:
        """The end of a run that is cut short."""
        if not self._is_over:
            if self._answer is None:
                self._stopped_by = "interrupted"
            self._record_stop()
            self._stats.seconds = self._now()

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
        return "context" if self._room_is_short() else None

    def _room_is_short(self) -> bool:
        """Whether the next step, and a conclusion after it, do not fit.

        Asked before the page changes for that step: the conclusion is to see all of it.
        """
        team, page = self._team, self._page
        writers = [worker for worker in self._workers if worker.writes]
        new = sum(token_count(worker.pending) for worker in writers)
        closing = [worker for worker in writers if worker.closes]
        for worker in closing:
            if not worker.ended:
                new += len(team.encode(self._next_paragraph(worker).above))
        # What is finished, everybody sees.
        finished = [page.live[worker.index] for worker in closing if team.layout.commits]
        length_of = {segment: len(segment) for segment in self._cache.segments}
        views = [{*self._view(worker), *finished} for worker in writers]
        longest = max(sum(map(length_of.__getitem__, view)) for view in views)
        if longest + new + team.reserved_tokens > team.max_position:
            return True
        # A commit copies before it frees. A conclusion shares all but a part of a page.
        copied = max((len(segment) for segment in finished), default=0)
        concluding = team.reserved_tokens + PAGE_SIZE if team.reserved_tokens else 0
        return new + max(copied, concluding) > self._cache.free_tokens

    def _ending(self) -> list[Event]:
        """The last events: a conclusion if nobody has given an answer yet, and the stop."""
        team, events = self._team, []
        if self._answer is None and self._stopped_by != "interrupted" and team.closing:
            taken = [shot for shot in self._snapshots if shot.steps == self._steps]
            last = taken[0] if taken else self._conclude()
            if not taken:
                events.append(Event("conclusion", self._steps, last.worker, text=last.text))
            if last.answer is not None:
                self._answer, self._answered_by = last.answer, last.worker
        assert self._stopped_by is not None
        events.append(Event("stop", self._steps, self._answered_by, text=self._stopped_by))
        self._record_stop()
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
                text = texts.pop(segment, "")
                encode = team.encode_first if segment is page.prompt else team.encode
                if tokens := encode(text):
                    rows.append(_Row(view[: i + 1], [(tokens, text)]))
        rows += speaking

        self._stats.prompt_tokens = sum(token_count(row.pieces) for row in rows)
        new = {row.view[-1]: token_count(row.pieces) for row in rows}
        longest = max(sum(new.get(segment, 0) for segment in row.view) for row in rows)
        kept = team.reserved_tokens
        copied = PAGE_SIZE if kept else 0  # by a conclusion
        if longest + kept >= team.max_position or (
            self._stats.prompt_tokens + kept + copied >= team.max_tokens
        ):
            raise ValueError(
                f"problem: expected one that leaves room for an answer, got {longest} tokens with "
                f"the instructions, {self._stats.prompt_tokens} with all headings"
                + (f", and {kept} are kept for a closing text and the answer" if kept else "")
                + f"; the model has {team.max_position} positions, max_tokens is {team.max_tokens}"
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

    def _view(self, worker: _Worker) -> list[Segment]:
        """What the worker sees, by the layout."""
        view = self._team.layout.view(self._page, worker.index)
        own = self._page.live[worker.index]
        if not view or view[-1] is not own or own in view[:-1]:
            got = ", ".join(segment.name for segment in view)
            raise ValueError(
                f"layout: expected the view of {self._team.layout.name} to end with the worker's "
                f"own live segment, {own.name}, and to have it nowhere else, got {got or 'none'}"
            )
        return view

    def _row(self, worker: _Worker) -> _Row:
        return _Row(self._view(worker), worker.pending, worker)

    def _speaking_row(self, worker: _Worker) -> _Row:
        return replace(self._row(worker), speaks=True)

    def _next_paragraph(self, worker: _Worker) -> _Paragraph:
        """The one that the worker would begin now."""
        team, prompts = self._team, self._team.prompts
        number = len(worker.paragraphs) + 1
        every = team.question_every
        is_asked = every is not None and len(worker.tokens) - worker.asked_at >= every
        return _Paragraph(
            number,
            heading=prompts.paragraph_heading(worker.name, number),
            question=prompts.paragraph_question(worker.name, number) if is_asked else "",
        )

    def _open_paragraph(self, worker: _Worker) -> None:
        """Begins a paragraph in the worker's live segment, behind what is pending there."""
        team, paragraph = self._team, self._next_paragraph(worker)
        if paragraph.question:
            worker.asked_at = len(worker.tokens)
        worker.paragraphs.append(paragraph)

        tokens = team.encode(paragraph.above)
        if team.layout.commits or paragraph.number == 1:
            worker.pending = []
        paragraph.start = len(self._page.live[worker.index]) + token_count(worker.pending)
        worker.pending = [*worker.pending, (tokens, paragraph.above)]
        worker.decoder = TextDecoder(team.tokenizer, tokens)
        worker.answers = team.answer_finder()
        worker.opens = True

    def _drop_paragraph(self, worker: _Worker) -> None:
        """A heading under which nothing was written goes away."""
        live, start = self._page.live[worker.index], worker.paragraphs[-1].start
        live.truncate(start)
        if self._recorder is not None:
            self._record("truncate", segment=self._recorder.number(live), length=start)

    # ---- a step -----------------------------------------------------------------------------

    def _step(self, rows: list[_Row]) -> list[Event]:
        """One forward pass; what it brings into the history; a token for every worker."""
        stats, recorder = self._stats, self._recorder
        logits = self._forward([row.view for row in rows], [row.tokens for row in rows])
        self._steps += 1
        moved = [(worker.spare, len(worker.spare)) for worker in self._workers if worker.closes]
        commits = self._commit()
        self._count()

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
            self._record_step(recorder, rows, events, list(zip(commits, moved, strict=True)))
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

    def _count(self) -> None:
        """What the cache has counted."""
        stats, counted = self._stats, self._cache.stats
        stats.attention_seconds = counted.attention_seconds
        stats.encoded_tokens = counted.appended_tokens - stats.concluding_tokens
        stats.committed_tokens = counted.committed_tokens
        stats.copied_bytes = counted.copied_bytes

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
                self._history.append(paragraph)
                worker.committed += 1
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
            answer = worker.answers.add(text)
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
        *before, live = self._view(worker)
        copied = cache.fork(live)
        view = [*before, copied]
        new = [token for tokens, _ in worker.pending for token in tokens] + team.closing
        text, answer, written = team.prompts.closing, None, Written(worker.tokens)
        answers, told, most = team.answer_finder(), 0, len(written) + team.answer_tokens
        decoder = TextDecoder(team.tokenizer, new)
        try:
            while answer is None and len(written) < most and not self._stop_wanted:
                logits = self._forward([view], [new])
                stats.concluding_tokens += len(new)
                started = time.perf_counter()
                token = team.greedy(logits[0], written, worker.generator)
                stats.sampling_seconds += time.perf_counter() - started
                if token in team.ends_of_sequence:
                    text += decoder.flush()
                    break
                written.append(token)
                new = [token]
                text += decoder.add(token)
                answer, told = answers.add(text[told:]), len(text)
        finally:
            cache.free(copied)
            self._count()
        self._record("conclusion", worker=worker.name, text=text, answer=answer)
        return Snapshot(self._steps, answer, worker.name, text)

    # ---- the trace --------------------------------------------------------------------------

    def _line(self, kind: str, **content: Any) -> Line:
        return {"kind": kind, "step": self._steps, "time": round(self._now(), 6), **content}

    def _record(self, kind: str, **content: Any) -> None:
        if self._recorder is not None:
            self._recorder.write(self._line(kind, **content))

    def _record_stop(self) -> None:
        self._is_over = True
        self._record("stop", worker=self._answered_by, reason=self._stopped_by, answer=self._answer)

    def _record_step(
        self,
        recorder: Recorder,
        rows: list[_Row],
        events: list[Event],
        commits: list[tuple[Event, tuple[Segment, int]]],
    ) -> None:
        """A step and what came of it. Commits last: what was seen, was seen before them."""
        stats = self._stats
        lines = [
            self._line(
                "step",
                rows=recorder.rows(
                    (row.writer.name if row.writer else None, row.view[-1], piece)
                    for row in rows
                    for piece in row.pieces
                ),
                encoded_tokens=stats.encoded_tokens,
                committed_tokens=stats.committed_tokens,
                copied_bytes=stats.copied_bytes,
                forward_seconds=round(stats.forward_seconds, 6),
                sampling_seconds=round(stats.sampling_seconds, 6),
            )
        ]
        views = {row.writer.name: row.view for row in rows if row.speaks and row.writer is not None}
        for event in events:
            line = self._line(
                event.kind, worker=event.worker, paragraph=event.paragraph, text=event.text
            )
            if event.kind in ("token", "end"):
                assert event.worker is not None
                line["token"] = event.token
                lines += recorder.drawn(line, views[event.worker])
            else:
                lines.append(line)
        for event, (source, count) in commits:
            lines.append(
                self._line(
                    "commit",
                    worker=event.worker,
                    paragraph=event.paragraph,
                    segment=recorder.number(source),
                    into=recorder.number(self._page.history),
                    tokens=count,
                    text=event.text,
                )
            )
        recorder.write(*lines)
