"""A request with an Idempotency-Key is computed and charged once, whichever replica is asked."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat import keys, usage
from heliostat.keys import Keyring
from heliostat.serve.app import build_app
from heliostat.serve.desk import Away, Desk
from heliostat.serve.gate import ANYBODY, VISIT, Gate, Visit
from heliostat.serve.identity import Identity
from heliostat.serve.ledger import Answer, Ask, Ledger, Office
from heliostat.serve.receipts import Question, Receipt, Receipts, Standing
from heliostat.serve.repeats import HEADER, Repeats
from heliostat.serve.shelf import Loaded, Shelf
from heliostat.storage import connect
from heliostat.usage import Record
from serving import LIMITS, MODELS, ROWS, Client, check_error
from writing import make_language

PREDICT, COMPLETION = "/v1/models/people:predict", "/v1/completions"
ONE_ROW = {"instances": ROWS["instances"][:1]}
TEXT = {"model": "rays", "prompt": "rays", "max_tokens": 16, "temperature": 1.9}
NAME = {"idempotency-key": "order-1"}


class Book:
    """The receipts in this process; `is_away` while the office is."""

    def __init__(self) -> None:
        self.receipts = Receipts(lambda: self.now)
        self.now, self.is_away = 0.0, False

    async def claim(self, question: Question, claimant: str) -> Standing:
        if self.is_away:
            raise Away
        return self.receipts.claim(question, claimant)

    async def settle(self, question: Question, claimant: str, receipt: Receipt | None) -> None:
        if self.is_away:
            raise Away
        self.receipts.settle(question, claimant, receipt)


@dataclass
class Counted:
    """Counts what reaches the application behind; it waits while `gate` is shut."""

    app: ASGIApp
    calls: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.calls += 1
            await self.gate.wait()
        await self.app(scope, receive, send)


class House:
    """Two replicas behind gates, one office, and a key."""

    def __init__(self, root: Path) -> None:
        store = connect(str(root))
        self.store, self.ring, self.book = store, Keyring(store), Book()
        self.records: list[Record] = []
        office = Office(Ledger(lambda: 0.0, lambda: 0.0, 0.0), self.records.extend)

        async def send(ask: Ask) -> Answer:
            return office.answer(ask)

        models: dict[str, Loaded] = {**MODELS, "rays": make_language()}
        shelf = Shelf({n: [m.version] for n, m in models.items()}, lambda v: models[v.name], 2**30)
        self.behind = Counted(build_app(shelf, LIMITS))
        self.behind.gate.set()
        self.desks = [Desk(send), Desk(send)]
        self.apps = [
            Identity(Gate(Repeats(self.behind, self.book, LIMITS), self.ring.find, desk))
            for desk in self.desks
        ]
        self.replicas = [Client(app) for app in self.apps]
        self.token = self.make_token()

    def make_token(self, **scopes: Any) -> str:
        token, _ = keys.create(self.store, "ana", **scopes)
        self.ring.refresh()
        return token

    def ask(
        self, body: Any, headers: Any = NAME, replica: int = 0, path: str = PREDICT, **more: Any
    ) -> httpx.Response:
        token = more.get("token", self.token)
        named = {"authorization": f"Bearer {token}", **headers}
        return self.replicas[replica].post(path, json=body, headers=named)

    def tell(self) -> list[Record]:
        for desk in self.desks:
            asyncio.run(desk.close())
        return self.records


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.mark.parametrize(
    ("path", "body"),
    [(PREDICT, ROWS), (COMPLETION, TEXT), (COMPLETION, {**TEXT, "stream": True})],
)
def test_what_comes_again_gets_the_same_answer_and_is_charged_once(
    house: House, path: str, body: Any
) -> None:
    first = house.ask(body, path=path)
    again = [house.ask(body, path=path, replica=replica) for replica in (1, 0)]
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    for answer in again:
        assert (answer.status_code, answer.content) == (200, first.content)
        assert answer.headers["content-type"] == first.headers["content-type"]
        assert answer.headers["idempotent-replayed"] == "true"
        assert answer.headers["x-request-id"] != first.headers["x-request-id"]
    assert house.behind.calls == 1
    used = [usage.count(record, unit) for record in house.tell() for unit in usage.UNITS]
    assert len([units for units in used if units]) == 1
    assert [(r.model, r.version, r.status) for r in house.records] == [
        (house.records[0].model, house.records[0].version, 200)
    ] * 3


def test_without_the_header_nothing_is_kept(house: House) -> None:
    assert [house.ask(ROWS, headers={}).status_code for _ in range(2)] == [200, 200]
    assert house.behind.calls == 2
    assert house.book.receipts.size == 0


def test_another_request_under_the_same_name_is_422(house: House) -> None:
    assert house.ask(ROWS).status_code == 200
    others = [
        house.ask(ONE_ROW),
        house.ask(ROWS, path="/v1/models/shapes:predict"),
        house.ask(ROWS, {**NAME, "content-type": "image/png"}),
    ]
    for answer in others:
        assert answer.status_code == 422
        assert check_error(answer)["field"] == HEADER.decode()
    assert house.behind.calls == 1


def test_a_name_is_its_keys_own(house: House) -> None:
    first = house.ask(ROWS)
    other = house.ask(ONE_ROW, token=house.make_token())
    assert (first.status_code, other.status_code) == (200, 200)
    assert "idempotent-replayed" not in other.headers


def test_a_failure_is_not_kept(house: House) -> None:
    assert house.ask({"instances": [{"height": 1}]}).status_code == 422
    assert house.ask(ROWS).status_code == 200


@pytest.mark.parametrize("name", ["", " ", "a b", "é", "x" * 201])
def test_a_name_that_is_none_is_400(house: House, name: str) -> None:
    answer = house.ask(ROWS, {"idempotency-key": name.encode()})
    assert answer.status_code == 400
    assert check_error(answer)["field"] == HEADER.decode()


def test_two_names_are_400(house: House) -> None:
    named = [("authorization", f"Bearer {house.token}"), *[("idempotency-key", "a")] * 2]
    assert house.replicas[0].post(PREDICT, json=ROWS, headers=named).status_code == 400


def test_while_the_office_is_away_nothing_is_computed_under_a_name(house: House) -> None:
    house.book.is_away = True
    answer = house.ask(ROWS)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert house.behind.calls == 0
    assert house.ask(ROWS, headers={}).status_code == 200


def test_a_body_too_large_is_413_as_without_a_name(house: House) -> None:
    answer = house.ask({"instances": ["x" * 30_000]})
    assert answer.status_code == 413


async def post(house: House, replica: int, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(house.apps[replica])
    named = {"authorization": f"Bearer {house.token}", **NAME, **headers}
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
        return await http.post(PREDICT, json=ROWS, headers=named)


async def turn(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_those_who_come_meanwhile_wait_for_the_first(house: House) -> None:
    async def run() -> list[httpx.Response]:
        house.behind.gate = asyncio.Event()
        asked = [asyncio.ensure_future(post(house, number % 2)) for number in range(6)]
        await turn(lambda: house.behind.calls)
        house.behind.gate.set()
        return await asyncio.gather(*asked)

    answers = asyncio.run(run())
    assert house.behind.calls == 1
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


def test_who_has_no_time_to_wait_is_409(house: House) -> None:
    async def run() -> httpx.Response:
        house.behind.gate = asyncio.Event()
        first = asyncio.ensure_future(post(house, 0))
        await turn(lambda: house.behind.calls)
        second = await post(house, 1, **{"x-timeout-seconds": "0.01"})
        house.behind.gate.set()
        await first
        return second

    answer = asyncio.run(run())
    assert answer.status_code == 409
    assert answer.headers["retry-after"] == "1"
    assert check_error(answer)["type"] == "conflict"


def test_one_that_ends_in_the_middle_leaves_the_name_to_the_next(house: House) -> None:
    async def run() -> None:
        house.behind.gate = asyncio.Event()
        first = asyncio.ensure_future(post(house, 0))
        await turn(lambda: house.behind.calls)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        house.behind.gate.set()
        assert (await post(house, 1)).status_code == 200

    asyncio.run(run())
    assert house.behind.calls == 2


def test_a_stream_that_fails_after_it_began_is_not_kept(house: House) -> None:
    """What is asked again is then computed again, though the first answer began with 200."""

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        house.behind.calls += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1", "more_body": True})

    app = Repeats(fail, house.book, LIMITS)
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(HEADER, b"order-1")]
    scope = {"type": "http", "method": "POST", "path": PREDICT, "query_string": b""}
    for _ in range(2):
        visit = Visit(ANYBODY, status=200)
        asyncio.run(app({**scope, "headers": headers, VISIT: visit}, receive, send))
    assert house.behind.calls == 2
