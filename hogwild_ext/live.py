"""What `hogwild run` shows: live columns on a terminal, plain lines in a pipe, or JSON.

All three are fed with the events of a run, and know nothing of the engine but those.
"""

from __future__ import annotations

import dataclasses
import json
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console, OverflowMethod, RenderableType
    from rich.table import Table
    from rich.text import Text

    from .events import Event, Result

# Drawn as nothing, or as part of the character before: how wide, terminals do not agree.
_INVISIBLE = frozenset(
    map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), *range(0x180B, 0x1810), 0x34F))
) | frozenset("\u115f\u1160\u3164\uffa0")
_MOST_MARKS = 4  # that stand above and below a letter: more run into the lines around it


def printable(text: str) -> str:
    """The text without what could move the cursor, turn a line around or upset columns.

    Control and format characters (directions, joiners, tags) and variation selectors are left out,
    and so are marks beyond a few on a letter; tabs become spaces, line separators line ends. A
    model may write anything.
    """
    shown: list[str] = []
    marks = 0
    for character in text:
        kind = _kind(character)
        if kind == "mark":
            marks += 1
            if marks <= _MOST_MARKS:
                shown.append(character)
        elif kind:
            marks = 0
            shown.append(kind)
    return "".join(shown).expandtabs(4)


def _kind(character: str) -> str:
    """What is shown instead of a character, usually itself, or "mark" for one on a letter."""
    category = unicodedata.category(character)
    if character in "\n\t":
        return character
    if character in _INVISIBLE or category in ("Cc", "Cf"):
        return ""
    if category in ("Mn", "Me"):
        return "mark"
    return {"Zl": "\n", "Zp": "\n", "Cs": "\ufffd"}.get(category, character)


class View(Protocol):
    """Shows a run. `begin`, then `show` for every event, then `end`; a context manager too."""

    def __enter__(self) -> View: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, event: Event) -> None: ...

    def end(self, result: Result, summary: Sequence[tuple[str, str]]) -> None: ...


# ---- JSON ----------------------------------------------------------------------------------------


class JsonView:
    """One JSON object a line: the events as they come, then the result."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __enter__(self) -> JsonView:
        return self

    def __exit__(self, *error: object) -> None:
        self._out.flush()

    def show(self, event: Event) -> None:
        self._write(dataclasses.asdict(event))

    def end(self, result: Result, summary: Sequence[tuple[str, str]]) -> None:
        stats = dataclasses.asdict(result.stats)
        stats["engine_seconds"] = result.stats.engine_seconds
        stats["tokens_per_second"] = result.stats.tokens_per_second
        self._write({"kind": "result", **dataclasses.asdict(result), "stats": stats})

    def _write(self, content: dict[str, Any]) -> None:
        # ASCII only: no line separator of Unicode can then split a line.
        print(json.dumps(content), file=self._out, flush=True)


# ---- plain lines ---------------------------------------------------------------------------------


class PlainView:
    """Whole lines of text, each behind its writer's name, as soon as they are complete."""

    def __init__(self, out: TextIO, names: Sequence[str]) -> None:
        self._out = out
        self._unfinished = dict.fromkeys(names, "")

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        self._out.flush()

    def show(self, event: Event) -> None:
        if event.worker is None or event.kind not in ("question", "token", "end", "conclusion"):
            return
        if event.kind == "conclusion":
            answer = " ".join(event.text.split())
            self._line(event.worker, f"(asked for the answer after step {event.step}) {answer}")
        else:
            *lines, rest = (self._unfinished[event.worker] + event.text).split("\n")
            self._unfinished[event.worker] = rest
            if event.kind == "end":
                lines, self._unfinished[event.worker] = [*lines, rest], ""
            for line in lines:
                self._line(event.worker, line)

    def end(self, result: Result, summary: Sequence[tuple[str, str]]) -> None:
        for name, rest in self._unfinished.items():
            if rest.strip():
                self._line(name, rest + " ...")
        width = max(len(title) for title, _ in summary)
        print(file=self._out)
        for title, text in summary:
            print(f"{title:<{width}}  {printable(text)}", file=self._out)
        self._out.flush()

    def _line(self, name: str, line: str) -> None:
        if line.strip():
            print(f"{printable(name)}: {printable(line).strip()}", file=self._out, flush=True)


# ---- live columns --------------------------------------------------------------------------------

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_NARROWEST = 16  # a column, in characters, if there are many workers
_COMFORTABLE = 24
_GAP = 3  # between columns
_PER_SECOND = 8  # frames
_HEADING = 2  # lines above a column's text: name, rule
_SHOW_CURSOR = "\x1b[?25h"


@dataclass
class _Column:
    name: str
    colour: str
    tokens: int = 0
    finished: list[str] = field(default_factory=list)  # paragraphs in the history
    live: str = ""
    ended: bool = False
    wrapped: dict[tuple[int, int], list[Text]] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """Where the columns stand: `columns` beside each other, in `rows` bands of `lines` lines of
    text and a heading; `hidden` workers find no room."""

    columns: int
    rows: int
    width: int
    lines: int
    hidden: int


def arrange(workers: int, width: int, height: int) -> Grid:
    """The best grid for this many workers on `width` x `height` characters."""

    def fitting(least: int) -> int:
        return max(1, min(workers, (width + _GAP) // (least + _GAP)))

    columns = fitting(_COMFORTABLE)
    # Rather narrow columns than bands of one or two lines.
    while columns < fitting(_NARROWEST) and -(-workers // columns) * (_HEADING + 4) > height:
        columns += 1
    rows = min(-(-workers // columns), max(1, height // (_HEADING + 1)))
    columns = min(columns, -(-workers // rows)) if rows * columns >= workers else columns
    return Grid(
        columns=columns,
        rows=rows,
        width=max(4, (width - _GAP * (columns - 1)) // columns),
        lines=max(1, height // rows - _HEADING),
        hidden=max(0, workers - rows * columns),
    )


class LiveView:
    """A column for each worker, redrawn in place. Finished paragraphs, which belong to everybody's
    history, are dim. In the end everything is printed once more, in full."""

    def __init__(
        self,
        console: Console,
        problem: str,
        names: Sequence[str],
        max_steps: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        from rich.live import Live

        self._console = console
        # Beyond ASCII they are two columns wide in Asian encodings.
        is_unicode = console.encoding.startswith("utf")
        self._rule, self._dot = ("\u2500", " \u00b7 ") if is_unicode else ("-", " | ")
        self._cut: OverflowMethod = "ellipsis" if is_unicode else "crop"
        self._problem = self._printable(problem)
        self._columns = {
            name: _Column(self._printable(name), _COLOURS[i % len(_COLOURS)])
            for i, name in enumerate(names)
        }
        self._max_steps = max_steps
        self._step = 0
        self._clock = clock
        self._began = self._drawn = clock()
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )

    def __enter__(self) -> LiveView:
        self._began = self._clock()
        try:
            self._live.__enter__()
            self._draw()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._live.__exit__(None, None, None)
        finally:  # it may have been interrupted before
            if self._console.is_terminal:
                self._console.file.write(_SHOW_CURSOR)
                self._console.file.flush()

    def show(self, event: Event) -> None:
        self._step = event.step
        if event.worker is not None:
            column = self._columns[event.worker]
            if event.kind == "start":  # of a paragraph, behind one that moved nowhere
                if column.live:
                    column.finished.append(column.live)
                column.live = ""
            elif event.kind in ("question", "token", "end"):
                column.live += event.text
                column.tokens += event.kind == "token"
                column.ended = event.kind == "end"
            elif event.kind == "commit":
                column.finished.append(event.text)
                # The next paragraph of the worker has begun, but nothing of it came before this.
                column.live = ""
        if self._clock() - self._drawn >= 1 / _PER_SECOND or event.kind == "stop":
            self._draw()

    def end(self, result: Result, summary: Sequence[tuple[str, str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        self._live.stop()  # takes the last frame away
        grid = arrange(len(self._columns), self._console.width, 10**6)
        self._console.print(self._title(lines=None))
        for band in self._bands(grid, lines=None):
            self._console.print()
            self._console.print(band)
        self._console.print()
        table = Table.grid(padding=(0, 2))
        for title, text in summary:
            style = "bold green" if title == "answer" else ""
            table.add_row(Text(title, style="bold"), Text(self._printable(text), style=style))
        self._console.print(table)

    # ---- drawing ----------------------------------------------------------------------------

    def _printable(self, text: str) -> str:
        """As it comes out, so that columns are as wide as they seem: the stream would escape what
        its encoding lacks."""
        encoding = self._console.encoding
        return printable(text).encode(encoding, "backslashreplace").decode(encoding)

    def _draw(self) -> None:
        self._live.update(self.frame(), refresh=True)
        self._drawn = self._clock()

    def frame(self) -> RenderableType:
        """What is on the screen now."""
        from rich.console import Group
        from rich.text import Text

        width, height = self._console.size
        gap = [Text("")] if height >= 12 else []  # above and below the columns
        title = self._title(lines=2 if height >= 16 else 1)
        title_lines = len(title.wrap(self._console, width))
        # Two lines for the status and for the cursor behind it.
        grid = arrange(len(self._columns), width, max(3, height - title_lines - 2 * len(gap) - 2))
        seconds = self._clock() - self._began
        tokens = sum(column.tokens for column in self._columns.values())
        facts = [
            *([f"{grid.hidden} more workers"] if grid.hidden else []),
            f"step {self._step} of {self._max_steps}",
            f"{tokens} tokens",
            f"{tokens / seconds if seconds else 0:.1f} tokens/s",
            f"{seconds:.0f} s",
            "Ctrl-C ends it",
        ]
        status = Text(self._dot.join(facts), style="dim")
        status.truncate(width, overflow=self._cut)
        return Group(title, *gap, *self._bands(grid, grid.lines), *gap, status)

    def _title(self, lines: int | None) -> Text:
        """The problem; cut to so many lines."""
        from rich.text import Text

        title = Text(" ".join(self._problem.split()), style="bold")
        if lines is not None:
            title.truncate(self._console.width * lines - 8, overflow=self._cut)
        return title

    def _bands(self, grid: Grid, lines: int | None) -> list[Table]:
        from rich.table import Table

        columns = list(self._columns.values())
        bands = []
        for row in range(grid.rows):
            table = Table(
                box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=False, expand=False
            )
            band = columns[row * grid.columns : (row + 1) * grid.columns]
            cells = [self._cell(column, grid.width, lines) for column in band]
            for _ in cells:
                table.add_column(width=grid.width, no_wrap=True, overflow="crop")
            table.add_row(*cells)
            bands.append(table)
        return bands

    def _cell(self, column: _Column, width: int, lines: int | None) -> Text:
        from rich.text import Text

        heading = Text(column.name, style=f"bold {column.colour}")
        note = f"{column.tokens} ended" if column.ended else f"{column.tokens}"
        heading.truncate(max(1, width - len(note) - 1), overflow=self._cut)
        heading.append(" " * max(1, width - heading.cell_len - len(note)))
        heading.append(note, style="not bold")
        rule = Text(self._rule * width, style=column.colour)
        body = self._body(column, width, lines)
        if lines is not None:
            body += [Text("")] * (lines - len(body))
        return Text("\n").join([heading, rule, *body])

    def _body(self, column: _Column, width: int, lines: int | None) -> list[Text]:
        """The last `lines` lines of the worker's text, wrapped; all of them if None."""
        from rich.text import Text

        lines_left = 10**9 if lines is None else lines
        blocks: list[list[Text]] = []  # last paragraph first
        if live := self._printable(column.live).strip():
            blocks.append(list(Text(live).wrap(self._console, width)))
        for i in range(len(column.finished) - 1, -1, -1):
            if sum(len(block) + 1 for block in blocks) >= lines_left:
                break
            key = (i, width)
            if key not in column.wrapped:
                text = Text(self._printable(column.finished[i]).strip(), style="dim")
                column.wrapped[key] = list(text.wrap(self._console, width))
            blocks.append(column.wrapped[key])
        body: list[Text] = []
        for block in reversed(blocks):
            body += [Text(""), *block] if body else block
        return body[-lines_left:]
