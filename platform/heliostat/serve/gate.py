"""The first layer of a replica: who asks, whether they may, how much is left, and what it took."""

import ipaddress
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.keys import ANY, VERBS, Key, Limits, make_clock
from heliostat.serve.desk import Desk
from heliostat.serve.replies import NO_MODEL, Refusal, fail
from heliostat.spec import NAME_PATTERN
from heliostat.usage import Record

PUBLIC = frozenset({"/healthz", "/v2/health/live", "/v2/health/ready"})
VISIT = "heliostat.visit"
BEARER = b"bearer "
MAX_HEADER_BYTES = 200
LEFT = 499  # what is recorded of a request whose client went away before an answer

NO_KEY = "send a valid key in the header Authorization: Bearer hs_..."
NO_RIGHT = "the key may not do this, or not with this model"

WRONG_PER_SECOND, WRONG_AT_ONCE = 1.0, 20.0
MAX_ADDRESSES = 4096

_NAME = f"(?P<model>{NAME_PATTERN.pattern})"
_VERSION = "(?:/versions/[^/]+)?"


@dataclass(frozen=True)
class Rule:
    """What the paths of a route ask for: a verb, and `model` where they name one."""

    verb: str
    route: str
    pattern: re.Pattern[str]


# A path that none of these knows is nobody's, whatever routes the application has.
RULES = tuple(
    Rule(verb, route, re.compile(pattern))
    for verb, route, pattern in (
        ("predict", "/v1/models/NAME:predict", rf"/v1/models/{_NAME}:predict"),
        ("predict", "/v2/models/NAME/infer", rf"/v2/models/{_NAME}{_VERSION}/infer"),
        ("generate", "/v1/chat/completions", "/v1/chat/completions"),
        ("generate", "/v1/completions", "/v1/completions"),
        ("predict", "/v1/embeddings", "/v1/embeddings"),
        ("explain", "/v1/models/NAME:explain", rf"/v1/models/{_NAME}:explain"),
        ("read", "/v1/models", "/v1/models"),
        ("read", "/v1/models/NAME", rf"/v1/models/{_NAME}"),
        ("read", "/v2", "/v2/?"),
        ("read", "/v2/models/NAME", rf"/v2/models/{_NAME}{_VERSION}(?:/ready)?"),
        ("read", "/openapi.json", r"/openapi\.json"),
    )
)

# Whom everybody is where keys are off.
ANYBODY = Key(
    id="",
    sha256="0" * 64,
    owner="anybody",
    models=(ANY,),
    verbs=VERBS,
    limits=Limits(),
    created=datetime.fromtimestamp(0, UTC),
)


@dataclass(slots=True)
class Visit:
    """One request: whose it is, and what its handler tells of it."""

    key: Key
    verb: str = "read"
    route: str = ""
    model: str = ""
    version: int = 0
    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    status: int = LEFT

    def may_use(self, model: str) -> bool:
        return self.key.may(self.verb, model)

    def enter(self, model: str) -> None:
        """Name the model that the body asks for, before anything says whether it is there.

        Raises:
            Refusal: 403, the key has no right to it; 404, it is no name of a model.
        """
        if not self.may_use(model):
            raise Refusal(403, NO_RIGHT)
        if not NAME_PATTERN.fullmatch(model):
            raise Refusal(404, NO_MODEL)
        self.model = model

    def count(self, *, rows: int = 0, tokens_in: int = 0, tokens_out: int = 0) -> None:
        """Add what was used; it is charged when the request ends, however it ends."""
        self.rows += rows
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out


def visit_of(request: Request) -> Visit:
    """The visit that `request` is; one of anybody where no gate stands before the application."""
    visit: Visit = request.scope.setdefault(VISIT, Visit(ANYBODY))
    return visit


class Strikes:
    """How often an address may show a wrong key: a bucket each, those seen last are kept."""

    def __init__(self, clock: Callable[[], float], max_addresses: int = MAX_ADDRESSES) -> None:
        self._clock, self._max = clock, max_addresses
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def strike(self, address: str) -> None:
        """Raises Refusal: 429, this was one too many."""
        now, network = self._clock(), find_network(address)
        level, at = self._buckets.pop(network, (WRONG_AT_ONCE, now))
        level = min(WRONG_AT_ONCE, level + (now - at) * WRONG_PER_SECOND)
        self._buckets[network] = (level - 1 if level >= 1 else level), now
        if len(self._buckets) > self._max:
            self._buckets.popitem(last=False)
        if level < 1:
            raise Refusal(429, "too many wrong keys from this address, retry later")


class Gate:
    """Lets in who has a key with the right to what the path asks for; `find` looks keys up.

    Without `find` everybody is let in, and counted all the same. It decides on `scope["path"]`
    alone, for whatever else names the resource the client has written.
    """

    def __init__(
        self,
        app: ASGIApp,
        find: Callable[[str], Key | None] | None,
        desk: Desk,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._find, self._desk = app, find, desk
        self._clock, self._wall = clock, make_clock(monotonic=clock)
        self._strikes = Strikes(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            async with self._desk.open():
                await self._app(scope, receive, send)
            return
        if scope["path"] in PUBLIC:
            await self._app(scope, receive, send)
            return
        try:
            key = ANYBODY if self._find is None else self._identify(self._find, scope)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send)
            return
        if scope["type"] != "http":
            await refuse(Refusal(404, "Not Found"), scope, receive, send)
            return
        await self._serve(key, scope, receive, send)

    async def _serve(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        began = self._clock()
        visit = scope[VISIT] = Visit(key)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            await send(message)

        try:
            allow(visit, scope["path"])
            await self._desk.admit(key)
            await self._app(scope, receive, tell)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, tell)
        except Exception:
            visit.status = 500  # what the layer outside of this one answers
            raise
        finally:
            seconds = self._clock() - began
            if visit.status == 404:
                visit.model = ""  # anybody can ask for names; usage lists models
            self._desk.record(key, render_record(visit, self._wall() - seconds, seconds))

    def _identify(self, find: Callable[[str], Key | None], scope: Scope) -> Key:
        token = read_token(scope)
        key = find(token) if token is not None else None
        if key is None:
            if token is not None:
                self._strikes.strike(find_address(scope))
            raise Refusal(401, NO_KEY, headers={"www-authenticate": "Bearer"})
        return key


def allow(visit: Visit, path: str) -> None:
    """Note what the path asks for, if the key has the right to it.

    Whether there is such a model is not asked: who may not use it is not told.

    Raises:
        Refusal: 403, it has not; 404, the path is nobody's.
    """
    for rule in RULES:
        if match := rule.pattern.fullmatch(path):
            visit.verb, visit.route = rule.verb, rule.route
            model = match.groupdict().get("model")
            if not visit.key.may(rule.verb, model):
                raise Refusal(403, NO_RIGHT)
            visit.model = model or ""
            return
    raise Refusal(404, "Not Found")


def read_token(scope: Scope) -> str | None:
    """What stands behind `Bearer` in the one Authorization header; None without such a header."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(found) != 1 or found[0][: len(BEARER)].lower() != BEARER:
        return None
    token: str = found[0][len(BEARER) : MAX_HEADER_BYTES].decode("latin-1")
    return token.strip(" ")


def find_address(scope: Scope) -> str:
    """The client's address: what the proxy before this has added to X-Forwarded-For at the end."""
    for name, value in reversed(scope["headers"]):
        if name == b"x-forwarded-for":
            last: str = value.decode("latin-1").rpartition(",")[2]
            return last.strip()
    return scope["client"][0] if scope.get("client") else ""


def find_network(address: str) -> str:
    """The address itself, of an IPv6 address the /64 that one client has as a rule."""
    with suppress(ValueError):
        found = ipaddress.ip_address(address)
        if found.version == 6 and not found.ipv4_mapped:
            return str(ipaddress.ip_network((found, 64), strict=False))
        return str(found)
    return ""


def render_record(visit: Visit, began: float, seconds: float) -> Record:
    return Record(
        time=began,
        key=visit.key.id,
        model=visit.model,
        version=visit.version,
        route=visit.route,
        rows=visit.rows,
        tokens_in=visit.tokens_in,
        tokens_out=visit.tokens_out,
        seconds=seconds,
        status=visit.status,
    )


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the one shape of errors; a websocket is refused before it is one."""
    response = fail(refusal.status, refusal.message, refusal.field, refusal.headers, scope["path"])
    if scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
        await response(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})
