"""Finding the final answer in what a worker writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

_BOXED = "boxed"


class AnswerFinder(Protocol):
    """Is told a text piece by piece, and says what answer it has so far, None without one."""

    def add(self, piece: str) -> str | None: ...


class BoxedAnswer:
    """What stands in the last complete `\\boxed{...}` of a text that grows.

    Nothing, and mere dots, are not an answer: models quote the instruction to write one. Braces
    with a backslash before them are letters, as in LaTeX. Each letter is looked at once, however
    many boxes are open.
    """

    def __init__(self) -> None:
        self.answer: str | None = None
        self._text = ""
        self._answer_start = -1
        self._open: list[int] = []  # for each open brace where its box begins, -1 for no box
        self._escaped = False  # behind an odd number of backslashes
        # Behind a backslash, how many letters of "boxed" have come; -1 for another word. Two
        # backslashes will do as well: models escape what they believe to be a string.
        self._letters = -1

    def add(self, piece: str) -> str | None:
        """The answer with this piece of text behind the others."""
        before = len(self._text)
        self._text += piece
        for at, letter in enumerate(piece, before + 1):
            if letter == "\\":
                self._escaped, self._letters = not self._escaped, 0
                continue
            if letter == "{" and not self._escaped:
                self._open.append(at if self._letters == len(_BOXED) else -1)
            elif letter == "}" and not self._escaped and self._open:
                self._close(self._open.pop(), at - 1)
            if letter == _BOXED[self._letters : self._letters + 1] and self._letters >= 0:
                self._letters += 1
            elif not (letter.isspace() and self._letters == len(_BOXED)):
                self._letters = -1
            self._escaped = False
        return self.answer

    def _close(self, start: int, end: int) -> None:
        if start <= self._answer_start:  # no box, or around one that has the answer
            return
        content = self._text[start:end].strip()
        if content.strip(" .\u2026\t\r\n"):
            self.answer, self._answer_start = content, start


class AnswerOf:
    """What a function of the whole text says."""

    def __init__(self, function: Callable[[str], str | None]) -> None:
        self._function = function
        self._text = ""

    def add(self, piece: str) -> str | None:
        """What the function says of the text with this piece behind the others."""
        self._text += piece
        return self._function(self._text)


def boxed_answer(text: str) -> str | None:
    """What stands in the last complete `\\boxed{...}` of the text, None without one.

    Nothing, and mere dots, are not an answer: models quote the instruction to write one.
    """
    return BoxedAnswer().add(text)
