"""OpenAI's completions and chats over the language models of a shelf, whole or streamed."""

import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from heliostat.registry import Version
from heliostat.serve.asking import Chat, Completion, make_asks, parse
from heliostat.serve.choices import Choice, Piece, Placed, count_usage, read_pieces
from heliostat.serve.door import Door
from heliostat.serve.engine.runner import Answer, Failed
from heliostat.serve.engine.scheduler import Full
from heliostat.serve.events import EventStream, to_event, while_connected
from heliostat.serve.gate import Visit, visit_of
from heliostat.serve.identity import find_request_id
from heliostat.serve.language import Language
from heliostat.serve.openapi import (
    ANYTHING,
    TEXT,
    WHOLE,
    Paths,
    a_list,
    an_object,
    json_body,
    operation,
)
from heliostat.serve.reading import SHORT_TEXT_BYTES, read
from heliostat.serve.replies import JSON_TYPE, Refusal, render_error, reply
from heliostat.serve.shelf import Shelf
from heliostat.signature import NextToken, output_from_json

DONE = b"data: [DONE]\n\n"
VERSION = re.compile("[1-9][0-9]{0,8}")

Document = dict[str, Any]
Tell = Callable[[Language, Sequence[Placed]], Document]


@dataclass(frozen=True)
class Dialect:
    """How an answer is written: its body, its kinds, and a choice in it, whole or a piece."""

    body: type[Completion] | type[Chat]
    prefix: str
    whole_object: str
    piece_object: str
    write_whole: Callable[[str], Document]
    write_piece: Callable[[str, bool], Document]  # the text, and whether it is the first
    tell: Tell


def tell_completion(language: Language, placed: Sequence[Placed]) -> Document:
    """Log probabilities as completions have them: columns, the alternatives by their text.

    Offsets are characters of the answer's text, which does not have the prompt.
    """
    tokens = [token for token, _ in placed]
    return {
        "tokens": [language.spell(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {language.spell(id): logprob for id, logprob in token.top} for token in tokens
        ],
        "text_offset": [offset for _, offset in placed],
    }


def tell_chat(language: Language, placed: Sequence[Placed]) -> Document:
    """Log probabilities as chats have them: rows, also of a part of a character its own bytes."""

    def describe(id: int, logprob: float | None) -> Document:
        own = list(language.bytes_of(id))
        return {"token": language.spell(id), "logprob": logprob, "bytes": own}

    return {
        "content": [
            describe(token.id, token.logprob)
            | {"top_logprobs": [describe(id, logprob) for id, logprob in token.top]}
            for token, _ in placed
        ],
        "refusal": None,
    }


def write_delta(text: str, first: bool) -> Document:
    return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}


COMPLETIONS = Dialect(
    Completion,
    "cmpl-",
    "text_completion",
    "text_completion",
    lambda text: {"text": text},
    lambda text, first: {"text": text},
    tell_completion,
)
CHATS = Dialect(
    Chat,
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    write_delta,
    tell_chat,
)
PATHS = {"/v1/completions": COMPLETIONS, "/v1/chat/completions": CHATS}


def list_routes(shelf: Shelf, door: Door) -> list[Route]:
    def serve(dialect: Dialect) -> Callable[[Request, bytes], Any]:
        async def generate(request: Request, body: bytes) -> Response:
            asked = parse(dialect.body, request.headers.get("content-type", ""), body)
            visit, (name, number) = visit_of(request), read_model(asked.model)
            visit.enter(name)
            language = await shelf.get_language(name, number)
            visit.version = language.version.number
            is_short = len(body) <= SHORT_TEXT_BYTES
            prompts = await read(partial(asked.read_prompts, language), is_short)
            asks = make_asks(asked, prompts, language)
            stops = asked.find_stops(language)
            choices = [Choice(i, ask, language, stops) for i, ask in enumerate(asks)]
            answer = start(language, choices)
            writing = Writing(dialect, language, answer, choices, len(prompts), visit)
            if not asked.stream:
                with answer:
                    return reply(await while_connected(request, writing.write_whole()))
            try:  # the stream begins with its first token: until then there can be an error
                await while_connected(request, answer.wait())
            except BaseException:
                answer.leave()
                raise
            return EventStream(writing.write_events(asked.with_usage))

        return generate

    return [
        Route(path, door.guard(serve(dialect)), methods=["POST"]) for path, dialect in PATHS.items()
    ]


def list_paths(versions: Sequence[Version]) -> Paths:
    names = [
        version.name
        for version in versions
        if isinstance(output_from_json(version.output), NextToken)
    ]
    examples = {
        "/v1/completions": {"prompt": "Once", "max_tokens": 4},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    }
    answer = an_object(id=TEXT, object=TEXT, created=WHOLE, model=TEXT, choices=a_list(ANYTHING))
    return {
        path: {
            "post": operation(
                "A continuation of a text, or of a chat; with `stream` as server-sent events",
                answer,
                name=dialect.whole_object.replace(".", "_"),
                body={
                    JSON_TYPE: json_body(
                        dialect.body.model_json_schema(),
                        {name: {"model": name, **examples[path]} for name in names},
                    )
                },
            )
        }
        for path, dialect in PATHS.items()
    }


def read_model(model: str) -> tuple[str, int | None]:
    """`name`, or `name:3` for one version of it; what is neither is the name of no model."""
    name, colon, number = model.partition(":")
    if not colon or not VERSION.fullmatch(number):
        return model, None
    return name, int(number)


def start(language: Language, choices: list[Choice]) -> Answer:
    """Raises Refusal: 429, too many wait."""
    try:
        return language.runner.start([choice.ask for choice in choices])
    except Full as error:
        waiting = language.runner.max_waiting
        message = f"{waiting} texts wait for {language.version.ref} already, retry later"
        raise Refusal(429, message) from error


class Writing:
    """One answer in one dialect."""

    def __init__(
        self,
        dialect: Dialect,
        language: Language,
        answer: Answer,
        choices: list[Choice],
        prompts: int,
        visit: Visit,
    ) -> None:
        self._dialect, self._language, self._visit = dialect, language, visit
        self._answer, self._choices, self._prompts = answer, choices, prompts
        self._head = {
            "id": dialect.prefix + secrets.token_hex(16),
            "created": int(time.time()),
            "model": language.version.name,
        }

    async def write_whole(self) -> bytes:
        try:
            async for _ in read_pieces(self._answer, self._choices):
                pass
        finally:
            self._charge()
        write = self._dialect.write_whole
        choices = [
            self._describe(choice.number, choice.tokens, choice.finish) | write(choice.text)
            for choice in self._choices
        ]
        usage = count_usage(self._choices, self._prompts)
        whole = {"object": self._dialect.whole_object, "choices": choices, "usage": usage}
        return to_json(self._head | whole)

    async def write_events(self, with_usage: bool) -> AsyncGenerator[bytes, None]:
        head = self._head | {"object": self._dialect.piece_object}
        if with_usage:
            head["usage"] = None
        begun = set[int]()
        with self._answer:
            try:
                async for piece in read_pieces(self._answer, self._choices):
                    yield to_event(head | {"choices": [self._write(piece, begun)]})
            except (Failed, Refusal) as error:
                status = self._visit.status = error.status if isinstance(error, Refusal) else 500
                message = str(error) or "the server failed, its log has the reason"
                yield b"data: " + render_error(status, message, find_request_id()) + b"\n\n"
                return
            finally:
                self._charge()
        if with_usage:
            usage = count_usage(self._choices, self._prompts)
            yield to_event(head | {"choices": [], "usage": usage})
        yield DONE

    def _charge(self) -> None:
        """What was read and made so far is used, whoever waits for it."""
        usage = count_usage(self._choices, self._prompts)
        tokens_in, tokens_out = usage["prompt_tokens"], usage["completion_tokens"]
        self._visit.count(tokens_in=tokens_in, tokens_out=tokens_out)

    def _write(self, piece: Piece, begun: set[int]) -> Document:
        first = piece.choice not in begun
        begun.add(piece.choice)
        text = self._dialect.write_piece(piece.text, first)
        return self._describe(piece.choice, piece.tokens, piece.finish) | text

    def _describe(self, number: int, tokens: Sequence[Placed], finish: str | None) -> Document:
        logprobs = self._dialect.tell(self._language, tokens) if tokens else None
        return {"index": number, "logprobs": logprobs, "finish_reason": finish}
