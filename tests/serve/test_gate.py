"""The gate: nothing without a key, nothing beyond its scopes, and what was used is counted."""

import asyncio
import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Scope

from heliostat import keys, usage
from heliostat.keys import VERBS, Keyring, Limits
from heliostat.serve.desk import Desk
from heliostat.serve.gate import (
    MAX_ADDRESSES,
    NO_RIGHT,
    PUBLIC,
    RULES,
    WRONG_AT_ONCE,
    Gate,
    Strikes,
    find_address,
    visit_of,
)
from heliostat.serve.ledger import Answer, Ask, Ledger, Office
from heliostat.serve.replies import Refusal, reply
from heliostat.storage import Store, connect
from heliostat.usage import Record
from serving import IMAGES, LIMITS, MODELS, ROWS, Client, check_error, make_app

PREDICT = "/v1/models/people:predict"
PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
WRONG = f"hs_{'0' * 16}_{'0' * 64}"


@dataclass
class Site:
    """An application behind its gate, with an office in this process and a clock that stands."""

    store: Store
    app: Starlette
    records: list[Record] = field(default_factory=list)
    now: float = 1000.0
    guarded: bool = True

    def __post_init__(self) -> None:
        self.ring = Keyring(self.store)
        ledger = Ledger(self.clock, lambda: 0.0, 0.0, self.count_used)
        self.office = Office(ledger, self.records.extend)
        self.desk = Desk(self.send, self.clock)
        find = self.ring.find if self.guarded else None
        self.app.add_middleware(Gate, find=find, desk=self.desk, clock=self.clock)
        self.client = Client(self.app)

    def clock(self) -> float:
        return self.now

    def count_used(self, key: str, unit: str, month: str) -> float:
        return sum(usage.count(record, unit) for record in self.records if record.key == key)

    async def send(self, ask: Ask) -> Answer:
        return self.office.answer(ask)

    def make_token(self, **scopes: Any) -> str:
        token, _ = keys.create(self.store, "ana", **scopes)
        self.ring.refresh()
        return token

    def ask(self, token: str | None, method: str = "POST", path: str = PREDICT, **more: Any) -> Any:
        headers = {"authorization": f"Bearer {token}"} if token is not None else {}
        body = {"json": ROWS} if method == "POST" else {}
        return self.client.request(method, path, **{"headers": headers, **body, **more})

    def tell(self) -> list[Record]:
        """All that has been recorded."""
        asyncio.run(self.desk.close())
        return self.records


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(connect(str(tmp_path)), make_app(MODELS, LIMITS))


def list_paths(app: Starlette) -> list[tuple[str, str]]:
    """Every method and path of the route table, with names of what is there."""
    numbers = {"version": "3", "number": "3"}
    return [
        (method, PARAMETER.sub(lambda match: numbers.get(match[1], "people"), route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


def test_every_route_but_health_wants_a_key(site: Site) -> None:
    paths = list_paths(site.app)
    assert len(paths) >= 4
    for method, path in paths:
        status = site.ask(None, method, path).status_code
        assert (status == 401) == (path not in PUBLIC), (method, path)


def test_every_route_has_a_rule(site: Site) -> None:
    for _, path in list_paths(site.app):
        assert path in PUBLIC or any(rule.pattern.fullmatch(path) for rule in RULES), path


def test_with_a_key_the_answer_is_the_one_without_a_gate(site: Site) -> None:
    token = site.make_token()
    plain = Client(make_app(MODELS, LIMITS))
    assert site.ask(token).json() == plain.post(PREDICT, json=ROWS).json()
    assert site.ask(token, "GET", "/v1/models").json() == plain.get("/v1/models").json()


def test_no_wrong_expired_revoked_and_misplaced_keys_are_one_answer(site: Site) -> None:
    token, expired = site.make_token(), site.make_token(days=1e-9)
    revoked = site.make_token()
    keys.revoke(site.store, revoked)
    site.ring.refresh()
    asked = [
        site.ask(None),
        site.ask(WRONG),
        site.ask(expired),
        site.ask(revoked),
        site.ask(""),
        site.ask(None, path=f"{PREDICT}?key={token}&authorization=Bearer%20{token}"),
        site.ask(None, headers={"authorization": f"Basic {token}"}),
        site.ask(None, headers={"authorization": token}),
        site.ask(None, headers={"x-api-key": token}),
        site.ask(None, headers=[("authorization", f"Bearer {token}")] * 2),
        site.ask(None, headers={"cookie": f"authorization=Bearer {token}"}),
    ]
    assert {response.status_code for response in asked} == {401}
    assert len({check_error(response)["message"] for response in asked}) == 1
    assert {response.headers["www-authenticate"] for response in asked} == {"Bearer"}
    assert site.ask(token).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_has_no_case(site: Site, scheme: str) -> None:
    headers = {"authorization": f"{scheme} {site.make_token()}"}
    assert site.ask(None, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/v1/models", {"host": "x/healthz?"}),
        ("GET", "/v1/models", {"host": "app/healthz"}),
        ("GET", "/v1/models", {"x-original-url": "/healthz", "x-rewrite-url": "/healthz"}),
        ("GET", "//healthz", {}),
        ("GET", "/healthz/", {}),
        ("GET", "/healthz/../v1/models", {}),
        ("GET", "/%2e%2e/healthz", {}),
        ("GET", "/healthz;/../v1/models", {}),
        ("GET", "/healthz%00", {}),
        ("GET", "/HEALTHZ", {}),
        ("GET", "/V1/models", {}),
        ("OPTIONS", "/v1/models", {"access-control-request-method": "GET", "origin": "http://x"}),
        ("TRACE", "/v1/models", {}),
        ("GET", "/v2/health/live/x", {}),
        ("GET", "/docs", {}),
        ("GET", "/", {}),
    ],
)
def test_a_path_that_only_looks_public_wants_a_key(
    site: Site, method: str, path: str, headers: dict[str, str]
) -> None:
    response = site.ask(None, method, path, headers=headers)
    # An HTTP client may resolve dots before it sends: then it is that path that is asked.
    assert response.status_code in (401, 200 if response.request.url.path == "/healthz" else 401)
    if response.status_code == 401:
        check_error(response)


@pytest.mark.parametrize("can_answer", [True, False])
def test_a_websocket_is_refused_before_it_is_one(site: Site, can_answer: bool) -> None:
    async def connect_to(headers: list[tuple[bytes, bytes]]) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        extensions: dict[str, object] = {"websocket.http.response": {}} if can_answer else {}
        scope: Scope = {
            "type": "websocket",
            "path": "/v1/models",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "extensions": extensions,
        }
        await site.app(scope, receive, send)
        return sent

    key = [(b"authorization", b"Bearer " + site.make_token().encode())]
    for headers, status in (([], 401), (key, 404)):
        first, *_ = asyncio.run(connect_to(headers))
        if can_answer:
            assert (first["type"], first["status"]) == ("websocket.http.response.start", status)
        else:
            assert first["type"] == "websocket.close"


def test_who_has_no_right_cannot_tell_what_is_there(site: Site) -> None:
    token = site.make_token(models=("people",))
    assert site.ask(token).status_code == 200
    there, nowhere = (
        site.ask(token, path=f"/v1/models/{name}:predict", json=IMAGES)
        for name in ("shapes", "nowhere")
    )
    for response in (there, nowhere):
        assert response.status_code == 403
        assert check_error(response)["message"] == NO_RIGHT
    assert len(there.content) == len(nowhere.content)


def test_who_has_no_right_never_reaches_the_application(tmp_path: Path) -> None:
    reached: list[str] = []

    async def note(request: Request) -> Response:
        reached.append(request.url.path)
        return reply(b"{}")

    site = Site(connect(str(tmp_path)), Starlette(routes=[Route("/{path:path}", note)]))
    token = site.make_token(models=("people",), verbs=("predict",))
    for path in ("/v1/models/x:predict", "/v1/models/people:explain", "/v1/completions", "/x"):
        assert site.ask(token, "GET", path).status_code in (403, 404)
    assert reached == []


def test_what_everybody_may_and_nobody_has_is_404(site: Site) -> None:
    token = site.make_token()
    for path in ("/v1/models/nowhere:predict", "/v1/unknown", "/x"):
        response = site.ask(token, path=path)
        assert response.status_code == 404
        check_error(response)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_what_its_routes_need(site: Site, verb: str) -> None:
    token = site.make_token(verbs=(verb,))
    assert (site.ask(token).status_code == 200) == (verb == "predict")
    assert (site.ask(token, "GET", "/v1/models").status_code == 200) == (verb == "read")


def test_the_list_has_only_what_the_key_may_use(site: Site) -> None:
    listed = site.ask(site.make_token(models=("people",)), "GET", "/v1/models").json()["models"]
    assert [model["name"] for model in listed] == ["people"]


def test_a_model_that_the_body_names_is_checked_as_one_of_the_path(tmp_path: Path) -> None:
    async def complete(request: Request) -> Response:
        visit = visit_of(request)
        visit.enter((await request.json())["model"])
        visit.version = 7
        visit.count(tokens_in=3, tokens_out=5)
        visit.count(tokens_out=6)
        return reply(b"{}")

    app = make_app({}, LIMITS)
    app.router.routes.insert(0, Route("/v1/completions", complete, methods=["POST"]))
    site = Site(connect(str(tmp_path)), app)
    token = site.make_token(models=("a",))
    statuses = [
        site.ask(token, path="/v1/completions", json={"model": model}).status_code
        for model in ("a", "b")
    ]
    assert statuses == [200, 403]
    good, bad = site.tell()
    assert (good.model, good.version, good.tokens_in, good.tokens_out) == ("a", 7, 3, 11)
    assert (bad.model, bad.status, bad.tokens_out) == ("", 403, 0)


@pytest.mark.parametrize("model", ["a\nb", "\x1b[31m", "A", "", "../x", "a" * 64])
def test_what_is_no_name_of_a_model_is_404_and_not_recorded(site: Site, model: str) -> None:
    body = {"model": model, "prompt": "a"}
    response = site.ask(site.make_token(), path="/v1/completions", json=body)
    assert response.status_code == 404
    check_error(response)
    assert [(record.model, record.status) for record in site.tell()] == [("", 404)]


def test_no_route_that_reads_the_model_from_the_body_forgets_the_key(site: Site) -> None:
    token = site.make_token(models=("people",))
    named = {rule.route for rule in RULES if not rule.pattern.groups and rule.verb != "read"}
    paths = {path for method, path in list_paths(site.app) if method == "POST"} & named
    assert len(paths) == 3
    for path in paths:
        about = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "input": "a"}
        given = {"/v1/completions": "prompt", "/v1/embeddings": "input"}.get(path, "messages")
        for model in ("shapes", "nowhere"):
            body = {"model": model, given: about[given]}
            assert site.ask(token, path=path, json=body).status_code == 403, path


def test_each_request_of_a_key_is_recorded_as_it_ended(site: Site) -> None:
    token = site.make_token()
    site.ask(None)
    site.ask(WRONG)
    site.client.get("/healthz")
    site.ask(token)
    site.ask(token, json={"instances": []})
    site.ask(token, "GET", "/v1/models")
    site.ask(token, path="/v1/models/nowhere:predict")
    found = [
        (record.route, record.model, record.version, record.rows, record.status)
        for record in site.tell()
    ]
    assert found == [
        ("/v1/models/NAME:predict", "people", 3, 2, 200),
        ("/v1/models/NAME:predict", "people", 3, 0, 422),
        ("/v1/models", "", 0, 0, 200),
        ("/v1/models/NAME:predict", "", 0, 0, 404),
    ]
    assert {record.key for record in site.records} == {token.split("_")[1]}


def test_a_limit_is_429_and_true_and_of_one_key_only(site: Site) -> None:
    token = site.make_token(limits=Limits(requests_per_second=2))
    other = site.make_token()
    responses = [site.ask(token) for _ in range(10)]
    statuses = [response.status_code for response in responses]
    admitted = statuses.count(200)
    assert 2 <= admitted <= 3
    assert statuses == [200] * admitted + [429] * (10 - admitted)
    check_error(responses[-1])
    assert site.ask(other).status_code == 200
    site.now += int(responses[-1].headers["retry-after"])
    assert site.ask(token).status_code == 200


def test_a_month_of_rows_ends_with_its_rows(site: Site) -> None:
    token = site.make_token(limits=Limits(rows_per_month=6))
    assert [site.ask(token).status_code for _ in range(5)] == [200, 200, 200, 429, 429]


def test_without_auth_everybody_is_let_in_and_counted(tmp_path: Path) -> None:
    site = Site(connect(str(tmp_path)), make_app(MODELS, LIMITS), guarded=False)
    assert site.ask(None).status_code == 200
    assert [(record.key, record.rows) for record in site.tell()] == [("", 2)]


def test_wrong_keys_are_limited_by_address_and_valid_ones_are_not(site: Site) -> None:
    token = site.make_token()
    behind = {"x-forwarded-for": "10.0.0.1, 203.0.113.9"}

    def guess() -> int:
        headers = {"authorization": f"Bearer {WRONG}", **behind}
        return int(site.ask(None, headers=headers).status_code)

    statuses = [guess() for _ in range(100)]
    assert statuses.count(401) == WRONG_AT_ONCE
    assert statuses[int(WRONG_AT_ONCE) :] == [429] * (100 - int(WRONG_AT_ONCE))
    valid = {"authorization": f"Bearer {token}", **behind}
    assert site.ask(None, headers=valid).status_code == 200
    assert site.ask(WRONG).status_code == 401
    site.now += 1
    assert [guess(), guess()] == [401, 429]


def test_addresses_without_end_cost_a_bounded_memory() -> None:
    strikes = Strikes(lambda: 0.0)
    for number in range(3 * MAX_ADDRESSES):
        strikes.strike(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(strikes) == MAX_ADDRESSES


def test_one_network_of_ipv6_is_one_address() -> None:
    strikes = Strikes(lambda: 0.0)
    for number in range(int(WRONG_AT_ONCE)):
        strikes.strike(f"2001:db8::{number:x}")
    with pytest.raises(Refusal):
        strikes.strike("2001:db8::ffff:1")
    strikes.strike("2001:db8:0:1::1")


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ([], "192.0.2.1"),
        ([(b"x-forwarded-for", b"203.0.113.9")], "203.0.113.9"),
        ([(b"x-forwarded-for", b"10.1.1.1,203.0.113.9")], "203.0.113.9"),
        ([(b"x-forwarded-for", b"10.1.1.1"), (b"x-forwarded-for", b"203.0.113.9")], "203.0.113.9"),
    ],
)
def test_the_address_is_what_the_last_proxy_saw(
    headers: list[tuple[bytes, bytes]], address: str
) -> None:
    assert find_address({"headers": headers, "client": ("192.0.2.1", 9)}) == address


def test_a_key_is_in_no_log_no_answer_and_no_record(
    site: Site, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def fail(request: Request) -> Response:
        raise RuntimeError("a bug")

    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, "httpx")  # the client's own, which logs what it asks
    site.app.router.routes.insert(0, Route("/openapi.json", fail))
    token = site.make_token()
    narrow = site.make_token(models=("shapes",), limits=Limits(requests_per_second=1))
    revoked = site.make_token()
    keys.revoke(site.store, revoked)
    site.ring.refresh()
    responses = [
        site.ask(token, "GET", "/openapi.json"),
        *(site.ask(narrow) for _ in range(5)),
        *(site.ask(revoked) for _ in range(30)),
        site.ask(token, path=f"/v1/models/{token}:predict"),
        site.ask(None, path=f"{PREDICT}?key={token}"),
    ]
    assert {response.status_code for response in responses} == {500, 403, 429, 401, 404}
    stored = b"".join(site.store.read(entry.key) for entry in site.store.list())
    told = f"{caplog.text}{capfd.readouterr()}{site.tell()}{stored!r}{site.ring!r}{site.desk!r}"
    told += "".join(f"{response.headers}{response.text}" for response in responses)
    assert "a bug" in told
    for secret in (one.rpartition("_")[2] for one in (token, narrow, revoked)):
        assert secret not in told


hostile = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(path=hostile, value=st.binary(max_size=120), forwarded=st.binary(max_size=60))
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_no_path_and_no_header_make_it_fail_or_open(
    tmp_path_factory: pytest.TempPathFactory, path: str, value: bytes, forwarded: bytes
) -> None:
    """Whatever bytes a server lets through."""

    async def ask() -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": f"/{path}",
            "query_string": b"",
            "headers": [(b"authorization", b"Bearer " + value), (b"x-forwarded-for", forwarded)],
            "client": None,
        }
        await SITE.app(scope, receive, send)
        return sent

    first, second = asyncio.run(ask())
    assert first["status"] in ((401, 429) if f"/{path}" not in PUBLIC else (200,))
    assert (first["status"] == 200) != (b"error" in second["body"])


SITE = Site(connect("/nonexistent"), make_app(MODELS, LIMITS))


@given(name=hostile)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_a_model_name_is_recorded_only_if_it_may_be_one(name: str) -> None:
    """A name goes into records and tables: no line break and no escape sequence does."""
    matches = (rule.pattern.fullmatch(f"/v1/models/{name}:predict") for rule in RULES)
    found = [match.groupdict().get("model") for match in matches if match]
    assert all(model is None or re.fullmatch(r"[a-z0-9._-]+", model) for model in found)


def test_a_request_that_leaves_is_recorded(site: Site) -> None:
    async def run() -> None:
        waiting = asyncio.Event()

        async def receive() -> Message:
            waiting.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            raise AssertionError

        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": PREDICT,
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {token}".encode())],
            "client": None,
        }
        request = asyncio.ensure_future(site.app(scope, receive, send))
        await waiting.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await site.desk.close()

    token = site.make_token()
    asyncio.run(run())
    assert [(record.status, record.model) for record in site.records] == [(499, "people")]


def test_what_is_recorded_is_of_the_time_when_it_began(site: Site) -> None:
    site.ask(site.make_token())
    (record,) = site.tell()
    assert abs(record.time - datetime.now(UTC).timestamp()) < 60
