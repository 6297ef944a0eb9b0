"""Small language models with their tokenizer, as the engine and the protocol serve them."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from drafting import draft, version
from heliostat import registry
from heliostat.data.features import BlockFeatures
from heliostat.data.tokens import END, describe_tokenizer, learn_tokenizer, parse_tokenizer
from heliostat.models import build
from heliostat.models.gpt import Gpt
from heliostat.registry import Version
from heliostat.serve.engine.decoder import Decoder
from heliostat.serve.engine.engine import Engine
from heliostat.serve.engine.runner import Runner
from heliostat.serve.engine.scheduler import Scheduler
from heliostat.serve.language import Language, find_chat
from heliostat.signature import Blocks, NextToken, Signature
from heliostat.spec import GptSpec, RopeScalingSpec, dump, parse
from heliostat.storage import Store

os.environ["HF_HUB_OFFLINE"] = "1"

TEXTS = ["a field of mirrors turns many rays to one tower", "rays, mirrors, tower; à l'été ☀"] * 4
TOKENIZER = learn_tokenizer(TEXTS, 300)
VOCABULARY = describe_tokenizer(TOKENIZER, {}, END)
VOCAB, LENGTH = VOCABULARY.size, 48
BLOCKS = Blocks(LENGTH, VOCAB, VOCABULARY.end)
SPECS = {
    "tied": GptSpec(kind="gpt", layers=2, width=48, heads=4),
    "grouped, untied": GptSpec(
        kind="gpt", layers=2, width=60, heads=6, kv_heads=2, ffn=70, tied=False, norm_eps=1e-3
    ),
    "stretched": GptSpec(
        kind="gpt",
        layers=1,
        width=42,
        heads=3,
        kv_heads=1,
        rope_theta=500_000.0,
        rope_scaling=RopeScalingSpec(factor=8.0, original_positions=16),
    ),
}


def build_loud(spec: GptSpec) -> Gpt:
    """A network with weights so large that its choices are far apart."""
    torch.manual_seed(0)
    network = build(spec, Signature(BLOCKS, NextToken())).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 2 else 1.0)
    assert isinstance(network, Gpt)
    return network


NETWORKS = {name: build_loud(spec) for name, spec in SPECS.items()}


def make_engine(
    name: str = "tied",
    slots: int = 4,
    context: int = LENGTH,
    max_waiting: int = 64,
    clock: Callable[[], float] = time.perf_counter,
) -> Engine:
    decoder = Decoder(NETWORKS[name], slots, context)
    return Engine(decoder, Scheduler(slots, context, max_waiting), clock)


def make_language(
    name: str = "tied", slots: int = 4, max_waiting: int = 64, chat_template: str = ""
) -> Language:
    features = BlockFeatures(
        LENGTH,
        VOCAB,
        VOCABULARY.end,
        VOCABULARY.sha256,
        VOCABULARY.token_bytes,
        chat_template,
    )
    tokenizer = parse_tokenizer(TOKENIZER, "the tests")
    return Language(
        version("rays", 2, features, NextToken()),
        Runner(make_engine(name, slots, LENGTH, max_waiting), ThreadPoolExecutor(1)),
        tokenizer,
        VOCABULARY.end,
        VOCAB,
        max(VOCABULARY.token_bytes),
        find_chat(features, tokenizer),
    )


def engine_of(language: Language) -> Engine:
    assert isinstance(language.runner, Runner)
    return language.runner.engine


def publish(store: Store, weights: dict[str, Tensor], run: str = "run-1") -> Version:
    """rays:1 with these weights, the next one of another run; the store has TOKENIZER already."""
    features = BlockFeatures(
        LENGTH, VOCAB, VOCABULARY.end, VOCABULARY.sha256, VOCABULARY.token_bytes
    )
    model = SPECS["tied"].model_dump()
    spec = parse({"name": "rays", "data": {"source": "s3://raw/rays"}, "model": model})
    made = draft("rays", features, NextToken(), spec=dump(spec), run=run)
    return registry.publish(store, made, safetensors.torch.save(weights))


class Held:
    """A pool whose work waits until it is let go, so that a test says which step comes when."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def submit(self, function: Any, *arguments: Any) -> None:
        self.held.append((function, arguments))

    def step(self) -> None:
        function, arguments = self.held.pop(0)
        function(*arguments)


def hold(language: Language) -> Held:
    held = Held()
    language.runner._pool = held  # type: ignore[attr-defined]
    return held
