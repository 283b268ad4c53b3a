"""The signals that end a command: Ctrl-C, `kill` and `timeout`, a terminal that is closed.

SIGTERM and SIGHUP do what Ctrl-C does, so that whatever cleans up after the one cleans up after
the others. One that is ignored when the command starts stays so: `nohup`, jobs in the background.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# Their names in a summary.
ENDING = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Received:
    """The signals that came while a command ran, and what the next one does.

    Usually it raises KeyboardInterrupt. `stop_first` lets the first one ask for an end instead, and
    from the second one, or `finish`, on nothing is raised before the third: so what there is gets
    told, and whoever cannot wait for that has a way out.
    """

    def __init__(self) -> None:
        self.numbers: list[signal.Signals] = []
        self._stop: Callable[[], None] | None = None
        self._finishes = False

    @property
    def exit_code(self) -> int:
        """What a shell says of a program that the first of them ended; 130 if none came."""
        return 128 + (self.numbers[0] if self.numbers else signal.SIGINT)

    @property
    def name(self) -> str:
        """The first one's."""
        return ENDING[self.numbers[0] if self.numbers else signal.SIGINT]

    def stop_first(self, stop: Callable[[], None]) -> None:
        """From here on the first signal calls `stop`, and the second one ends at once."""
        self._stop = stop

    def finish(self) -> None:
        """From here on what there is gets told."""
        self._finishes = True

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.numbers.append(signal.Signals(number))
        if self._finishes:
            if len(self.numbers) < 3:
                return
        elif self._stop is not None:
            if len(self.numbers) == 1:
                self._stop()
                return
            self._finishes = True  # here, where no other signal can come between
        raise KeyboardInterrupt


@contextlib.contextmanager
def received() -> Iterator[Received]:
    """Takes the signals while the `with` block lasts; in other threads than the main one none."""
    taken = Received()
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                # None: a handler that Python did not install, and could not put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, taken.take)
        yield taken
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
