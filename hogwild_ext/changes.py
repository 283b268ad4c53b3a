"""Changes: each as a whole, and one at a time, whatever is raised wherever.

Nothing here relies on a `finally` or an `__exit__`, because a Ctrl-C may strike in front of it.

- *As a whole.* What a change makes new stands in `Cell`s beside what was there before. All of them
  show the new at once, when `Change.done` is set: a single assignment.
- *One at a time.* A change takes its turn from the one before it, which has one successor for ever.
  A turn is not given back. It ends with the change; or when the call that makes the change is no
  longer running, nobody holds the step any more that it belongs to, or its thread has ended.

Who takes a turn learns whether the one before ended properly, and tidies up after it if not.
"""

from __future__ import annotations

import sys
import threading
import weakref
from threading import get_ident
from types import FrameType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Change:
    """One change of a cache. It is to take its turn as soon as it is made.

    Args:
        what: the name of what is done.
        call: the frame of the call that does it.
        step: the step that does it from `open` on.
    """

    __slots__ = (
        "_call", "_cells", "_limit", "_step", "_successor", "done", "opened_by", "over", "owner",
        "what",
    )  # fmt: skip

    def __init__(
        self, what: str, call: FrameType | None = None, step: object | None = None
    ) -> None:
        self.what = what
        self.owner = get_ident()  # the thread that it belongs to
        self.done = False  # set once: from here on everything is as after it
        self.over = False  # and everything is tidied up
        self.opened_by = 0  # the owner, while a step is open
        self._call = call
        self._limit: FrameType | None = None
        self._step = None if step is None else weakref.ref(step)
        self._cells: list[Cell[Any]] = []  # that hold something new
        self._successor: dict[str, Change | None] = {}

    def open(self) -> None:
        """From here on it lasts as long as somebody holds the step."""
        self._call = None
        self.opened_by = self.owner

    def lasts_no_longer_than(self, call: FrameType) -> None:
        """The step that is open must be over when `call` has ended."""
        self._limit = call

    def end(self) -> None:
        """Everything is tidied up; nothing is kept alive."""
        self.opened_by = 0
        while self._cells:
            self._cells.pop().settle()
        self._call = self._limit = None
        self.over = True

    def is_going_on(self) -> bool:
        """Whether somebody is at it."""
        if self.over or not is_alive(self.owner):
            return False
        if self.opened_by and self._step is not None and self._step() is None:
            return False
        if self.owner != get_ident():
            return True  # whose calls cannot be looked at
        call = self._limit if self.opened_by else self._call
        return _is_running(call) if call is not None else self.opened_by != 0


def is_alive(thread: int) -> bool:
    """Whether there is a thread of this ident."""
    return thread in sys._current_frames()


def thread_name(ident: int) -> str:
    return next((thread.name for thread in threading.enumerate() if thread.ident == ident), "?")


def _is_running(call: FrameType) -> bool:
    """Whether a call of this thread has not ended."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def finished() -> Change:
    """A change that is over, to begin with."""
    change = Change("nothing")
    change.done = change.over = True
    return change


_SETTLED = finished()


class Cell(Generic[T]):
    """A value, and the one that a change puts in its place."""

    __slots__ = ("_values",)

    def __init__(self, value: T) -> None:
        self._values = _SETTLED, value, value

    def get(self) -> T:
        """The value as it is now."""
        change, before, after = self._values
        return after if change.done else before

    def get_ahead(self) -> T:
        """The value as it is now, or as an open step will leave it."""
        change, before, after = self._values
        ahead = change.done or (change.opened_by != 0 and change.is_going_on())
        return after if ahead else before

    def put(self, change: Change, value: T) -> None:
        """The value from the moment that `change` is done."""
        change._cells.append(self)
        self._values = change, self.get(), value

    def settle(self) -> None:
        """Lets go of what there was before, or of what was not to be."""
        value = self.get()
        self._values = _SETTLED, value, value


class Turns:
    """The order of changes."""

    def __init__(self) -> None:
        self._last = finished()

    def newest(self) -> Change:
        """The last change that took its turn."""
        last = self._last
        while (successor := last._successor.get("")) is not None:  # stopped before it was noted
            last = successor
        return last

    def take(self, change: Change) -> bool:
        """The next turn for `change`. Whether the one before it has ended properly.

        RuntimeError if it is somebody else's turn.
        """
        last = self.newest()
        if last.is_going_on():
            change.end()
            raise RuntimeError(refusal(change.what, last))
        # `setdefault` is atomic: of several threads that see the same last change, one succeeds it.
        if last._successor.setdefault("", change) is not change:
            change.end()
            raise RuntimeError(changed_meanwhile(change.what))
        self._last = change
        last._successor[""] = None  # it has one for ever, but must not keep all that follow alive
        ended_properly = last.over
        last.end()
        return ended_properly


def changed_meanwhile(what: str) -> str:
    """Why `what` is not done although nobody is at the cache now."""
    return (
        f"{what}: expected a cache that nobody changes meanwhile, got one that another thread has "
        "changed; a cache is for one thread at a time"
    )


def refusal(what: str, going_on: Change) -> str:
    """Why `what` has to wait."""
    message = (
        f"{what}: expected no open step or change of the cache, got one inside {going_on.what!r}"
    )
    if going_on.owner != get_ident():
        thread = thread_name(going_on.owner)
        return f"{message} in thread {thread!r}; a cache is for one thread at a time"
    if going_on.opened_by:
        return f"{message}; its `with` block, or step.abandon(), ends it"
    return message
