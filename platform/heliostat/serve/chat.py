"""How a chat becomes the prompt of a model: by the template of its tokenizer, or as plain lines."""

import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from heliostat.serve.replies import Refusal

FIELD = "messages"


class Turn(NamedTuple):
    role: str
    content: str


class ChatFormat(Protocol):
    """`stops` are strings that end an answer's turn."""

    @property
    def stops(self) -> tuple[str, ...]: ...

    def encode(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """The prompt up to where the answer begins. Raises Refusal: 422, no such chat."""
        ...


class PlainLines:
    """`role: content` a line and then `assistant:`; the next `user:` ends the answer."""

    stops = ("\nuser:",)

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        lines = "".join(f"{turn.role}: {turn.content}\n" for turn in turns)
        return tuple(self._tokenizer.encode(f"{lines}assistant:", add_special_tokens=False).ids)


class Template:
    """A Jinja template, run in a sandbox, of which alone special tokens come.

    Where a message spells one out, it is read as text: a message cannot end its turn.
    """

    stops = ()

    def __init__(self, source: str, tokenizer: Any, end: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": _refuse, "eos_token": end}
        self._template = environment.from_string(source)
        self._plain = tokenizer
        self._special = Tokenizer.from_str(tokenizer.to_str())
        added = self._special.get_added_tokens_decoder().values()
        self._names = [token.content for token in added if token.special]

    def encode(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        mark = f"\ue000{secrets.token_hex(8)}:"  # no message can know it
        messages = [
            {"role": turn.role, "content": self._hide(turn.content, mark)} for turn in turns
        ]
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            message = f"{FIELD} do not fit the model's chat template: {error!s:.200}"
            raise Refusal(422, message, FIELD) from error
        ids: list[int] = []
        for i, part in enumerate(re.split(f"{re.escape(mark)}(\\d+);", text)):
            tokenizer, spelled = (
                (self._plain, self._names[int(part)]) if i % 2 else (self._special, part)
            )
            ids += tokenizer.encode(spelled, add_special_tokens=False).ids
        return tuple(ids)

    def _hide(self, content: str, mark: str) -> str:
        for number, name in enumerate(self._names):
            content = content.replace(name, f"{mark}{number};")
        return content


def _refuse(message: str) -> None:
    raise TemplateError(message)
