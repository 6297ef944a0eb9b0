"""A candidate beside what is served: what it does is never the client's loss."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serve.app import build_app
from heliostat.serve.delivery import Tally
from heliostat.serve.fork import Ask, Call, Fork, Side, replay
from heliostat.serve.gate import ANYBODY, VISIT, Visit
from heliostat.serve.presence import Presence
from heliostat.serve.shelf import Shelf
from heliostat.serve.table import Candidate
from heliostat.spec import CandidateSpec
from serving import LIMITS, ROWS, TABLE, Client, check_error, make_app, serve
from writing import engine_of, hold, make_language

PATH = "/v1/models/people:predict"
SERVED = make_app({"people": serve("people", TABLE, 1)}, LIMITS)
NEXT = make_app({"people": serve("people", TABLE, 2)}, LIMITS)


class Counts:
    """What a fork tells of the requests."""

    def __init__(self) -> None:
        self.sums: dict[Side, Tally] = defaultdict(Tally)

    def __call__(self, name: str, side: Side, one: Tally) -> None:
        assert name == "people"
        self.sums[side] += one


async def ask_next(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
    async for message in replay(NEXT, call, left):
        yield message


async def die(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
    raise RuntimeError("the candidate died")
    yield {}


async def die_midway(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
    yield {"type": "http.response.start", "status": 200, "headers": []}
    raise RuntimeError("the candidate died")


async def answer_500(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
    yield {"type": "http.response.start", "status": 500, "headers": []}
    yield {"type": "http.response.body", "body": b"{}"}


def make_fork(ask: Ask, counts: Counts, patience_s: float = 60, **terms: Any) -> Fork:
    fork = Fork(SERVED, ask, counts, LIMITS.max_body_bytes, patience_s)
    spec = CandidateSpec(**{"share": 1.0, **terms})
    fork.candidates = {"people": Candidate(number=2, proposal="p", terms=spec)}
    return fork


def test_without_candidates_nothing_is_counted_and_nobody_is_asked() -> None:
    counts = Counts()
    fork = make_fork(die, counts)
    fork.candidates = {}
    assert Client(fork).post(PATH, json=ROWS).json()["version"] == 1
    assert not counts.sums


def test_a_canary_answers_its_share_and_the_version_served_the_rest() -> None:
    counts = Counts()
    client = Client(make_fork(ask_next, counts, share=0.5))
    versions = [client.post(PATH, json=ROWS).json()["version"] for _ in range(60)]
    assert counts.sums["candidate"].requests == versions.count(2)
    assert counts.sums["served"].requests == versions.count(1)
    assert 10 < versions.count(2) < 50


async def hang(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
    await asyncio.Event().wait()
    yield {}


@pytest.mark.parametrize(("ask", "patience_s"), [(die, 60), (answer_500, 60), (hang, 0)])
def test_where_a_canary_fails_the_version_served_answers(ask: Ask, patience_s: float) -> None:
    counts = Counts()
    answer = Client(make_fork(ask, counts, patience_s)).post(PATH, json=ROWS)
    assert (answer.status_code, answer.json()["version"]) == (200, 1)
    assert counts.sums["candidate"].failures == 1


def test_an_answer_that_breaks_off_is_a_failure_of_the_canary() -> None:
    counts = Counts()
    with pytest.raises(RuntimeError):
        asyncio.run(call_app(make_fork(die_midway, counts), PATH, b"{}"))
    assert counts.sums["candidate"].failures == 1


@pytest.mark.parametrize("begins", [True, False])
def test_a_client_that_leaves_is_no_failure_of_the_canary_nor_waits_for_it(
    begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def stop(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
        if begins:
            yield {"type": "http.response.start", "status": 200, "headers": []}
        asked.set()
        await asyncio.Event().wait()

    async def run() -> None:
        request = asyncio.ensure_future(call_app(make_fork(stop, counts), PATH, b"{}"))
        await asked.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    counts = Counts()
    monkeypatch.setattr("heliostat.serve.fork.SETTLE_SECONDS", 0.0)
    asyncio.run(run())
    assert not counts.sums


def test_a_request_that_both_refuse_is_no_failure() -> None:
    counts = Counts()
    answer = Client(make_fork(ask_next, counts)).post(PATH, json={"instances": []})
    assert answer.status_code == 422
    check_error(answer)
    assert (counts.sums["candidate"].requests, counts.sums["candidate"].failures) == (1, 0)


async def answer_422(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
    yield {"type": "http.response.start", "status": 422, "headers": []}
    yield {"type": "http.response.body", "body": b"{}"}


@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_what_only_the_candidate_refuses_is_its_failure_and_not_the_clients(mode: str) -> None:
    counts = Counts()

    async def run() -> list[Message]:
        fork = make_fork(answer_422, counts, mode=mode)
        sent = await call_app(fork, PATH, json.dumps(ROWS).encode())
        await asyncio.gather(*fork._shadows)
        return sent

    assert asyncio.run(run())[0]["status"] == 200
    assert (counts.sums["candidate"].requests, counts.sums["candidate"].failures) == (1, 1)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_models_without_a_candidate_and_other_routes_go_straight_on(method: str) -> None:
    counts = Counts()
    client = Client(make_fork(die, counts))
    assert client.request(method, "/v1/models/nobody:predict", json=ROWS).status_code in (404, 405)
    assert client.get("/v1/models").status_code == 200
    assert not counts.sums


def test_a_body_that_is_too_large_is_refused_with_a_candidate_too() -> None:
    body = b"[" * (LIMITS.max_body_bytes + 1)
    served = Client(SERVED).post(PATH, content=body).status_code
    assert (
        Client(make_fork(ask_next, Counts(), mode="shadow")).post(PATH, content=body).status_code
        == served
    )


def test_a_shadow_is_asked_and_never_answers() -> None:
    async def run() -> list[Message]:
        messages = await call_app(fork, PATH, b'{"instances": [{"age": 41, "job": "cook"}]}')
        while fork._shadows:
            await asyncio.sleep(0)
        return messages

    for ask, failures in ((ask_next, 0), (die, 1)):
        counts = Counts()
        fork = make_fork(ask, counts, mode="shadow")
        assert b'"version":1' in asyncio.run(run())[1]["body"]
        seen = counts.sums["candidate"]
        assert (seen.requests, seen.failures, seen.compared) == (1, failures, 1 - failures)
        assert seen.difference == 0


def test_credentials_stay_where_they_are() -> None:
    calls: list[Call] = []

    async def keep(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
        calls.append(call)
        async for message in replay(NEXT, call, left):
            yield message

    headers = {"authorization": "Bearer secret", "cookie": "secret", "accept": "application/json"}
    Client(make_fork(keep, Counts())).post(PATH, json=ROWS, headers=headers)
    assert "secret" not in repr(calls)
    assert dict(calls[0].headers)[b"content-type"] == b"application/json"


def test_a_stream_passes_as_it_comes() -> None:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        async def parts() -> AsyncGenerator[bytes]:
            for part in (b"a", b"b", b"c"):
                yield part

        await StreamingResponse(parts())(scope, receive, send)

    async def ask(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
        async for message in replay(stream, call, left):
            yield message

    messages = asyncio.run(call_app(make_fork(ask, Counts()), PATH, b"{}"))
    assert [message.get("body") for message in messages] == [None, b"a", b"b", b"c", b""]


async def call_app(app: Any, path: str, body: bytes) -> list[Message]:
    """The messages of one answer, each as it was sent."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    await app(make_scope(path), receive, send)
    return messages


def make_scope(path: str) -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
    }


def test_what_a_canary_has_used_is_counted_on_the_visit() -> None:
    seen: list[Visit] = []

    async def keep(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope.setdefault(VISIT, Visit(ANYBODY)))
        await fork(scope, receive, send)

    fork = make_fork(ask_next, Counts())
    assert Client(keep).post(PATH, json=ROWS).status_code == 200
    assert [(visit.version, visit.rows) for visit in seen] == [(2, len(ROWS["instances"]))]


def test_who_may_not_use_a_model_does_not_reach_its_candidate() -> None:
    async def enter(scope: Scope, receive: Receive, send: Send) -> None:
        scope[VISIT] = Visit(replace(ANYBODY, models=("other",)), verb="predict")
        await fork(scope, receive, send)

    counts = Counts()
    fork = make_fork(ask_next, counts)
    Client(enter).post(PATH, json=ROWS)
    assert not counts.sums


class Left:
    """A client that sends a request, hears of an answer and leaves when it is told to."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._body = json.dumps(document).encode()
        self._asked, self.leaves = False, asyncio.Event()

    async def receive(self) -> Message:
        if self._asked:
            await self.leaves.wait()
            return {"type": "http.disconnect"}
        self._asked = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def send(self, message: Message) -> None:
        pass

    async def ask(self, app: ASGIApp, visit: Visit) -> None:
        scope = make_scope("/v1/completions")
        scope[VISIT] = visit
        await Presence(app)(scope, self.receive, self.send)


def leave_in_the_middle(is_candidate: bool, stream: bool) -> Visit:
    """What is recorded of a client that leaves after a few of 40 tokens."""

    async def ask(name: str, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
        async for message in replay(app, call, left):
            yield message

    async def run() -> None:
        document = {"model": "rays", "prompt": "x", "max_tokens": 40, "ignore_eos": True}
        client = Left(document | {"stream": stream})
        asked = asyncio.ensure_future(client.ask(fork if is_candidate else app, visit))
        async with asyncio.timeout(10):
            while not pool.held:
                await asyncio.sleep(0)
            for _ in range(3):
                pool.step()
                for _ in range(20):
                    await asyncio.sleep(0)
            assert engine_of(language).scheduler.running
            client.leaves.set()
            await asked
        pool.step()
        assert not engine_of(language).scheduler.running
        assert not pool.held

    language, visit = make_language(), Visit(ANYBODY, verb="generate")
    pool = hold(language)
    models = {"rays": [language.version]}
    app = build_app(Shelf(models, lambda version: language, max_bytes=2**30), LIMITS)
    fork = make_fork(ask, Counts())
    fork.candidates = {"rays": fork.candidates["people"]}
    asyncio.run(run())
    return visit


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_a_canary_frees_its_slot_and_is_charged_as_with_the_version_served(
    stream: bool,
) -> None:
    served, candidate = (leave_in_the_middle(which, stream) for which in (False, True))
    assert candidate == served
    assert served.model == "rays"
    assert 0 < served.tokens_out < 40
