"""vLLM behind the same protocol: how it is started, what it is asked, and that it ends in time.

A stand-in speaks for it: a program that serves the same HTTP API from the same files. What is asked
of it here was asked of vLLM itself by hand.
"""

import asyncio
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import writing
from heliostat import examples, storage
from heliostat.data.features import TOKENS, BlockFeatures, features_from_json
from heliostat.data.tokens import store_tokenizer
from heliostat.errors import HeliostatError
from heliostat.evaluate import load_predictor
from heliostat.registry import Version
from heliostat.serve import leash
from heliostat.serve.app import build_app
from heliostat.serve.door import Limits
from heliostat.serve.engine.ask import Ask, Sampling
from heliostat.serve.engine.runner import Answer, Failed
from heliostat.serve.engine.sampler import Token
from heliostat.serve.language import Language, Room
from heliostat.serve.remote import Remote, read_tokens, write_ask
from heliostat.serve.replies import Refusal
from heliostat.serve.shelf import Shelf, load
from heliostat.serve.vllm import check_examples, load_vllm, split_documents
from heliostat.serve.vllm_server import Launch, Server, find_cause
from heliostat.spec import VllmSpec
from heliostat.storage import Store
from serving import Client, check_error

WaitUntil = Callable[..., None]
STANDIN = Path(__file__).parent.parent / "standin.py"
ROOM = Room(streams=2, context=None, waiting=4)
LIMITS = Limits(max_body_bytes=20_000, max_requests=16, request_timeout_s=60)
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
LAUNCH = Launch("/tmp/x", VllmSpec(program="/opt/vllm/bin/vllm"), 256, 8, key="secret")


def test_it_is_told_what_the_deploy_says_and_nothing_that_others_could_read() -> None:
    assert LAUNCH.command == [
        *("/opt/vllm/bin/vllm", "serve", "/tmp/x/model"),
        *("--uds", "/tmp/x/socket", "--dtype", "auto"),
        *("--max-model-len", "256", "--max-num-seqs", "8", "--max-logprobs", "20"),
        *("--generation-config", "vllm", "--load-format", "safetensors"),
        *("--uvicorn-log-level", "warning"),
    ]
    settings = VllmSpec(dtype="bfloat16", memory_share=0.8, arguments=("--quantization", "fp8"))
    command = replace(LAUNCH, settings=settings, gpus=4).command
    assert command[:5] == ["vllm", "serve", "/tmp/x/model", "--quantization", "fp8"]
    assert command[-4:] == ["--tensor-parallel-size", "4", "--gpu-memory-utilization", "0.8"]
    assert "secret" not in " ".join(LAUNCH.command) + repr(LAUNCH)
    assert Launch("/tmp/x", VllmSpec(), 256, 8).key != Launch("/tmp/x", VllmSpec(), 256, 8).key


def test_it_sees_its_devices_and_nothing_of_ray_of_the_bucket_or_of_this_python() -> None:
    passed = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "VLLM_CPU_KVCACHE_SPACE": "1"}
    kept = {"PYTHONPATH": "/p", "AWS_SECRET_ACCESS_KEY": "s", "RAY_AUTH_TOKEN_PATH": "/t"}
    environment = LAUNCH.make_environment({**passed, **kept, "OMP_NUM_THREADS": "1"})
    assert passed.items() <= environment.items()
    assert environment["VLLM_API_KEY"] == "secret"
    assert not environment.keys() & {*kept, "OMP_NUM_THREADS"}
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"


def test_an_ask_is_all_that_decides_a_text() -> None:
    sampling = Sampling(0.5, 7, 0.9, 1.2, seed=-1, logprobs=2)
    body = write_ask(Ask((5, 6), 9, frozenset({3, 1}), sampling))
    assert (
        body.items()
        >= {
            "prompt": (5, 6),
            "max_tokens": 9,
            "stop_token_ids": [1, 3],
            "ignore_eos": True,
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.9,
            "repetition_penalty": 1.2,
            "seed": 2**63 - 1,  # vLLM takes -1 for none
            "logprobs": 2,
        }.items()
    )
    assert write_ask(Ask((5,), 1, sampling=Sampling(1e-9)))["temperature"] == 0


def test_tokens_are_read_with_the_likeliest_beside_them() -> None:
    ask = Ask((5,), 4, sampling=Sampling(logprobs=1))
    told = {
        "tokens": ["token_id:9", "token_id:2"],
        "token_logprobs": [-3.0, -0.1],
        "top_logprobs": [{"token_id:9": -3.0, "token_id:4": -0.2}, {"token_id:2": -0.1}],
    }
    event = {"choices": [{"token_ids": [9, 2], "logprobs": told}]}
    tokens = [Token(9, -3.0, ((4, -0.2),)), Token(2, -0.1, ((2, -0.1),))]
    assert list(read_tokens(event, ask)) == tokens
    assert list(read_tokens(event, Ask((5,), 4))) == [Token(9), Token(2)]
    with pytest.raises(Failed, match="out of memory"):
        list(read_tokens({"error": {"message": "out of memory"}}, ask))


def test_the_cause_is_the_first_error_and_not_what_follows_from_it() -> None:
    lines = ["INFO x", "(EngineCore pid=7) ValueError: no room", "RuntimeError: see above"]
    assert find_cause(lines) == "ValueError: no room"
    assert find_cause(["killed by", "the kernel", ""]) == "the kernel"
    assert find_cause([]) == "it said nothing"


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=3))
def test_documents_are_the_blocks_cut_behind_their_ends(blocks: list[list[int]]) -> None:
    documents = list(split_documents(blocks, end=0))
    assert all(len(one) > 1 and 0 not in one[:-1] for one in documents)
    pairs = [(a, b) for one in documents for a, b in pairwise(one)]
    assert pairs == [(a, b) for block in blocks for a, b in pairwise(block) if a != 0]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bin") / "vllm"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDIN} "$@"\n')
    path.chmod(0o700)
    return str(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Version]:
    """A version with examples in which documents end."""
    store = storage.connect(str(tmp_path_factory.mktemp("root")))
    store_tokenizer(store, writing.TOKENIZER)
    version = writing.publish(store, writing.NETWORKS["tied"].state_dict())
    record_examples(store, version)
    return store, version


def record_examples(store: Store, version: Version) -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(1, writing.VOCAB, (3, writing.LENGTH)).astype(np.uint16)
    blocks[0, 7] = blocks[0, 8] = blocks[1, 20] = writing.VOCABULARY.end
    rows = pa.table({TOKENS: pa.array([b.tobytes() for b in blocks], pa.binary(blocks[0].nbytes))})
    examples.record(store, version, load_predictor(store, version), rows)


@pytest.fixture(scope="module")
def language(program: str, published: tuple[Store, Version]) -> Iterator[Language]:
    settings = VllmSpec(program=program, dtype="float32")
    language = load(*published, ROOM, load_text=partial(load_vllm, settings=settings))
    assert isinstance(language, Language)
    yield language
    find_server(language).end()


@pytest.fixture(scope="module")
def own(published: tuple[Store, Version]) -> Language:
    language = load(*published, ROOM)
    assert isinstance(language, Language)
    return language


def find_server(language: Language) -> Server:
    assert isinstance(language.runner, Remote)
    server: Server = language.runner.check.__self__  # type: ignore[attr-defined]
    return server


def ask(language: Language, path: str, body: dict[str, Any]) -> httpx.Response:
    shelf = Shelf({"rays": [language.version]}, lambda version: language, 2**30)
    return Client(build_app(shelf, LIMITS)).post(path, json={"model": "rays", **body})


def read(response: httpx.Response) -> Any:
    """The answer without what differs from one to the next."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        *events, done = response.text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        pieces = [json.loads(event.removeprefix("data: ")) for event in events]
        texts: dict[int, str] = {}
        for choice in (choice for piece in pieces for choice in piece["choices"]):
            new = choice.get("text") or choice.get("delta", {}).get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + new
        return texts, pieces[-1].get("usage")
    answer = json.loads(response.content, parse_float=Rounded)
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


class Rounded(float):
    """A log probability, which is the same to others that are near it."""

    def __new__(cls, text: str) -> "Rounded":
        return super().__new__(cls, text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 1e-4

    __hash__ = None  # type: ignore[assignment]


SAME = {
    "greedy": (COMPLETION, {"prompt": "a field", "temperature": 0, "max_tokens": 12}),
    "tokens": (COMPLETION, {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 5}),
    "to an end": (COMPLETION, {"prompt": "rays", "temperature": 0, "stop_token_ids": [263, 13]}),
    "to a string": (COMPLETION, {"prompt": "a", "temperature": 0, "stop": ["t"], "max_tokens": 30}),
    "several": (COMPLETION, {"prompt": ["a", "mirrors"], "n": 2, "temperature": 0}),
    "told": (COMPLETION, {"prompt": "rays", "temperature": 0, "logprobs": 3, "max_tokens": 4}),
    "told itself": (COMPLETION, {"prompt": "rays", "temperature": 0, "logprobs": 0}),
    "stream": (COMPLETION, {"prompt": "rays", "temperature": 0, "stream": True, "n": 2}),
    "counted": (
        COMPLETION,
        {
            "prompt": "a",
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "chat": (
        CHAT,
        {"messages": [{"role": "user", "content": "rays"}], "temperature": 0, "max_tokens": 9},
    ),
    "chat stream": (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "temperature": 0, "stream": True},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_its_answers_are_those_of_the_own_engine(
    language: Language, own: Language, name: str
) -> None:
    path, body = SAME[name]
    assert read(ask(language, path, body)) == read(ask(own, path, body))


def test_a_seed_repeats_what_was_drawn(language: Language) -> None:
    body = {"prompt": "rays", "temperature": 1.5, "seed": 3, "n": 2, "max_tokens": 12}
    first, second = (read(ask(language, COMPLETION, body))["choices"] for _ in range(2))
    assert first == second
    assert first[0]["text"] != first[1]["text"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "rays", "max_tokens": 10**9}, 422),
        ({"prompt": [writing.VOCAB]}, 422),
        ({"prompt": "rays", "temperature": -1}, 422),
        ({"prompt": "rays", "n": 5}, 429),
    ],
)
def test_its_limits_are_those_of_the_own_engine(
    language: Language, own: Language, body: dict[str, Any], status: int
) -> None:
    answers = [ask(engine, COMPLETION, body) for engine in (language, own)]
    assert [answer.status_code for answer in answers] == [status, status]
    texts = [check_error(answer)["message"] for answer in answers]
    assert texts[0] == texts[1]
    assert ask(language, COMPLETION, {"prompt": "rays", "max_tokens": 1}).status_code == 200


def count_running(language: Language) -> int:
    transport = httpx.HTTPTransport(uds=find_server(language).launch.socket)
    with httpx.Client(transport=transport) as http:
        return int(http.get("http://vllm/metrics").text.split()[-1])


def test_who_leaves_ends_what_is_done_for_him(language: Language, wait_until: WaitUntil) -> None:
    asks = [Ask((5, 6), 40) for _ in range(4)]

    async def run() -> None:
        with language.runner.start(asks) as answer:
            await answer.take()
            assert await asyncio.to_thread(count_running, language) > 0
        await asyncio.to_thread(wait_until, lambda: count_running(language) == 0)
        with language.runner.start(asks) as answer:  # the places of the first are free again
            await answer.take()

    asyncio.run(run())


def test_one_that_ends_is_503_and_unhealthy_and_says_why(
    program: str, published: tuple[Store, Version], wait_until: WaitUntil
) -> None:
    language = load_vllm(*published, ROOM, VllmSpec(program=program))
    server = find_server(language)
    language.runner.check()

    async def run() -> None:
        with language.runner.start([Ask((5, 6), 40)]) as answer:
            await answer.take()
            find_program(server).send_signal(signal.SIGKILL)
            with pytest.raises(Refusal, match="broke off"):
                await take_all(answer)

    asyncio.run(run())
    response = ask(language, COMPLETION, {"prompt": "rays"})
    assert response.status_code == 503
    assert check_error(response)["message"] == "the engine of this model broke off, retry later"
    stream = ask(language, COMPLETION, {"prompt": "rays", "stream": True})
    assert stream.status_code == 503
    wait_until(lambda: server.process.poll() is not None)
    with pytest.raises(HeliostatError, match="vLLM ended with status 137: "):
        language.runner.check()
    assert not Path(server.launch.folder).exists()


async def take_all(answer: Answer) -> None:
    while await answer.take():
        pass


def test_one_that_says_nothing_any_more_is_unhealthy_until_it_does(
    language: Language, wait_until: WaitUntil
) -> None:
    server = find_server(language)
    server.pulse.heard = -math.inf
    with pytest.raises(HeliostatError, match="has not said for 60 s that it is well"):
        language.runner.check()
    wait_until(lambda: server.pulse.heard > 0)
    language.runner.check()


def find_program(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    (program,) = (child for child in children if leash.__file__ not in child.cmdline())
    return program


# Starts a leash with a pipe as a replica does, and waits to be killed.
HOLD = """
import subprocess, sys
leash = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE)
print(leash.pid, flush=True)
leash.wait()
"""


def write_program(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize("victim", ["holder", "leash"])
def test_it_ends_with_who_started_it_even_if_it_will_not(
    tmp_path: Path, wait_until: WaitUntil, victim: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    program = write_program(tmp_path / "vllm", "trap '' TERM", "sleep 600 &", "wait", "sleep 600")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, leash.__file__, str(folder), program], stdout=subprocess.PIPE
    )
    assert holder.stdout
    held = psutil.Process(int(holder.stdout.readline()))
    # The program, what it has started, and who ends both if this one cannot.
    wait_until(lambda: len(held.children(recursive=True)) == 3)
    family = [held, *held.children(recursive=True)]
    (held if victim == "leash" else holder).kill()
    holder.communicate()
    wait_until(lambda: not any(one.is_running() for one in family))
    assert not folder.exists()


def test_it_ends_when_nobody_holds_it_any_more(tmp_path: Path, wait_until: WaitUntil) -> None:
    program = write_program(tmp_path / "vllm", "exec sleep 600")
    server: Server | None = Server(replace(LAUNCH, settings=VllmSpec(program=program)))
    assert server
    process = server.process
    remote = Remote("", {}, server.check, size=1, context=8, slots=1, max_waiting=1)
    server = None
    remote.check()
    assert process.poll() is None
    del remote
    wait_until(lambda: process.poll() is not None)


@pytest.mark.parametrize(
    ("lines", "context", "sentence"),
    [
        (None, None, "/vllm is no program on node .*make vllm"),
        (["sleep 600"], 49, "max_context is 49, and vLLM takes at most the 48 tokens"),
        (
            ["echo 'INFO x'", "echo '(Core pid=7) ValueError: no room' >&2", "exit 3"],
            None,
            "vLLM ended with status 3: ValueError: no room",
        ),
    ],
)
def test_what_cannot_serve_is_a_sentence_and_leaves_nothing(
    tmp_path: Path,
    published: tuple[Store, Version],
    lines: list[str] | None,
    context: int | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    program = tmp_path / "vllm"
    if lines:
        write_program(program, *lines)
    wanted = VllmSpec(program=str(program))
    with pytest.raises(HeliostatError, match=sentence):
        load_vllm(*published, replace(ROOM, context=context), wanted)
    assert not list((tmp_path / "tmp").iterdir())


def test_a_version_that_it_answers_otherwise_is_refused(
    language: Language, published: tuple[Store, Version]
) -> None:
    """The server has the weights of the first version, and is asked whether it is the second."""
    store, first = published
    weights = writing.NETWORKS["tied"].state_dict()
    other = writing.publish(store, {name: tensor * 1.01 for name, tensor in weights.items()})
    record_examples(store, other)
    features = features_from_json(first.features)
    assert isinstance(features, BlockFeatures)
    check_examples(store, first, features, find_server(language))
    with pytest.raises(HeliostatError, match="rays:2 answers its examples otherwise"):
        check_examples(store, other, features, find_server(language))
