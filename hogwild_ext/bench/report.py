"""What a benchmark shows: tables on a terminal, Markdown, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    text: Callable[[Record], str]
    wide: bool = False  # left out where there are fewer than WIDE characters
    is_text: bool = False


WIDE = 108


def short_count(tokens: int) -> str:
    """As in 512 or 4k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def number(key: str, scale: float = 1, form: str = ".1f") -> Callable[[Record], str]:
    """The text of a column: a record's number, or nothing if it has none."""

    def text(record: Record) -> str:
        value = record.get(key)
        return "" if value is None else format(value * scale, form)

    return text


@dataclass(frozen=True)
class Table:
    """Records under a title."""

    title: str
    columns: Sequence[Column]
    records: Sequence[Record]
    kind: str = "cell"  # of the records, in JSON


class Report(Protocol):
    """Takes what there is to say, as it comes."""

    def about(self, lines: Sequence[str], facts: Record) -> None:
        """What holds for all tables: sentences for people, `facts` for programs."""

    def table(self, table: Table) -> None: ...


class JsonReport:
    """`about` first, then every record of every table, each with its kind."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def about(self, lines: Sequence[str], facts: Record) -> None:
        self._write({"kind": "about", **facts, "notes": list(lines)})

    def table(self, table: Table) -> None:
        for record in table.records:
            self._write({"kind": table.kind, **record})

    def _write(self, content: Record) -> None:
        print(json.dumps(content), file=self._out, flush=True)


class MarkdownReport:
    """Tables as GitHub renders them, all columns."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def about(self, lines: Sequence[str], facts: Record) -> None:
        print("\n".join(f"- {line}" for line in lines), file=self._out, flush=True)

    def table(self, table: Table) -> None:
        columns = table.columns
        print(f"\n### {table.title}\n", file=self._out)
        print(_row([column.title for column in columns]), file=self._out)
        print(_row(["---" if c.is_text else "---:" for c in columns]), file=self._out)
        for record in table.records:
            print(_row([column.text(record) for column in columns]), file=self._out)
        self._out.flush()


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


class TerminalReport:
    """Tables as wide as the terminal; needs rich."""

    def __init__(self, out: TextIO, width: int | None = None) -> None:
        from rich.console import Console

        self._console = Console(file=out, width=width, highlight=False)

    def about(self, lines: Sequence[str], facts: Record) -> None:
        for line in lines:
            self._console.print(line, markup=False)

    def table(self, table: Table) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        shown = [c for c in table.columns if not c.wide or self._console.width >= WIDE]
        drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        for column in shown:
            drawn.add_column(
                column.title, justify="left" if column.is_text else "right",
                no_wrap=not column.is_text, overflow="fold",
            )  # fmt: skip
        for record in table.records:
            drawn.add_row(*(Text(column.text(record)) for column in shown))
        # Not the table's own title, which would be as narrow as the table.
        self._console.print(Text(f"\n{table.title}", "bold"))
        self._console.print(drawn)
