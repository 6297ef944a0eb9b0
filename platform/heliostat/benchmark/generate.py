"""Tokens per second over HTTP on one small Llama: Heliostat, vLLM's CPU build, transformers."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import aiohttp
import torch
from torch import nn

from heliostat import storage
from heliostat.benchmark.published import publish
from heliostat.benchmark.servers import find_port, pause, run_server
from heliostat.data.features import BlockFeatures
from heliostat.data.tokens import Vocabulary, describe_tokenizer, learn_tokenizer, store_tokenizer
from heliostat.errors import HeliostatError
from heliostat.export import export_hf
from heliostat.models import build, count_parameters
from heliostat.registry import Version
from heliostat.signature import Blocks, NextToken, Signature
from heliostat.spec import GptSpec

SPEC = GptSpec(kind="gpt", layers=5, width=256, heads=8, kv_heads=4, init=None)
VOCAB, CONTEXT = 4608, 256
STD = 0.1  # weights so large that two implementations choose the same likeliest tokens
STREAMS = (1, 8, 32)
PROMPT_TOKENS, NEW_TOKENS = 32, 128
ANSWER_SECONDS = 300.0
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
PEERS = Path(os.environ.get("HELIOSTAT_PEERS", "/tmp/heliostat-peers"))

Prompt = list[int]


@dataclass(frozen=True)
class Reading:
    """Of a load of so many streams at once: `ttft_ms` is the median over the streams."""

    tokens_per_second: float
    ttft_ms: float | None


@dataclass(frozen=True)
class Outcome:
    """Readings by peer and number of streams, the best of all rounds; None: it is not installed."""

    readings: dict[str, dict[int, Reading] | None]
    startup_seconds: dict[str, float | None]
    texts: dict[str, str]


def measure(repeats: int, report: Callable[[str], None]) -> Outcome:
    """Each peer serves the same weights, and all take turns: who is not asked stands still."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        version, store = publish_llama(Path(folder, "bucket"))
        layout = Path(folder, "llama")
        export_hf(store, version, storage.connect(str(layout)))
        startup: dict[str, float | None] = dict.fromkeys(["heliostat", "vllm", "transformers"])
        urls: dict[str, str] = {}
        groups: dict[str, int] = {}
        for name, command in commands(store.uri, version.ref, layout).items():
            if shutil.which(command[0]):
                port = find_port()
                log = Path(folder, f"{name}.log")
                began = time.perf_counter()
                urls[name] = f"http://127.0.0.1:{port}"
                server = run_server([*command, str(port)], f"{urls[name]}/v1/models", log, QUIET)
                groups[name] = stack.enter_context(server)
                startup[name] = time.perf_counter() - began
                report(f"{name} answers after {startup[name]:.1f} s")
        found: dict[str, dict[int, list[Reading]]] = {}
        texts = {name: asyncio.run(complete(url)) for name, url in urls.items()}
        static = load_transformers(layout)
        for streams in STREAMS:
            for _ in range(repeats):
                for name, url in urls.items():
                    with pause(group for other, group in groups.items() if other != name):
                        reading = asyncio.run(load_server(url, streams))
                    found.setdefault(name, {}).setdefault(streams, []).append(reading)
                if static:
                    with pause(groups.values()):
                        reading = load_static(static, streams)
                    found.setdefault("transformers", {}).setdefault(streams, []).append(reading)
        readings = {
            name: {streams: best(found[name][streams]) for streams in STREAMS}
            if name in found
            else None
            for name in startup
        }
        return Outcome(readings, startup, texts)


def commands(root: str, ref: str, layout: Path) -> dict[str, list[str]]:
    """How each server is started; the port is put after it."""
    streams = str(max(STREAMS))
    return {
        "heliostat": [
            *(sys.executable, "-m", "heliostat.benchmark.one_model", root, ref, streams),
        ],
        "vllm": [
            *(str(PEERS / "bin/vllm"), "serve", str(layout), "--served-model-name", "benchmark"),
            *("--dtype", "float32", "--max-model-len", str(CONTEXT)),
            *("--max-num-seqs", streams, "--no-enable-prefix-caching", "--port"),
        ],
    }


def publish_llama(root: Path) -> tuple[Version, storage.Store]:
    """A Llama of some 4.9 M parameters, with random weights and a tokenizer of English."""
    store = storage.connect(str(root))
    tokenizer = learn_tokenizer(topics.values(), VOCAB)
    known = describe_tokenizer(tokenizer, {}, "the benchmark's tokenizer")
    store_tokenizer(store, tokenizer)
    network = build_network(known)
    features = BlockFeatures(CONTEXT, known.size, known.end, known.sha256, known.token_bytes)
    return publish(store, "benchmark", SPEC, features, NextToken(), network), store


def build_network(known: Vocabulary) -> nn.Module:
    torch.manual_seed(0)
    network = build(SPEC, Signature(Blocks(CONTEXT, known.size, known.end), NextToken()))
    for parameter in network.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=STD)
    print(f"{count_parameters(network):,} parameters", flush=True)
    return network


def make_prompts(count: int) -> list[Prompt]:
    generator = torch.manual_seed(count)
    return torch.randint(300, VOCAB, (count, PROMPT_TOKENS), generator=generator).tolist()


def ask_for(prompt: Prompt) -> dict[str, Any]:
    return {
        "model": "benchmark",
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


async def complete(url: str) -> str:
    """A greedy text, which all peers should agree upon; the servers are warm then."""
    timeout = aiohttp.ClientTimeout(ANSWER_SECONDS)
    async with (
        aiohttp.ClientSession(timeout=timeout) as http,
        http.post(f"{url}/v1/completions", json=ask_for(make_prompts(1)[0])) as response,
    ):
        answer = await response.json()
    text: str = answer["choices"][0]["text"]
    return text


async def load_server(url: str, streams: int) -> Reading:
    connector = aiohttp.TCPConnector(limit=streams)
    timeout = aiohttp.ClientTimeout(ANSWER_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        began = time.perf_counter()
        read = await asyncio.gather(*(read_stream(http, url, p) for p in make_prompts(streams)))
        seconds = time.perf_counter() - began
    tokens = sum(tokens for tokens, _ in read)
    return Reading(tokens / seconds, 1000 * median(ttft for _, ttft in read))


async def read_stream(http: aiohttp.ClientSession, url: str, prompt: Prompt) -> tuple[int, float]:
    """Tokens by the server's own count, and seconds to the first event."""
    body = ask_for(prompt) | {"stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    ttft, last = None, b""
    async with http.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise HeliostatError(f"{url} answers {response.status}: {await response.text():.300}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                ttft = ttft or time.perf_counter() - began
                last = line
    assert ttft is not None
    return json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"], ttft


def load_transformers(layout: Path) -> Any:
    """The same weights in transformers, or None where it is not installed."""
    if find_spec("transformers") is None:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(layout).eval()


@torch.inference_mode()
def load_static(llama: Any, streams: int) -> Reading:
    """One batch from its first to its last token, in this process, without HTTP."""
    tokens = torch.tensor(make_prompts(streams))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    began = time.perf_counter()
    made = llama.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
    seconds = time.perf_counter() - began
    return Reading(made[:, PROMPT_TOKENS:].numel() / seconds, None)


def best(readings: Sequence[Reading]) -> Reading:
    return max(readings, key=lambda reading: reading.tokens_per_second)
