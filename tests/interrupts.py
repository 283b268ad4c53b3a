"""Exceptions at every place of the package's own Python where one may arise, and beyond.

A signal arrives between two instructions, and not between any two. `Interrupt` does not ask where:
it raises at the n-th call, line or, with `opcodes`, instruction.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import hogwild_ext

PACKAGE = str(Path(hogwild_ext.__file__).parent) + os.sep
EVERYWHERE = os.environ.get("HOGWILD_INTERRUPTS") == "all"


class Interrupt:
    """Raises `error` at the n-th place within `files` of the package, once. Never with n = -1."""

    def __init__(
        self,
        at: int,
        error: type[BaseException] = KeyboardInterrupt,
        files: tuple[str, ...] = (),
        opcodes: bool = False,
        functions: tuple[str, ...] = (),
    ) -> None:
        self.at, self.error, self.opcodes = at, error, opcodes
        self.files = tuple(PACKAGE + name for name in files)
        self.functions = functions  # of these names only
        self.places = 0  # so far
        self.struck = ""

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not (name in self.files if self.files else name.startswith(PACKAGE)):
            return None
        if self.functions and frame.f_code.co_name not in self.functions:
            return None
        frame.f_trace_opcodes = self.opcodes
        if event == ("opcode" if self.opcodes else "line") or event == "call":
            if self.places == self.at:
                where = f"{name}:{frame.f_lineno} {frame.f_code.co_name}, {event}"
                self.places, self.struck = self.places + 1, f"{where} {frame.f_lasti}"
                self.strike()
            else:
                self.places += 1
        return self._trace

    def strike(self) -> None:
        raise self.error("on purpose")

    def __enter__(self) -> Interrupt:
        self._previous = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        sys.settrace(self._previous)


class Meanwhile(Interrupt):
    """At the n-th place another thread does something, from beginning to end. Nothing is raised."""

    def __init__(self, at: int, action: Callable[[], Any], **options: Any) -> None:
        super().__init__(at, **options)
        self.action = action
        self.result: Any = None  # of the action, or what it raised

    def _run(self) -> None:
        try:
            self.result = self.action()
        except BaseException as error:
            self.result = error

    def strike(self) -> None:
        thread = threading.Thread(target=self._run, name="meanwhile")
        thread.start()
        thread.join()


def some_places(places: int, at_most: int, seed: int) -> Iterator[int]:
    """All of them with HOGWILD_INTERRUPTS=all, else a sample."""
    numbers: Any = range(places)
    if places > at_most and not EVERYWHERE:
        numbers = sorted(random.Random(seed).sample(numbers, at_most))
    yield from numbers
