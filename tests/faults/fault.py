"""What a fault is, and how it gets into a copy of the sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent


@dataclass(frozen=True)
class Fault:
    """`old`, which stands once in `file`, a path from the root, becomes `new`.

    `tests`: what pytest is given, those first that see most for their time; empty: the usual ones
    of the file.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    compiled: str = ""  # of CUDA headers: the `.cu` file that is compiled with the fault


@dataclass(frozen=True)
class Outcome:
    """What the tests said: passed, failed (which is good of a fault), or neither."""

    verdict: Literal["passed", "failed", "broken"]
    words: str


class StaleFault(Exception):
    """The text to change does not stand in its file exactly once."""


def planted(fault: Fault, root: Path = ROOT) -> tuple[str, int]:
    """The file with the fault in it, and the line where it begins. Raises StaleFault."""
    path = root / fault.file
    text = path.read_text() if path.exists() else ""
    count = text.count(fault.old)
    if count != 1:
        raise StaleFault(f"{fault.file} has {count} times, not once: {fault.old!r}")
    pairs = enumerate(zip(fault.old, fault.new, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(fault.old), len(fault.new)))
    line = text.count("\n", 0, text.index(fault.old) + first) + 1
    return text.replace(fault.old, fault.new), line


def stale_faults(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """A line for each fault that cannot be planted."""
    lines = []
    for fault in faults:
        try:
            planted(fault, root)
        except StaleFault as error:
            lines.append(f"{fault.name}: {error}")
    return lines
