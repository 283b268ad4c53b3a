"""Tokens to text, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextDecoder:
    """Tokens to text, one at a time: what was returned is never taken back.

    `before` are tokens that stand in front, and begin with a whole character. Some tokenizers
    decode a token differently where it is the first, or where the bytes before it are not whole.
    """

    # A character has at most 4 bytes, a token at least one. Past that, it is not incomplete but
    # wrong, and is shown as it is.
    _MOST_PENDING = 3

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before)
        self._start = 0  # from here on tokens are decoded together
        self._shown = len(self._tokens)

    def add(self, token: int) -> str:
        """The text that the token adds; empty while it ends within a character."""
        self._tokens.append(token)
        return self._advance(self._MOST_PENDING)

    def flush(self) -> str:
        """The text of what is left, an incomplete character as U+FFFD."""
        return self._advance(0)

    def _advance(self, most_pending: int) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        text = self._decode(self._tokens[self._start :])
        pending = len(self._tokens) - self._shown
        if pending == 0 or (text.endswith("\ufffd") and pending <= most_pending):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text
