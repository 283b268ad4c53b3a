"""stdin, stdout and stderr as a command finds them: in any encoding, closed, full.

Nothing here may be the reason for which a run dies.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import stat
import sys
from pathlib import Path
from typing import Any

LONGEST_PROBLEM = 1 << 24  # bytes: several times what any model has positions for

_ENCODINGS = (  # UTF-32 first: its mark begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def prepare() -> bool:
    """Makes stdout and stderr take every character; returns whether stdout was open.

    What an encoding lacks is written as an escape, as in \\u2500. What goes to a closed stream is
    lost, and its number is taken, so that no file opened later gets it and finds in itself what
    others print there.
    """
    was_open = sys.stdout is not None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; the lowest free number is the one that open() gives
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # not where a program has put another object
            stream.reconfigure(errors="backslashreplace")
    return was_open


def finish() -> OSError | None:
    """Writes out what stdout still holds. If it takes no more, says why, and what it holds is given
    up: the interpreter's own attempt at its end would change the exit code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout)
        return error
    return None


def give_up(stream: Any) -> None:
    """Sends what a stream holds, and all that is still written to it, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say(text: str) -> None:
    """Prints a line to stderr. Where that takes nothing, there is nobody to tell."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def read_problem() -> str:
    """All of stdin, as text.

    Its byte order mark tells its encoding, else the locale. Raises ValueError, naming the problem,
    for what is no text.
    """
    if sys.stdin is None:
        raise ValueError("problem: - reads it from stdin, and that is closed")
    binary = getattr(sys.stdin, "buffer", None)
    if binary is None:  # a program has put another object there
        return str(sys.stdin.read())
    try:
        content: bytes = binary.read(LONGEST_PROBLEM + 1)
    except OSError as error:
        raise ValueError(f"problem: stdin cannot be read: {error.strerror}") from None
    if len(content) > LONGEST_PROBLEM:
        raise ValueError(f"problem: expected at most {LONGEST_PROBLEM >> 20} MB on stdin, got more")
    marked = (encoding for mark, encoding in _ENCODINGS if content.startswith(mark))
    encoding = next(marked, sys.stdin.encoding or "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"problem: expected text in {encoding.upper()} on stdin, got byte "
            f"{content[error.start]:#04x} at {error.start}. To convert a file: iconv -f LATIN1 "
            "-t UTF-8 FILE"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def checked_argument(problem: str) -> str:
    """A problem from the command line. Raises ValueError for one with bytes that are no text."""
    try:
        problem.encode()
    except UnicodeEncodeError as error:
        wrong = problem[error.start]  # Python has put it in the place of a byte
        got = f"byte {ord(wrong) - 0xDC00:#04x}" if "\udc80" <= wrong <= "\udcff" else repr(wrong)
        encoding = sys.getfilesystemencoding().upper()
        raise ValueError(
            f"problem: expected text in {encoding}, got {got} at {error.start}"
        ) from None
    return problem


def is_stream(path: Path) -> bool:
    """Whether stdin, stdout or stderr is this very file (a regular one)."""
    try:
        wanted = path.stat()
    except OSError:
        return False
    if not stat.S_ISREG(wanted.st_mode):
        return False
    for number in range(3):
        with contextlib.suppress(OSError):
            if os.path.samestat(wanted, os.fstat(number)):
                return True
    return False
