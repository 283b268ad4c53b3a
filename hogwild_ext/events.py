"""What a run tells: its events, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field

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
            unless it gave the final answer. The last event of every run that was not broken off.
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
        trace_error: why the trace lacks the rest of the run, with the name of its file; None for
            one that is whole so far, or that was not asked for.
    """

    answer: str | None
    text: str
    workers: list[WorkerResult]
    steps: int
    stats: Stats
    stopped_by: str | None
    seed: int
    snapshots: list[Snapshot] = field(default_factory=list)
    trace_error: str | None = None
