"""OpenAI's protocol as its own client sees it, over a real server; and bodies that are refused."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import APIStatusError, NotFoundError, OpenAI, UnprocessableEntityError
from starlette.applications import Starlette

from heliostat.data.features import TextFeatures, features_to_json
from heliostat.evaluate import Predictor
from heliostat.models import build, task_of
from heliostat.serve.app import build_app
from heliostat.serve.door import Limits
from heliostat.serve.engine.ask import Ask, Sampling
from heliostat.serve.events import EventStream, to_event
from heliostat.serve.language import Language
from heliostat.serve.shelf import Loaded, Served, Shelf
from heliostat.signature import Signature
from heliostat.spec import EncoderSpec
from serving import LIMITS, OUTPUT, Client, check_error, serve
from serving import TABLE as PEOPLE
from writing import BLOCKS, LENGTH, VOCAB, engine_of, hold, make_engine, make_language

PROMPT = "a field of mirrors"
LANGUAGE = make_language()
PEOPLE_MODEL = serve("people", PEOPLE)
TOKENS = LANGUAGE.encode(PROMPT)


def make_encoder() -> Served:
    features = TextFeatures(16, VOCAB, "0" * 64)
    model = EncoderSpec(kind="encoder", layers=1, width=16, heads=2)
    from heliostat.data.features import input_of

    signature = Signature(input_of(features), OUTPUT)
    torch.manual_seed(0)
    network = build(model, signature).eval()
    predictor = Predictor(network, task_of(model, signature), features, OUTPUT, LANGUAGE.tokenizer)
    version = replace(PEOPLE_MODEL.version, name="encoder", features=features_to_json(features))
    return Served(version, predictor)


ENCODER = make_encoder()


def make_app(language: Language, limits: Limits = LIMITS) -> Starlette:
    models: dict[str, Loaded] = {
        "rays": language,
        "people": PEOPLE_MODEL,
        "encoder": ENCODER,
    }
    versions = {name: [loaded.version] for name, loaded in models.items()}
    return build_app(Shelf(versions, lambda v: models[v.name], max_bytes=2**30), limits)


def generate(prompt: tuple[int, ...], tokens: int, **sampling: Any) -> list[int]:
    """What the engine says without HTTP."""
    ask = Ask(prompt, tokens, frozenset({BLOCKS.end}), Sampling(**sampling))
    return make_engine().generate([ask])[0]


def spell(tokens: list[int]) -> str:
    text: str = LANGUAGE.tokenizer.decode([*TOKENS, *tokens])
    return text[len(PROMPT) :]


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    """The real client of a real server over a socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    limits = Limits(max_body_bytes=200_000, max_requests=32, request_timeout_s=60)
    config = uvicorn.Config(make_app(LANGUAGE, limits), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0) as openai:
        yield openai
    server.should_exit = True
    thread.join()


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["rays", "people", "encoder"]
    assert client.models.retrieve("people").id == "people"


def test_a_completion_is_what_the_engine_says(client: OpenAI) -> None:
    answer = client.completions.create(model="rays", prompt=PROMPT, temperature=0, max_tokens=9)
    made = generate(TOKENS, 9, temperature=0)
    assert answer.choices[0].text == spell(made)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TOKENS), 9)
    by_tokens = client.completions.create(
        model="rays:2", prompt=list(TOKENS), temperature=0, max_tokens=9
    )
    assert by_tokens.choices[0].text == answer.choices[0].text


def test_what_is_null_is_left_out_also_in_a_turn(client: OpenAI) -> None:
    """As a client writes an answer back into the chat."""
    turn: Any = {"role": "user", "content": "a field of", "refusal": None, "tool_calls": None}
    body = {"tools": None, "response_format": {"type": "text"}, "parallel_tool_calls": None}
    answer = client.chat.completions.create(
        model="rays", messages=[turn], max_tokens=2, extra_body=body
    )
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("version", ["latest", "v2", "-1", "1:2", "01", "1234567890", ""])
def test_what_is_no_version_of_a_model_is_not_found(client: OpenAI, version: str) -> None:
    with pytest.raises(NotFoundError):
        client.completions.create(model=f"rays:{version}", prompt="a", max_tokens=1)


def test_a_seed_repeats_and_choices_differ(client: OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(
            model="rays", prompt=[PROMPT, "rays"], n=3, seed=5, max_tokens=8, temperature=1.5
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(TOKENS) + len(LANGUAGE.encode("rays"))
        return [choice.text for choice in answer.choices]

    texts = ask()
    assert ask() == texts
    assert len(set(texts)) == 6


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_same_in_pieces(client: OpenAI, n: int) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "n": n, "seed": 5, "max_tokens": 12}
    whole = client.completions.create(model="rays", logprobs=2, **options)
    texts, tokens = [""] * n, [list[str]() for _ in range(n)]
    offsets = [list[int]() for _ in range(n)]
    usage, finishes = None, set()
    stream = client.completions.create(
        model="rays",
        stream=True,
        stream_options={"include_usage": True},
        logprobs=2,
        **options,
    )
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens or []
                offsets[choice.index] += choice.logprobs.text_offset or []
            if choice.finish_reason:
                finishes.add(choice.index)
    assert texts == [choice.text for choice in whole.choices]
    for choice, told, places in zip(whole.choices, tokens, offsets, strict=True):
        assert choice.logprobs is not None
        assert told == choice.logprobs.tokens
        assert places == choice.logprobs.text_offset
        assert len(places) == len(told)
        assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs or [])
    assert finishes == set(range(n))
    assert usage == whole.usage


def test_a_chat_is_a_plain_text_where_there_is_no_template(client: OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "rays"},
        {"role": "user", "content": [{"type": "text", "text": "tower"}]},
    ]
    answer = client.chat.completions.create(
        model="rays",
        messages=messages,
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    prompt = LANGUAGE.encode("system: rays\nuser: tower\nassistant:")
    made = generate(prompt, 6, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    spelled = [LANGUAGE.spell(token) for token in made]
    assert [token.token for token in choice.logprobs.content] == spelled
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
    stream = client.chat.completions.create(
        model="rays", messages=messages, max_tokens=6, temperature=0, stream=True
    )
    deltas = [event.choices[0].delta for event in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content


def test_a_stop_ends_the_text_before_it(client: OpenAI) -> None:
    made = generate(TOKENS, 30, temperature=0)
    text = spell(made)
    stop = text[7:9]
    answer = client.completions.create(
        model="rays", prompt=PROMPT, temperature=0, max_tokens=30, stop=[stop, "never there"]
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 30


def test_an_embedding_has_unit_length_and_is_the_encoders(client: OpenAI) -> None:
    texts = ["rays of a tower", "mirrors"]
    answer = client.embeddings.create(model="encoder", input=texts)
    network: Any = ENCODER.predictor.network
    for text, found in zip(texts, answer.data, strict=True):
        ids = torch.tensor([LANGUAGE.encode(text)])
        with torch.inference_mode():
            vector = network.embed(ids, torch.tensor([ids.shape[1]]))[0].numpy()
        assert np.allclose(found.embedding, vector / np.linalg.norm(vector), atol=1e-5)
    plain = client.embeddings.create(model="encoder", input=texts[0], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, answer.data[0].embedding)
    with pytest.raises(UnprocessableEntityError, match="19 tokens, the model reads 16") as refused:
        client.embeddings.create(model="encoder", input=["rays", "0" * 19])
    assert refused.value.body["field"] == "input[1]"  # type: ignore[index]


def test_the_client_reads_errors(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="there is no such model"):
        client.completions.create(model="nobody", prompt="x")
    with pytest.raises(UnprocessableEntityError) as refused:
        client.completions.create(model="rays", prompt=PROMPT, max_tokens=10**9)
    assert refused.value.type == "invalid_value"
    room = LENGTH - len(TOKENS)
    for number in (10**9, len(TOKENS), room, LENGTH):
        assert f"{number:,}" in refused.value.message or str(number) in refused.value.message


COMPLETION = "/v1/completions"
HERE = Client(make_app(LANGUAGE, Limits(200_000, 4, 5)))
NO_COUNT: list[Any] = [-1, 0, 1.5, "5", 10**9, True, []]
REFUSED: list[tuple[str, Any, str]] = [
    *(("max_tokens", value, "max_tokens") for value in NO_COUNT),
    *(("n", value, "n") for value in (0, 10**6, 1.0)),
    *(("temperature", value, "temperature") for value in (-1, 1e308, float("nan"), "1", True)),
    *(("top_k", value, "top_k") for value in (10**9, -2, 1.5)),
    *(("top_p", value, "top_p") for value in (0, 1.1, -1)),
    *(("repetition_penalty", value, "repetition_penalty") for value in (0, -1, 1e9)),
    ("seed", 2**64, "seed"),
    ("seed", 2**63, "seed"),
    ("stop", ["x"] * 10**4, "stop"),
    ("stop", [""], "stop[0]"),
    ("stop", ["x" * 1000], "stop[0]"),
    ("stop", 5, "stop"),
    ("stop_token_ids", [VOCAB], "stop_token_ids[0]"),
    ("logprobs", 10**6, "logprobs"),
    ("logprobs", -1, "logprobs"),
    ("frequency_penalty", 0.5, "frequency_penalty"),
    ("logit_bias", {"5": 1.0}, "logit_bias"),
    ("prompt", "", "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [[]], "prompt[0]"),
    ("prompt", [1, VOCAB], "prompt[1]"),
    ("prompt", [1, -1], "prompt[1]"),
    ("prompt", [1, "x"], "prompt[0]"),
    ("prompt", ["x", None], "prompt[1]"),
    ("prompt", ["x"] * 1000, "prompt"),
    ("prompt", None, "prompt"),
    ("prompt", [1] * LENGTH, "prompt"),
    ("prompt", "0" * LENGTH, "prompt"),
    ("prompt", "0" * 10**4, "prompt"),
    ("stream_options", {"x": 1}, "stream_options.x"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("surprise", 1, "surprise"),
    ("model", 5, "model"),
]


@pytest.mark.parametrize(("key", "value", "field"), REFUSED)
def test_what_the_engine_cannot_do_is_refused_by_its_field(
    key: str, value: Any, field: str
) -> None:
    body = json.dumps({"model": "rays", "prompt": "x", "max_tokens": 2} | {key: value})
    response = HERE.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    error = check_error(response)
    assert error["field"] == field
    assert error["message"].startswith(field)
    assert len(error["message"]) <= 400
    answered = HERE.post(COMPLETION, json={"model": "rays", "prompt": "x", "max_tokens": 2})
    assert answered.status_code == 200


def test_alternatives_without_log_probabilities_are_refused() -> None:
    chat = {"model": "rays", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
    response = HERE.post("/v1/chat/completions", json=chat)
    assert response.status_code == 422
    assert check_error(response)["field"] == "top_logprobs"


def test_a_long_prompt_is_refused_with_both_numbers() -> None:
    tokens = LANGUAGE.encode("0" * LENGTH)
    response = HERE.post(COMPLETION, json={"model": "rays", "prompt": "0" * LENGTH})
    message = check_error(response)["message"]
    assert str(len(tokens)) in message
    assert str(LENGTH) in message


@pytest.mark.parametrize(
    ("path", "document"),
    [
        (COMPLETION, {"model": "people", "prompt": "x"}),
        ("/v1/models/rays:predict", {"instances": ["x"]}),
        ("/v1/embeddings", {"model": "people", "input": "x"}),
        ("/v1/embeddings", {"model": "rays", "input": "x"}),
    ],
)
def test_a_model_of_another_kind_is_422(path: str, document: Any) -> None:
    response = HERE.post(path, json=document)
    assert response.status_code == 422
    assert check_error(response)["field"] == "model"


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("text/plain", b"{}", 415),
        ("application/json", b"{", 400),
        ("application/json", b"\xff", 400),
        ("application/json", b'{"prompt": "\\ud800"}', 400),
        ("application/json", b"[" * 10_000, 400),
        ("application/json", b"1" * 5000, 400),
        ("application/json", b"[]", 422),
    ],
)
def test_what_is_no_object_is_refused(content_type: str, body: bytes, status: int) -> None:
    response = HERE.post(COMPLETION, content=body, headers={"content-type": content_type})
    assert response.status_code == status
    check_error(response)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.integers(0, 4)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=6,
)
keys = [*{key for key, _, _ in REFUSED}, "user", "ignore_eos", "stream", "messages", "echo"]
bodies = st.dictionaries(st.sampled_from(keys), values, max_size=4)


@given(path=st.sampled_from([COMPLETION, "/v1/chat/completions", "/v1/embeddings"]), body=bodies)
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_no_body_makes_the_server_fail(path: str, body: dict[str, Any]) -> None:
    given_body = {"model": "rays", "prompt": "x", "max_tokens": 2} | body
    response = HERE.post(
        path,
        content=json.dumps(given_body).encode(),
        headers={"content-type": "application/json"},
    )
    assert response.status_code < 500, response.text


class Reader:
    """The client's side of one request, by hand: it reads when told to, and leaves when told to."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.body = json.dumps(document).encode()
        self.sent: list[MutableMapping[str, Any]] = []
        self.read, self.left, self.first = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.asked = False

    async def receive(self) -> dict[str, Any]:
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.first.set()
            await self.read.wait()


def scope() -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": COMPLETION,
        "raw_path": COMPLETION.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_step(stream: bool) -> None:
    language = make_language()
    pool = hold(language)
    document = {"model": "rays", "prompt": "x", "max_tokens": 40, "stream": stream}
    reader = Reader(document | {"ignore_eos": True})
    reader.read.set()

    async def run() -> None:
        call = asyncio.ensure_future(make_app(language)(scope(), reader.receive, reader.send))
        while not pool.held:
            await asyncio.sleep(0)
        for _ in range(3):
            pool.step()
            await asyncio.sleep(0)
        if stream:
            await reader.first.wait()
        assert engine_of(language).scheduler.running
        reader.left.set()
        await call
        pool.step()
        assert not engine_of(language).scheduler.running
        assert not pool.held

    asyncio.run(run())


def test_a_reader_who_makes_no_room_is_cut() -> None:
    closed = asyncio.Event()

    async def events() -> Any:
        try:
            while True:
                yield to_event({"text": "x"})
        finally:
            closed.set()

    async def run() -> None:
        reader = Reader({})
        await EventStream(events(), patience_s=0)(scope(), reader.receive, reader.send)
        assert [message["type"] for message in reader.sent] == [
            "http.response.start",
            "http.response.body",
        ]
        assert closed.is_set()

    asyncio.run(run())


def test_more_than_may_wait_is_429_and_the_next_one_is_answered() -> None:
    language = make_language(slots=1, max_waiting=3)
    client = Client(make_app(language))
    body = {"model": "rays", "prompt": "x", "max_tokens": 2}
    response = client.post(COMPLETION, json=body | {"n": 4})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    check_error(response)
    assert client.post(COMPLETION, json=body | {"n": 3}).status_code == 200


def test_an_engine_that_fails_fails_its_requests_and_goes_on() -> None:
    language = make_language()
    client = Client(make_app(language))
    engine = engine_of(language)
    body = {"model": "rays", "prompt": "x", "max_tokens": 2}
    caches = engine.decoder.caches
    engine.decoder.caches = [cache[:0] for cache in caches]
    response = client.post(COMPLETION, json=body)
    assert response.status_code == 500
    check_error(response)
    engine.decoder.caches = caches
    assert client.post(COMPLETION, json=body).status_code == 200


def test_a_status_error_has_the_id_of_its_request(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as refused:
        client.completions.create(model="rays", prompt="")
    assert refused.value.request_id == refused.value.body["request_id"]  # type: ignore[index]
