"""How a chat becomes the prompt of a model: by the template of its tokenizer, or as plain lines."""

import json
import re
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from heliostat.errors import HeliostatError
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


class Generation(Extension):
    """`{% generation %}` says where an answer stands, which only training asks."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Template:
    """A Jinja template as transformers has it, in a sandbox; special tokens come of it alone.

    Where a message spells one out, it is read as text: a message cannot end its turn.
    """

    stops = ()

    def __init__(self, source: str, tokenizer: Any, end: str) -> None:
        """Raises HeliostatError: it is no template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _write_json
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": _tell_time,
            "eos_token": end,
        }
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise HeliostatError(
                f"the chat template beside the tokenizer does not parse, line {error.lineno}: "
                f"{error!s:.200} Mend it and prepare the data again"
            ) from error
        self._plain = tokenizer
        self._special = Tokenizer.from_str(tokenizer.to_str())
        added = self._special.get_added_tokens_decoder().values()
        self._names = [token.content for token in added if token.special]

    def encode(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        # No message can know it, and no filter makes another of digits.
        mark = f"{secrets.randbits(64):020}:"
        messages = [
            {"role": turn.role, "content": self._hide(turn.content, mark)} for turn in turns
        ]
        try:
            text = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True
            )
        except Exception as error:  # a template can raise any
            message = f"{FIELD} do not fit the model's chat template: {error!r:.200}"
            raise Refusal(422, message, FIELD) from error
        ids: list[int] = []
        for i, part in enumerate(re.split(f"{mark}(\\d+);", text)):
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


def _tell_time(form: str) -> str:
    return datetime.now().strftime(form)


def _write_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would read."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
