"""Targets that a machine's figures are held against: `hogwild bench attention --check`.

What is measured is the business of the modules that make `Target`s; the command line has the list
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .report import Column, Record, Report, Table
from .timing import Timing

NOISE = 0.05  # a spread above it says nothing for or against


@dataclass(frozen=True)
class Line:
    """One figure and what it has to be."""

    name: str
    figure: float
    spread: float  # as a part of the figure
    bound: float
    unit: str = ""
    at_least: bool = True  # else at most
    note: str = ""  # which cell it was, what is in it

    @property
    def verdict(self) -> str:
        """NOISY where the spread is too large to tell, else PASS or FAIL."""
        if self.spread > NOISE:
            return "NOISY"
        good = self.figure >= self.bound if self.at_least else self.figure <= self.bound
        return "PASS" if good else "FAIL"

    @property
    def record(self) -> Record:
        return {
            "name": self.name, "figure": self.figure, "spread": self.spread, "bound": self.bound,
            "unit": self.unit, "at_least": self.at_least, "note": self.note,
            "verdict": self.verdict,
        }  # fmt: skip

    @staticmethod
    def at_most(name: str, timing: Timing, bound: float, scale: float, unit: str) -> Line:
        """The median of a timing, `scale` of a second being the unit."""
        return Line(name, timing.median * scale, timing.spread, bound, unit, at_least=False)


@dataclass(frozen=True)
class Target:
    """Something to be measured, and its lines. `measure` may take minutes."""

    name: str
    measure: Callable[[], Iterable[Line]]


COLUMNS = (
    Column("what", lambda r: f"{r['name']} {r['note']}".strip(), is_text=True),
    Column("target", lambda r: f"{'>=' if r['at_least'] else '<='} {_with_unit(r, 'bound')}"),
    Column("figure", lambda r: _with_unit(r, "figure")),
    Column("±", lambda r: f"{r['spread']:.0%}"),
    Column("", lambda r: r["verdict"], is_text=True),
)


def check(targets: Sequence[Target], report: Report) -> int:
    """Measures one target after the other and reports its lines at once. Returns the exit code: 1
    if any line failed."""
    failed = False
    for target in targets:
        lines = list(target.measure())
        failed |= any(line.verdict == "FAIL" for line in lines)
        records = [{"target": target.name, **line.record} for line in lines]
        report.table(Table(target.name, COLUMNS, records, kind="target"))
    return 1 if failed else 0


def _with_unit(record: Record, key: str) -> str:
    value, unit = record[key], record["unit"]
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 or unit == "%" else 2
    text = f"{value:.{digits}f}"
    return text + (unit if unit in ("%", "x") else f" {unit}" if unit else "")
