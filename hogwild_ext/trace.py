"""Traces: everything that happened in a run, one JSON object a line, and what follows from it.

A trace names segments by numbers and says what every step appended to which, what was moved, and
how the lists of segments that the workers see changed. `Replay` rebuilds the page from that alone,
and what a token's writer saw when it was drawn. `docs/trace.md` describes the lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pages import PAGE_SIZE
from .trace_lines import (
    FIELDS,
    TYPES,
    TYPES_1,
    Line,
    Places,
    Views,
    ViewsByWorker,
    changed,
    check,
    described,
)

if TYPE_CHECKING:
    from .cache import Segment

__all__ = [
    "FIELDS",
    "VERSION",
    "Line",
    "Piece",
    "Recorder",
    "Replay",
    "Trace",
    "read",
    "token_count",
]

VERSION = 2

Piece = tuple[list[int], str]  # tokens that were appended together, and their text


def token_count(pieces: Iterable[Piece]) -> int:
    """How many tokens they are made of."""
    return sum(len(tokens) for tokens, _ in pieces)


# ---- writing -------------------------------------------------------------------------------------


class Recorder:
    """Writes a trace. What was written is on its way to the disk when a call returns.

    Raises OSError if `path` cannot be opened; a file that is there is replaced. A trace that cannot
    be written later ends there, so that what it has can be read: `error` then says why, and the
    rest is left out.
    """

    def __init__(self, path: str | Path, segments: Sequence[Segment], header: Line) -> None:
        self.error: OSError | None = None
        self._path = str(path)
        self._numbers = {segment: number for number, segment in enumerate(segments)}
        self._views = Views()
        self._chosen: dict[str, Line] = {}  # the rows that bring them
        self._is_whole = True  # it ends with a line
        self._out = open(path, "wb", buffering=0)  # noqa: SIM115
        names = [segment.name for segment in segments]
        self.write({"kind": "run", "version": VERSION, **header, "segments": names})

    def number(self, segment: Segment) -> int:
        """What the trace calls a segment."""
        return self._numbers[segment]

    def rows(self, rows: Iterable[tuple[str | None, Segment, Piece]]) -> list[Line]:
        """What a pass appended: by whom, to which segment. Chosen tokens go without saying."""
        chosen, self._chosen = self._chosen, {}
        told = []
        for worker, segment, (tokens, text) in rows:
            row = {
                "worker": worker,
                "segment": self._numbers[segment],
                "tokens": tokens,
                "text": text,
            }
            if worker is not None and row == chosen.get(worker):
                del chosen[worker]
            else:
                told.append(row)
        return told

    def drawn(self, line: Line, view: Sequence[Segment]) -> list[Line]:
        """The line of a token that was drawn behind a view, and others that tell the view."""
        numbers = [self._numbers[segment] for segment in view]
        at = {"step": line["step"], "time": line["time"]}
        line = {**line, "segment": numbers[-1]}
        if line["kind"] == "token":
            self._chosen[line["worker"]] = {
                "worker": line["worker"],
                "segment": numbers[-1],
                "tokens": [line["token"]],
                "text": line["text"],
            }
        return [*self._views.told(line["worker"], numbers, at), line]

    def write(self, *lines: Line) -> None:
        """Adds lines, if the file is open still: Python may have closed that of a dropped run."""
        if self._out.closed or not self._is_whole:
            return
        # ASCII only: no line separator of Unicode can then split a line.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        rest = memoryview(text.encode("ascii"))
        # Whatever is raised before all is written, Ctrl-C too: nothing comes behind half a line.
        self._is_whole = False
        try:
            while rest:
                rest = rest[self._out.write(rest) :]
        except OSError as error:  # a full disk; the error itself does not say where
            self._fail(error)
        else:
            self._is_whole = True

    def close(self) -> None:
        """Ends the file."""
        try:
            self._out.close()
        except OSError as error:  # a network's disk may be full only now
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self.error is None:
            self.error = OSError(error.errno, error.strerror, self._path)


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
    """Reads a trace; one of version 1 as version 2 would have it.

    Raises OSError for a file that cannot be read, and ValueError, naming it, for one that is no
    trace, has a broken line before its last one, or one that lacks something, has something wrong
    or cannot be true (see `Replay`), or was written by a newer version. Lines of unknown kinds are
    kept.
    """
    with open(path, "rb") as file:
        try:
            header = _parsed(file.readline())
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("kind") != "run":
            raise ValueError(f"{path}: expected a trace of hogwild run --trace")
        where = f"{path}"
        try:
            replay = Replay(header)
            lines: list[Line] = []
            for number, text in enumerate(file, start=2):
                where = f"{path}: line {number} is broken"
                try:
                    line = _parsed(text)
                except ValueError:
                    if text.endswith(b"\n"):
                        raise
                    break  # cut off
                lines += replay._take(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Trace(replay.header, lines)


def _parsed(text: bytes) -> Any:
    """Raises ValueError for what is no JSON in UTF-8."""
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


# ---- replaying -----------------------------------------------------------------------------------


class Replay:
    """The page as it was, line by line.

        replay = Replay(trace.header)
        for line in trace.lines:
            replay.apply(line)
            if line["kind"] == "token":
                print(replay.text(replay.sees(line["worker"])))  # what its writer saw

    Takes the lines of version 1 too. Raises ValueError for what is no first line of a trace.

    Attributes:
        header: the trace's first line, as version 2 has it.
        segments: the pieces that every segment holds, as they stand.
        encoded_tokens, committed_tokens: so far.
        copied_tokens: committed ones that were copied: what is committed into an empty segment
            stays where it is.
    """

    def __init__(self, header: Line) -> None:
        if isinstance(header, dict) and header.get("version") not in (1, VERSION):
            raise ValueError(
                f"expected a trace of version 1 or {VERSION}, got "
                f"{described(header.get('version'))}; it was written by hogwild_ext "
                f"{described(header.get('hogwild_ext'))}"
            )
        check(header, TYPES)
        if header["kind"] != "run":
            raise ValueError(f"expected the first line of a trace, got {header['kind']}")
        self.header: Line = {**header, "version": VERSION}
        self.segments: list[list[Piece]] = [[] for _ in header["segments"]]
        self.encoded_tokens = self.committed_tokens = self.copied_tokens = 0
        self._lengths = [0] * len(self.segments)
        self._names = frozenset(header["workers"])
        self._ended: set[str] = set()
        self._views: ViewsByWorker = {}
        self._chosen: dict[str, Line] = {}  # lines of tokens that come with the next step
        self._step = 0
        self._concluded = 0  # times
        self._told: tuple[Line, int] | None = None  # the last step, and those before it
        self._is_over = False
        self._version_1 = _Version1(self) if header["version"] == 1 else None

    def apply(self, line: Line) -> None:
        """What the line says happened.

        Raises ValueError for what is no line, or cannot have happened to the page as it stands.
        """
        self._take(line)

    def _take(self, line: Line) -> list[Line]:
        """Applies a line; returns it as this version has it, which may take several."""
        if self._version_1 is None:
            check(line, TYPES)
            self._apply(line)
            return [line]
        check(line, TYPES_1)
        taken = []
        for told in self._version_1.told(line):
            self._apply(told)
            taken.append(told)
        return taken

    def _apply(self, line: Line) -> None:
        kind = line["kind"]
        if kind not in TYPES:
            return
        self._check_place(line)
        if kind == "step":
            self._apply_step(line)
        elif kind == "change":
            self._apply_change(dict(line["places"]))
        elif kind == "view":
            view = line["segments"]
            self._check_segments(view)
            if len(set(view)) < len(view):
                raise ValueError(f"step {self._step}: expected each segment of a view once")
            self._views[line["worker"]] = view
        elif kind in ("token", "end"):
            self._apply_token(line)
        elif kind == "conclusion":
            self._concluded += 1
        elif kind == "commit":
            self._apply_commit(line)
        elif kind == "truncate":
            segment, length = line["segment"], line["length"]
            self.segments[segment] = self._first(segment, length)
            self._lengths[segment] = length
        elif kind == "stop":
            self._check_counters()
            self._is_over = True

    def _apply_step(self, line: Line) -> None:
        self._check_counters()
        self._step, self._told = line["step"], (line, self._concluded)
        for chosen in self._chosen.values():
            self._append(chosen["segment"], [chosen["token"]], chosen["text"])
        self._chosen = {}
        for row in line["rows"]:
            self._check_worker(row["worker"])
            self._check_segments([row["segment"]])
            self._append(row["segment"], row["tokens"], row["text"])
        told, counted = line["encoded_tokens"], self.encoded_tokens
        if told != counted:
            raise ValueError(
                f"step {line['step']}: {told} tokens were encoded, {counted} were appended"
            )

    def _append(self, segment: int, tokens: list[int], text: str) -> None:
        self.segments[segment].append((tokens, text))
        self._lengths[segment] += len(tokens)
        self.encoded_tokens += len(tokens)

    def _apply_change(self, places: Places) -> None:
        self._check_segments({segment for new in places.values() for segment in new})
        self._views = changed(self._views, places)

    def _apply_token(self, line: Line) -> None:
        worker, segment = line["worker"], line["segment"]
        if worker in self._ended or worker in self._chosen:
            raise ValueError(f"step {self._step}: {worker!r} chose a second token or had ended")
        view = self._views.get(worker, ())
        if not view or view[-1] != segment:
            raise ValueError(
                f"step {self._step}: expected a view of {worker!r} that ends with segment "
                f"{segment}, got one that ends with {list(view[-1:])}"
            )
        if line["kind"] == "token":
            self._chosen[worker] = line
        else:
            self._ended.add(worker)

    def _apply_commit(self, line: Line) -> None:
        source, target, count = line["segment"], line["into"], line["tokens"]
        if source == target:
            raise ValueError(f"step {self._step}: segment {source} was committed into itself")
        if count != self._lengths[source]:
            raise ValueError(
                f"step {self._step}: {count} tokens were committed, {self._lengths[source]} were "
                "there"
            )
        self.committed_tokens += count
        self.copied_tokens += count if self._lengths[target] else 0
        self.segments[target] += self.segments[source]
        self.segments[source] = []
        self._lengths[target] += count
        self._lengths[source] = 0

    def _check_place(self, line: Line) -> None:
        """Whether a line may stand where it does, and names what there is."""
        kind = line["kind"]
        if kind == "run" or self._is_over:
            raise ValueError(f"expected a line of a run that goes on, got another one: {kind}")
        steps = [self._step + (kind == "step")]
        if kind == "stop":  # a run may be broken off in a step of which nothing is told
            steps.append(self._step + 1)
        elif steps == [0]:
            raise ValueError(f"expected the first step, got {kind}")
        if line["step"] not in steps:
            raise ValueError(f"expected {kind} of step {steps[-1]}, got one of {line['step']}")
        self._check_worker(line.get("worker"))
        self._check_segments([line[name] for name in ("segment", "into") if name in line])

    def _check_worker(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise ValueError(f"step {self._step}: expected a worker of the run, got {name!r}")

    def _check_segments(self, numbers: Iterable[int]) -> None:
        count = len(self.segments)
        if max(numbers, default=0) >= count:
            raise ValueError(f"expected segments below {count}, got {max(numbers)}")

    def _check_counters(self) -> None:
        """Whether the last step, its commits done, told the truth about what was moved."""
        if self._told is None:
            return
        (told, concluded), self._told = self._told, None
        size = self.header["bytes_per_token"]
        if told["committed_tokens"] != self.committed_tokens:
            raise ValueError(
                f"step {told['step']}: {told['committed_tokens']} tokens were committed, "
                f"{self.committed_tokens} were moved"
            )
        by_forks = told["copied_bytes"] - self.copied_tokens * size
        if not 0 <= by_forks <= concluded * PAGE_SIZE * size:
            raise ValueError(
                f"step {told['step']}: {told['copied_bytes']} bytes were copied, "
                f"{self.copied_tokens * size} by commits, with {concluded} conclusions"
            )

    def sees(self, worker: str) -> list[list[int]]:
        """What the worker sees in this step's pass: [segment, number of its tokens], in its order.

        To be asked behind a line of the worker's token (or end), before the next line: what it saw
        when it drew that. What all workers brought to the pass is there already.

        Raises ValueError for who has no view.
        """
        if worker not in self._views:
            raise ValueError(f"worker: expected one whose view was told, got {worker!r}")
        return [[segment, self._lengths[segment]] for segment in self._views[worker]]

    def tokens(self, sees: Sequence[Sequence[int]]) -> list[int]:
        """What a list of [segment, number of its first tokens] shows, after the last line."""
        return [token for piece in self._seen(sees) for token in piece[0]]

    def text(self, sees: Sequence[Sequence[int]]) -> str:
        """The same as text."""
        return "".join(text for _, text in self._seen(sees))

    def _seen(self, sees: Sequence[Sequence[int]]) -> Iterator[Piece]:
        for segment, length in sees:
            self._check_segments([segment])
            yield from self._first(segment, length)

    def _first(self, segment: int, length: int) -> list[Piece]:
        """The pieces that the first `length` tokens are made of."""
        if length == self._lengths[segment]:
            return list(self.segments[segment])
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


class _Version1:
    """Lines of version 1 as version 2 has them.

    There a token's line had `sees`, [segment, tokens] of all that its writer saw, and the rows of a
    step had chosen tokens too.
    """

    def __init__(self, page: Replay) -> None:
        self._page = page
        self._views = Views()
        self._chosen: dict[str, Line] = {}

    def told(self, line: Line) -> Iterator[Line]:
        """What this version says instead of a line; the page is to follow as it comes."""
        if line["kind"] == "step":
            yield {**line, "rows": list(self._rows(line))}
        elif line["kind"] in ("token", "end"):
            worker, sees = line["worker"], line["sees"]
            view = [segment for segment, _ in sees]
            at = {"step": line["step"], "time": line["time"]}
            yield from self._views.told(worker, view, at)
            if not sees or self._page.sees(worker) != sees:
                raise ValueError(f"step {line['step']}: {worker!r} did not see that: {sees[:9]}")
            told = {key: value for key, value in line.items() if key != "sees"}
            told["segment"] = view[-1]
            if line["kind"] == "token":
                self._chosen[worker] = told
            yield told
        elif line["kind"] not in ("view", "change"):
            yield line

    def _rows(self, line: Line) -> Iterator[Line]:
        """A step's, less the tokens that were chosen from the step before."""
        for row in line["rows"]:
            if chosen := self._chosen.pop(row["worker"], None):
                token, text = chosen["token"], chosen["text"]
                if (
                    row["segment"] != chosen["segment"]
                    or row["tokens"][:1] != [token]
                    or not row["text"].startswith(text)
                ):
                    raise ValueError(
                        f"step {line['step']}: {row['worker']!r} chose token {token}, but tokens "
                        f"{row['tokens'][:9]} were appended"
                    )
                row = {**row, "tokens": row["tokens"][1:], "text": row["text"][len(text) :]}
                if not row["tokens"] and not row["text"]:
                    continue
            yield row
        if self._chosen:
            raise ValueError(f"step {line['step']}: tokens of {sorted(self._chosen)} are missing")
