"""Finding the final answer in what a worker writes."""

from __future__ import annotations


def boxed_answer(text: str) -> str | None:
    """What stands in the last complete `\\boxed{...}` of the text, None without one.

    Nothing, and mere dots, are not an answer: models quote the instruction to write one.
    """
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        content = _within_braces(text, start + len("\\boxed{"))
        if content is not None and content.strip(" .\u2026"):
            return content.strip()
        end = start
    return None


def _within_braces(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it, None if none does."""
    depth = 1
    for i in range(start, len(text)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start:i]
    return None
