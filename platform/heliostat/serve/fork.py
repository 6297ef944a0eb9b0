"""An ASGI layer: the requests of a candidate's share go to it, all others straight on."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serve.delivery import Tally, compare, tally
from heliostat.serve.gate import ANYBODY, VISIT, Visit
from heliostat.serve.split import Answer, difference, find_model, is_chosen
from heliostat.serve.table import Candidate

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 5.0  # for a candidate to say what one who left has used
MAX_SHADOWS = 16  # at once; those above are not asked, nobody waits for them
USAGE = "heliostat.usage"  # the message in which a candidate tells what a request took
CARRIED = frozenset(
    {b"content-type", b"accept", b"inference-header-content-length", b"x-request-id"}
)


@dataclass(frozen=True)
class Call:
    """A request as another process gets it: without credentials."""

    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    id: str


Ask = Callable[[str, Call, asyncio.Event], AsyncGenerator[Message]]
Side = Literal["served", "candidate"]
Count = Callable[[str, Side, Tally], None]


class Fork:
    """`ask` is how the candidate of a model is asked, and hears by the event that the client left;
    `count` is told what became of a request.

    While there is no `candidates` a request costs a look at that. A candidate that fails is not the
    client's business: the version served answers then, unless the answer has begun. It fails too
    if it does not begin within `patience_s`.
    """

    def __init__(
        self, app: ASGIApp, ask: Ask, count: Count, max_body_bytes: int, patience_s: float
    ) -> None:
        self.candidates: Mapping[str, Candidate] = {}
        self._app, self._ask, self._count = app, ask, count
        self._max_body_bytes, self._patience_s = max_body_bytes, patience_s
        self._shadows: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.candidates or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body, receive = await read_ahead(receive, self._max_body_bytes)
        name = find_model(scope["path"], body)
        candidate = self.candidates.get(name or "")
        visit: Visit = scope.get(VISIT) or Visit(ANYBODY)
        if name is None or candidate is None or not visit.may_use(name):
            await self._app(scope, receive, send)
            return
        by_key = candidate.terms.by == "key"
        tag = (by_key and visit.key.id) or secrets.token_hex(8)
        chosen = is_chosen(candidate, name, tag)
        call_id = secrets.token_hex(16)
        call = Call(scope["path"], scope["query_string"], _carried(scope), body, call_id)
        if chosen and candidate.terms.mode == "canary":
            tried = await self._forward(name, call, visit, send)
            if tried.begun:
                return
            seen = _Seen(send)
            await self._app(scope, receive, seen.send)
            if tried.seconds is not None:  # refused: a failure where the version served answers
                self._count(name, "candidate", tally(seen.status < 400, tried.seconds))
            return
        seen = _Seen(send)
        began = time.perf_counter()
        await self._app(scope, receive, seen.send)
        seconds = time.perf_counter() - began
        self._count(name, "served", tally(seen.status >= 500, seconds))
        if chosen and len(self._shadows) < MAX_SHADOWS:
            task = asyncio.create_task(self._shadow(name, candidate, call, seen.answer))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _forward(self, name: str, call: Call, visit: Visit, send: Send) -> "_Tried":
        """Let the candidate answer; what it refuses is no answer yet.

        Where the client leaves, this ends when the candidate has told what was used until then.
        """
        visit.enter(name)
        left = asyncio.Event()
        answering = asyncio.ensure_future(self._relay(name, call, left, visit, send))
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            left.set()
            await asyncio.wait({answering}, timeout=SETTLE_SECONDS)
            raise
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _relay(
        self, name: str, call: Call, left: asyncio.Event, visit: Visit, send: Send
    ) -> "_Tried":
        began, counts, refused = time.perf_counter(), True, False
        answered = _Seen(send)
        try:
            async with (
                asyncio.timeout(self._patience_s) as limit,
                contextlib.aclosing(self._ask(name, call, left)) as messages,
            ):
                async for message in messages:
                    limit.reschedule(None)
                    if message["type"] == USAGE:
                        if answered.begun or left.is_set():
                            visit.version = message["version"]
                            visit.count(**message["used"])
                    elif left.is_set():
                        continue
                    elif answered.begun or message["status"] < 400:
                        await answered.send(message)
                    else:
                        refused = 400 <= message["status"] < 500
                        break
        except asyncio.CancelledError:
            counts = False
            raise
        except Exception as error:  # whatever a candidate does, the version served answers
            logger.warning("the candidate of %s failed: %s", name, error)
            if answered.begun:
                raise
        finally:
            # That a client leaves says nothing of the candidate.
            if counts and not refused and not left.is_set():
                failed = not answered.ended
                self._count(name, "candidate", tally(failed, time.perf_counter() - began))
        return _Tried(answered.begun, time.perf_counter() - began if refused else None)

    async def _shadow(self, name: str, candidate: Candidate, call: Call, served: Answer) -> None:
        began = time.perf_counter()
        answered = _Seen(_drop)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._patience_s):
                async for message in self._ask(name, call, asyncio.Event()):
                    await answered.send(message)
        refused = answered.status >= 400 > served.status
        failed = not answered.ended or answered.status >= 500 or refused
        one = tally(failed, time.perf_counter() - began)
        if not one.failures and not served.is_stream:
            one = compare(one, difference(served, answered.answer), candidate.terms)
        self._count(name, "candidate", one)


@dataclass(frozen=True)
class _Tried:
    """Whether a candidate has begun to answer; the seconds after which it refused, if it did."""

    begun: bool
    seconds: float | None


class _Seen:
    """Passes the messages of an answer on and keeps what they say."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 500
        self.begun = self.ended = False
        self._headers: tuple[tuple[bytes, bytes], ...] = ()
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self.status = True, message["status"]
            self._headers = tuple(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            self.ended = not message.get("more_body")
        await self._send(message)

    @property
    def answer(self) -> Answer:
        return Answer(self.status, self._headers, bytes(self._body))


async def replay(app: ASGIApp, call: Call, left: asyncio.Event) -> AsyncGenerator[Message]:
    """The messages with which `app` answers `call`, and then what that took.

    To `app` the client is there until `left` is set.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    visit = Visit(ANYBODY)
    scope = {
        VISIT: visit,
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query,
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
    }

    async def run() -> None:
        try:
            await app(scope, _listen(call.body, left), messages.put)
        finally:
            used = {name: getattr(visit, name) for name in ("rows", "tokens_in", "tokens_out")}
            messages.put_nowait({"type": USAGE, "version": visit.version, "used": used})
            messages.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        task.cancel()


async def read_ahead(receive: Receive, max_bytes: int) -> tuple[bytes, Receive]:
    """The body, and a `receive` that says all of it again; what is too large is read no further."""
    messages: list[Message] = []
    size = 0
    while True:
        message = await receive()
        messages.append(message)
        size += len(message.get("body", b""))
        if not message.get("more_body") or size > max_bytes:
            break
    body = b"".join(message.get("body", b"") for message in messages)
    heard = iter(messages)

    async def again() -> Message:
        return next(heard, None) or await receive()

    return body, again


def _listen(body: bytes, left: asyncio.Event) -> Receive:
    """A request whose client waits until `left` is set."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await left.wait()
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _carried(scope: Scope) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name, value) for name, value in scope["headers"] if name in CARRIED)


async def _drop(message: Any) -> None:
    pass
