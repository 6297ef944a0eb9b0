"""What the engine makes of a request, as the choices of an answer: text, tokens, an end."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from heliostat.serve.engine.ask import Ask
from heliostat.serve.engine.engine import Made
from heliostat.serve.engine.runner import Answer
from heliostat.serve.engine.sampler import Token
from heliostat.serve.engine.scheduler import Stream
from heliostat.serve.engine.text import Spelling
from heliostat.serve.language import Language


class Placed(NamedTuple):
    """A token, and where in its answer's text its own begins, or the character it is a part of."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new of a choice: text and tokens; `finish` is why it has ended."""

    choice: int
    text: str
    tokens: tuple[Placed, ...]
    finish: str | None


class Choice:
    """One stream of an answer as text, up to the first stop string."""

    def __init__(self, number: int, ask: Ask, language: Language, stops: Sequence[str]) -> None:
        self.number, self.ask = number, ask
        self._spelling = Spelling(language.tokenizer, ask.prompt, stops)
        self.text, self.tokens, self.count = "", list[Placed](), 0
        self.finish: str | None = None

    def add(self, made: Made) -> Piece:
        """The piece that this token adds; one that ends the stream is not spelled."""
        self.count += 1
        offset = self._spelling.length
        text = "" if made.finish == "stop" else self._spelling.add(made.token.id)
        if made.finish and not self._spelling.stopped:
            text += self._spelling.finish()
        self.finish = made.finish
        if self._spelling.stopped:
            self.finish, made.stream.left = "stop", True
        tokens = () if made.token.logprob is None else (Placed(made.token, offset),)
        self.text += text
        self.tokens += tokens
        return Piece(self.number, text, tokens, self.finish)


async def read_pieces(answer: Answer, choices: Sequence[Choice]) -> AsyncIterator[Piece]:
    """The pieces of all choices as they come, without those that say nothing.

    Pieces of a choice that have come together are one.

    Raises:
        Failed: the engine failed.
    """
    numbers: dict[Stream, int] = {stream: i for i, stream in enumerate(answer.streams)}
    while any(choice.finish is None for choice in choices):
        together: dict[int, Piece] = {}
        for made in await answer.take():
            choice = choices[numbers[made.stream]]
            if choice.finish is None:
                new = choice.add(made)
                together[new.choice] = _join(together.get(new.choice), new)
        for piece in together.values():
            if piece.text or piece.tokens or piece.finish:
                yield piece


def count_usage(choices: Sequence[Choice], prompts: int) -> dict[str, Any]:
    """Tokens read and made; a prompt counts once, however many choices it has."""
    each = len(choices) // prompts
    read = sum(len(choice.ask.prompt) for choice in choices[::each])
    made = sum(choice.count for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


def _join(first: Piece | None, second: Piece) -> Piece:
    if first is None:
        return second
    tokens = (*first.tokens, *second.tokens)
    return Piece(second.choice, first.text + second.text, tokens, second.finish)
