"""A version that continues texts, loaded: its engine, its tokenizer, and how it reads a chat."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from heliostat import examples
from heliostat.data.features import BlockFeatures, features_from_json
from heliostat.data.tokens import load_tokenizer, spell_token
from heliostat.errors import HeliostatError
from heliostat.evaluate import load_predictor
from heliostat.models.gpt import Gpt
from heliostat.registry import Version
from heliostat.serve.chat import ChatFormat, PlainLines, Template
from heliostat.serve.engine.ask import Ask
from heliostat.serve.engine.decoder import Decoder
from heliostat.serve.engine.engine import Engine
from heliostat.serve.engine.runner import Answer, Runner
from heliostat.serve.engine.scheduler import Scheduler
from heliostat.storage import Store

SMOKE_TOKENS = 2


@dataclass(frozen=True)
class Room:
    """How many texts an engine continues at once, of how many tokens, and how many may wait.

    `context` None is the length of the blocks that the model was trained on.
    """

    streams: int = 32
    context: int | None = None
    waiting: int = 256


class Writer(Protocol):
    """What continues texts of at most `context` tokens; `size` is in bytes of this machine."""

    @property
    def size(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def max_waiting(self) -> int: ...

    def start(self, asks: Sequence[Ask]) -> Answer:
        """Begin to answer. Raises Full: too many wait already."""
        ...

    def check(self) -> None:
        """Raises HeliostatError: it has ended."""
        ...


@dataclass(frozen=True)
class Language:
    """A loaded version; `end` is the token that closes a document."""

    version: Version
    runner: Writer
    tokenizer: Any
    end: int
    vocab: int
    longest_token: int  # in bytes of text
    chat: ChatFormat

    @property
    def size(self) -> int:
        return self.runner.size

    @property
    def context(self) -> int:
        return self.runner.context

    def encode(self, text: str) -> tuple[int, ...]:
        """The text's tokens, as those of a document in training: a special one is read as text."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def bytes_of(self, token: int) -> bytes:
        return spell_token(self.tokenizer, token)

    def spell(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")


def load_language(store: Store, version: Version, room: Room, pool: Executor) -> Language:
    """Load a version of kind gpt and let it write once.

    Raises:
        HeliostatError: it is of another kind, its weights or its tokenizer are missing or damaged,
            it makes of its examples something else than when it was published, or nothing finite.
    """
    predictor = load_predictor(store, version)
    features, network = predictor.features, predictor.network
    assert isinstance(features, BlockFeatures)
    if not isinstance(network, Gpt):
        raise HeliostatError(f"{version.ref} is a custom network: texts are continued by kind gpt")
    examples.check(store, version, predictor)
    engine = build_engine(network, room, features.length)
    smoke(version.ref, engine)
    return make_language(store, version, Runner(engine, pool))


def make_language(store: Store, version: Version, runner: Writer) -> Language:
    """Raises HeliostatError: the tokenizer is missing or damaged."""
    features = features_from_json(version.features)
    assert isinstance(features, BlockFeatures)
    tokenizer = load_tokenizer(store, features.tokenizer)
    return Language(
        version,
        runner,
        tokenizer,
        features.end,
        features.vocab,
        max(features.token_bytes),
        find_chat(features, tokenizer),
    )


def find_chat(features: BlockFeatures, tokenizer: Any) -> ChatFormat:
    if not features.chat_template:
        return PlainLines(tokenizer)
    return Template(features.chat_template, tokenizer, tokenizer.id_to_token(features.end))


def build_engine(network: Gpt, room: Room, length: int) -> Engine:
    context = room.context or length
    decoder = Decoder(network, room.streams, context)
    return Engine(decoder, Scheduler(room.streams, context, room.waiting))


def smoke(ref: str, engine: Engine) -> None:
    """Raises HeliostatError: the model does not continue the text of one token."""
    if not torch.isfinite(engine.decoder.prefill(0, [[0]])).all():
        raise HeliostatError(f"{ref} does not continue a text: its logits are not finite")
    engine.generate([Ask((0,), min(SMOKE_TOKENS, engine.decoder.context - 1))])
