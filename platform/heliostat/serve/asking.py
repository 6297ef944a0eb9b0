"""The bodies of OpenAI's protocol: what may be asked, as values, and what is refused."""

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import from_json

from heliostat.serve.chat import Turn
from heliostat.serve.engine.ask import Ask, Sampling
from heliostat.serve.language import Language
from heliostat.serve.replies import JSON_TYPE, Refusal
from heliostat.spec import Section

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; a chat may fill the context
MAX_SHOWN = 80

Flag = Annotated[bool, Field(strict=True)]
Shown = Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]

AnySection = TypeVar("AnySection", bound=Section)
T = TypeVar("T")


def _refuse(value: T) -> T:
    """0, or nothing in a mapping, asks for nothing; what else asks for what the engine lacks."""
    if value:
        raise ValueError("is not supported: leave it out")
    return value


Zero = Annotated[float, Field(strict=True), AfterValidator(_refuse)]
Nothing = Annotated[dict[str, float], AfterValidator(_refuse)]


def _list_one(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stops = Annotated[tuple[Stop, ...], Field(max_length=MAX_STOPS), BeforeValidator(_list_one)]


class StreamOptions(Section):
    include_usage: Flag = False


class Generation(Section):
    """What completions and chats share; null is as good as absent.

    `top_k`, `repetition_penalty`, `stop_token_ids` and `ignore_eos` are not OpenAI's: its client
    sends them as `extra_body`. Penalties and biases that the engine does not have must be 0.
    """

    model: Annotated[str, Field(max_length=128)]
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1)] | None = None
    repetition_penalty: Annotated[float, Field(strict=True, ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    stop_token_ids: (
        Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], Field(max_length=64)] | None
    ) = None
    ignore_eos: Flag | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Nothing | None = None

    @field_validator("stream_options")
    @classmethod
    def _options_are_of_a_stream(
        cls, options: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if options and not info.data.get("stream"):
            raise ValueError("is for a stream: set stream to true, or leave it out")
        return options

    def find_stops(self, language: Language) -> tuple[str, ...]:
        """The strings that end an answer, which does not have them."""
        return self.stop or ()

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def alternatives(self) -> int | None:
        """How many are told with the log probability of a token, None: not even that."""
        return None


class TextFormat(Section):
    type: Literal["text"]


class Completion(Generation):
    prompt: Any
    best_of: Literal[1] | None = None
    logprobs: Shown | None = None
    echo: Literal[False] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def read_prompts(self, language: Language) -> list[tuple[int, ...]]:
        """Raises Refusal: 422, one is no prompt, or holds no token or too many."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [read_text(language, prompt, "prompt")]
        if not isinstance(prompt, list) or not prompt:
            raise Refusal(422, "prompt must be a text, a list of texts, or token ids", "prompt")
        if all(type(token) is int for token in prompt):
            return [read_tokens(language, prompt, "prompt")]
        if len(prompt) > MAX_CHOICES:
            message = f"prompt has {len(prompt):,} prompts, at most {MAX_CHOICES} are taken at once"
            raise Refusal(422, message, "prompt")
        return [_read(language, one, f"prompt[{i}]") for i, one in enumerate(prompt)]


class Part(Section):
    type: Literal["text"]
    text: str


class Message(Section):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[Part, ...]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Chat(Generation):
    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Shown | None = None
    response_format: TextFormat | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _alternatives_are_of_logprobs(cls, shown: int | None, info: ValidationInfo) -> int | None:
        if shown and not info.data.get("logprobs"):
            raise ValueError("is told beside logprobs: set logprobs to true, or leave it out")
        return shown

    def find_stops(self, language: Language) -> tuple[str, ...]:
        return (*(self.stop or ()), *language.chat.stops)

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def read_prompts(self, language: Language) -> list[tuple[int, ...]]:
        """Raises Refusal: 422, the chat has too many tokens."""
        turns = [Turn(message.role, message.text) for message in self.messages]
        _check_size(language, sum(len(turn.content) for turn in turns), "messages")
        return [_check_length(language, language.chat.encode(turns), "messages")]


def parse(kind: type[AnySection], content_type: str, body: bytes) -> AnySection:
    """Raises Refusal: 415 another content type, 400 not JSON, 422 with the field."""
    if content_type.partition(";")[0].strip().lower() != JSON_TYPE:
        raise Refusal(415, f"send {JSON_TYPE}")
    try:
        document = from_json(body)  # NaN is a number here, so that its field can be named
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Refusal(422, "the body must be an object", "body")
    try:
        return kind.model_validate(_without_nulls(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = _show_path(first["loc"])
        raise Refusal(422, f"{field} {_explain(first)}", field) from error


def _without_nulls(document: dict[str, Any]) -> dict[str, Any]:
    """Clients send null for all that they know of and leave out, also in the turns of a chat."""
    given = {name: value for name, value in document.items() if value is not None}
    if isinstance(turns := given.get("messages"), list):
        given["messages"] = [_without_nulls(one) if isinstance(one, dict) else one for one in turns]
    return given


def make_asks(
    body: Generation, prompts: Sequence[tuple[int, ...]], language: Language
) -> list[Ask]:
    """`n` asks of each prompt.

    Raises:
        Refusal: 422, more is asked for than the model has tokens, or than the context holds.
    """
    count, choices = len(prompts), body.n or 1
    if count * choices > MAX_CHOICES:
        message = f"n is {choices} for {count} prompts, at most {MAX_CHOICES} answers are given"
        raise Refusal(422, message, "n")
    ends = _read_ends(body, language)
    return [
        Ask(prompt, _count_tokens(body, len(prompt), language), ends, _sampling(body, i, language))
        for prompt in prompts
        for i in range(choices)
    ]


def read_text(language: Language, text: str, field: str) -> tuple[int, ...]:
    """Raises Refusal: 422, it has no tokens or more than the context holds."""
    _check_size(language, len(text), field)
    return _check_length(language, language.encode(text), field)


def read_tokens(language: Language, tokens: Sequence[int], field: str) -> tuple[int, ...]:
    """Raises Refusal: 422, one is not in the vocabulary, or there are none or too many."""
    for i, token in enumerate(tokens):
        if not 0 <= token < language.vocab:
            message = f"{field}[{i}] is {_show(token)}, token ids go from 0 to {language.vocab - 1}"
            raise Refusal(422, message, f"{field}[{i}]")
    return _check_length(language, tuple(tokens), field)


def _read(language: Language, prompt: object, field: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return read_text(language, prompt, field)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return read_tokens(language, prompt, field)
    raise Refusal(422, f"{field} must be a text or a list of token ids", field)


def _check_size(language: Language, characters: int, field: str) -> None:
    """A character is a byte at least: what cannot fit is refused before the work of reading it."""
    most = language.context * language.longest_token
    if characters > most:
        message = f"{field} has {characters:,} characters, {language.context:,} tokens are"
        raise Refusal(422, f"{message} {most:,} at most", field)


def _check_length(language: Language, tokens: tuple[int, ...], field: str) -> tuple[int, ...]:
    if not tokens:
        raise Refusal(422, f"{field} has no tokens: there is nothing to continue", field)
    if len(tokens) >= language.context:
        raise Refusal(
            422,
            f"{field} has {len(tokens):,} tokens, the context of {language.version.ref} holds "
            f"{language.context:,} with at least one that follows",
            field,
        )
    return tokens


def _count_tokens(body: Generation, prompt: int, language: Language) -> int:
    room = language.context - prompt
    field = "max_tokens"
    asked = body.max_tokens
    if isinstance(body, Chat) and body.max_completion_tokens is not None:
        field, asked = "max_completion_tokens", body.max_completion_tokens
    if asked is None:
        return room if isinstance(body, Chat) else min(DEFAULT_TOKENS, room)
    if asked > room:
        raise Refusal(
            422,
            f"{field} is {_show(asked)}, the prompt of {prompt:,} tokens leaves room for {room:,} "
            f"of the {language.context:,} of the context",
            field,
        )
    return asked


def _read_ends(body: Generation, language: Language) -> frozenset[int]:
    for i, token in enumerate(body.stop_token_ids or ()):
        if token >= language.vocab:
            field = f"stop_token_ids[{i}]"
            message = f"{field} is {_show(token)}, token ids go from 0 to {language.vocab - 1}"
            raise Refusal(422, message, field)
    own = () if body.ignore_eos else (language.end,)
    return frozenset((*own, *(body.stop_token_ids or ())))


def _sampling(body: Generation, choice: int, language: Language) -> Sampling:
    top_k = max(0, body.top_k or 0)
    if top_k > language.vocab:
        message = f"top_k is {_show(top_k)}, the vocabulary has {language.vocab:,} tokens"
        raise Refusal(422, message, "top_k")
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=body.top_p or 1.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=None if body.seed is None else body.seed + choice,
        logprobs=None if body.alternatives is None else min(body.alternatives, language.vocab),
    )


def _show_path(path: Sequence[int | str]) -> str:
    """`messages[0].content`, without the kinds of a union that pydantic has tried."""
    shown = ""
    for key in path:
        if isinstance(key, int):
            shown += f"[{key}]"
        elif "[" not in key and key != "str":
            shown += f".{key}" if shown else key
    return shown[:MAX_SHOWN]


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is unknown"
    if error["type"] == "missing":
        return "is required"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{message[0].lower()}{message[1:]}, given {_show(error['input'])}"


def _show(value: object) -> str:
    return reprlib.repr(value)
