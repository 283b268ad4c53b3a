"""Traces: everything that happened in a run, one JSON object a line, and what follows from it.

A trace names segments by numbers and says what every step appended to which, what was moved, and
for every token what its writer saw when it was drawn. `Replay` rebuilds the page from that alone.
`docs/trace.md` describes the lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pages import PAGE_SIZE

if TYPE_CHECKING:
    from .cache import Segment

VERSION = 1
Line = dict[str, Any]

# What each kind of line has, beside its kind; docs/trace.md tells what it means.
FIELDS = {
    "run": {
        "version", "hogwild_ext", "model", "problem", "layout", "workers", "seed", "max_steps",
        "segments", "bytes_per_token",
    },
    "step": {
        "step", "time", "rows", "encoded_tokens", "committed_tokens", "copied_bytes",
        "forward_seconds", "sampling_seconds",
    },
    "start": {"step", "time", "worker", "paragraph", "text"},
    "question": {"step", "time", "worker", "paragraph", "text"},
    "token": {"step", "time", "worker", "paragraph", "text", "token", "sees"},
    "end": {"step", "time", "worker", "paragraph", "text", "token", "sees"},
    "commit": {"step", "time", "worker", "paragraph", "segment", "into", "tokens", "text"},
    "conclusion": {"step", "time", "worker", "text", "answer"},
    "truncate": {"step", "time", "segment", "length"},
    "stop": {"step", "time", "worker", "reason", "answer"},
}  # fmt: skip


class Recorder:
    """Writes a trace. Every line is on its way to the disk when the call returns.

    Raises OSError if `path` cannot be written, then or later; a file that is there is replaced.
    """

    def __init__(self, path: str | Path, segments: Sequence[Segment], header: Line) -> None:
        self._path = str(path)
        self._numbers = {segment: number for number, segment in enumerate(segments)}
        self._out = open(path, "w", encoding="ascii", buffering=1)  # noqa: SIM115
        names = [segment.name for segment in segments]
        self.write({"kind": "run", "version": VERSION, **header, "segments": names})

    def number(self, segment: Segment) -> int:
        """What the trace calls a segment."""
        return self._numbers[segment]

    def seen(self, view: Sequence[Segment]) -> list[list[int]]:
        """A view as it is now: [segment, tokens], in its order."""
        return [[self._numbers[segment], len(segment)] for segment in view]

    def write(self, line: Line) -> None:
        """Adds a line, if the file is open still: Python may have closed that of a dropped run."""
        if self._out.closed:
            return
        try:
            # ASCII only: no line separator of Unicode can then split a line.
            self._out.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk; the error itself does not say where
            raise OSError(error.errno, error.strerror, self._path) from None

    def close(self) -> None:
        """Ends the file."""
        self._out.close()


# ---- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A trace that was read: `header` is its first line, `lines` are the others.

    `is_complete`: whether it ends with the end of the run. One that was cut off, in the middle of
    a line too, has what is there.
    """

    header: Line
    lines: list[Line]

    @property
    def is_complete(self) -> bool:
        return bool(self.lines) and self.lines[-1]["kind"] == "stop"


def read(path: str | Path) -> Trace:
    """Reads a trace.

    Raises OSError for a file that cannot be read, and ValueError, naming it, for one that is no
    trace, has a broken line before its last one, or one that lacks something, or was written by a
    newer version. Lines of unknown kinds are kept.
    """
    texts = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
                raise ValueError("expected an object with a kind")
        except ValueError as error:
            if number == len(texts) and lines:  # cut off; after a whole run it is empty
                break
            if number == 1:
                raise ValueError(f"{path}: expected a trace of hogwild run --trace") from None
            raise ValueError(f"{path}: line {number} is broken: {error}") from None
        lines.append(line)
    header = lines[0]
    if header["kind"] != "run":
        raise ValueError(f"{path}: expected a trace of hogwild run --trace")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: expected a trace of version {VERSION}, got {header.get('version')}; it was "
            f"written by hogwild_ext {header.get('hogwild_ext')}"
        )
    for number, line in enumerate(lines, start=1):
        if lacking := sorted(FIELDS.get(line["kind"], set()) - line.keys()):
            raise ValueError(
                f"{path}: line {number} is broken: {line['kind']} without {', '.join(lacking)}"
            )
    return Trace(header, lines[1:])


# ---- replaying -----------------------------------------------------------------------------------

Piece = tuple[list[int], str]  # tokens that were appended together, and their text


def token_count(pieces: Sequence[Piece]) -> int:
    """How many tokens they are made of."""
    return sum(len(tokens) for tokens, _ in pieces)


@dataclass
class Replay:
    """The page as it was, line by line.

        replay = Replay(trace.header)
        for line in trace.lines:
            replay.apply(line)
            if line["kind"] == "token":
                print(replay.text(line["sees"]))  # what its writer saw when it was drawn

    Attributes:
        segments: the pieces that every segment holds, as they stand.
        encoded_tokens, committed_tokens: so far.
        copied_tokens: committed ones that were copied: what is committed into an empty segment
            stays where it is.
    """

    header: Line
    segments: list[list[Piece]] = field(init=False)
    encoded_tokens: int = 0
    committed_tokens: int = 0
    copied_tokens: int = 0
    _chosen: dict[str, int] = field(default_factory=dict)  # tokens that come with the next step
    _told: Line | None = None  # the last step, until its commits are done
    _concluded: int = 0  # times

    def __post_init__(self) -> None:
        self.segments = [[] for _ in self.header["segments"]]

    def apply(self, line: Line) -> None:
        """What the line says happened.

        Raises ValueError if it cannot have happened to the page as it stands.
        """
        if line["kind"] in ("step", "stop"):
            self._check_counters()
        if line["kind"] == "step":
            self._told = {**line, "concluded": self._concluded}
            for row in line["rows"]:
                chosen = self._chosen.pop(row["worker"], None)
                if chosen is not None and row["tokens"][:1] != [chosen]:
                    raise ValueError(
                        f"step {line['step']}: {row['worker']} chose token {chosen}, but tokens "
                        f"{row['tokens']} were appended"
                    )
                self.segments[row["segment"]].append((row["tokens"], row["text"]))
                self.encoded_tokens += len(row["tokens"])
            told, counted = line["encoded_tokens"], self.encoded_tokens
            if told != counted:
                raise ValueError(
                    f"step {line['step']}: {told} tokens were encoded, {counted} were appended"
                )
        elif line["kind"] == "token":
            self._chosen[line["worker"]] = line["token"]
        elif line["kind"] == "conclusion":
            self._concluded += 1
        elif line["kind"] == "commit":
            source, target = self.segments[line["segment"]], self.segments[line["into"]]
            count = token_count(source)
            if count != line["tokens"]:
                raise ValueError(
                    f"step {line['step']}: {line['tokens']} tokens were committed, "
                    f"{count} were there"
                )
            self.committed_tokens += count
            self.copied_tokens += count if target else 0
            target += source
            source.clear()
        elif line["kind"] == "truncate":
            self.segments[line["segment"]] = self._first(line["segment"], line["length"])

    def _check_counters(self) -> None:
        """Whether the last step, its commits done, told the truth about what was moved."""
        if (told := self._told) is None:
            return
        self._told, size = None, self.header["bytes_per_token"]
        if told["committed_tokens"] != self.committed_tokens:
            raise ValueError(
                f"step {told['step']}: {told['committed_tokens']} tokens were committed, "
                f"{self.committed_tokens} were moved"
            )
        by_forks = told["copied_bytes"] - self.copied_tokens * size
        if not 0 <= by_forks <= told["concluded"] * PAGE_SIZE * size:
            raise ValueError(
                f"step {told['step']}: {told['copied_bytes']} bytes were copied, "
                f"{self.copied_tokens * size} by commits, with {told['concluded']} conclusions"
            )

    def tokens(self, sees: Sequence[Sequence[int]]) -> list[int]:
        """What a list of [segment, number of its first tokens] shows, after the last line."""
        return [token for piece in self._seen(sees) for token in piece[0]]

    def text(self, sees: Sequence[Sequence[int]]) -> str:
        """The same as text."""
        return "".join(text for _, text in self._seen(sees))

    def _seen(self, sees: Sequence[Sequence[int]]) -> Iterator[Piece]:
        for segment, length in sees:
            yield from self._first(segment, length)

    def _first(self, segment: int, length: int) -> list[Piece]:
        """The pieces that the first `length` tokens are made of."""
        pieces: list[Piece] = []
        for piece in self.segments[segment]:
            if length <= 0:
                break
            pieces.append(piece)
            length -= len(piece[0])
        if length:
            raise ValueError(
                f"{self.header['segments'][segment]}: expected a number of tokens at which a "
                f"piece ends, got one {abs(length)} {'more' if length > 0 else 'less'} than that"
            )
        return pieces
