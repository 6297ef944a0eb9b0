"""Tokens to text as they come: whole characters, and nothing of what a stop string may begin."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what the bytes of a part of a character are decoded to
CONTEXT_TOKENS = 6  # before a token: a tokenizer may decode a first one in another way
MAX_TOKENS = 3 * CONTEXT_TOKENS  # that are decoded again for a next one


class Spelling:
    """The text of one stream; `stopped` once it has one of the `stops`, which is left out.

    `length` is that of the whole characters so far, with what a stop may take back.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._window = self._cut_window(list(prompt[-2 * MAX_TOKENS :]))
        self._told = self._decode(self._window)
        self._held, self.length = "", 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(UNFINISHED):
            return ""
        new, self._told = text[len(self._told) :], text
        self.length += len(new)
        if len(self._window) > MAX_TOKENS:
            self._window = self._cut_window(self._window)
            self._told = self._decode(self._window)
        return self._cut(new)

    def finish(self) -> str:
        """The rest of the text: there is no further token."""
        rest = self._cut(self._decode(self._window)[len(self._told) :])
        return rest if self.stopped else rest + self._held

    def _cut(self, new: str) -> str:
        """What of the text so far comes before a stop, or before what may become one."""
        if not self._stops:
            return new
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _cut_window(self, tokens: list[int]) -> list[int]:
        """The last CONTEXT_TOKENS, and those before that belong to their first character.

        Some tokenizers give up all bytes that stand together for the first that is out of place.
        """
        begin = max(0, len(tokens) - CONTEXT_TOKENS)
        while begin and self._decode(tokens[begin:]).startswith(UNFINISHED):
            begin -= 1
        return tokens[begin:]

    def _decode(self, tokens: list[int]) -> str:
        decoded: str = self._tokenizer.decode(tokens)
        return decoded


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
