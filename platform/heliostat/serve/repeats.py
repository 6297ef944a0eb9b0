"""An ASGI layer: what comes again with the same Idempotency-Key gets the answer that was given."""

import asyncio
import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serve.desk import Away
from heliostat.serve.door import TIMEOUT_HEADER, Limits, shorten, within
from heliostat.serve.fork import read_ahead
from heliostat.serve.gate import ANYBODY, VISIT, Visit
from heliostat.serve.identity import REQUEST_ID, find_request_id
from heliostat.serve.receipts import (
    CLAIM_SECONDS,
    MAX_ANSWER_BYTES,
    Question,
    Receipt,
    Standing,
)
from heliostat.serve.replies import Refusal

logger = logging.getLogger(__name__)

HEADER = b"idempotency-key"
FORM = re.compile(rb"[!-~]{1,200}")
REPEATED = (b"idempotent-replayed", b"true")
MEANT = frozenset({b"content-type", b"accept", b"inference-header-content-length"})
ASK_SECONDS = 2.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.25
MAX_WAITING = 64  # at once; who comes then is told to come again


class Book(Protocol):
    """The receipts of all replicas; both raise Away where they cannot be reached."""

    async def claim(self, question: Question, claimant: str) -> Standing: ...

    async def settle(self, question: Question, claimant: str, receipt: Receipt | None) -> None: ...


class Repeats:
    """Without the header a request costs a look for it.

    Kept are answers of status 200 that were sent whole. Who comes while the first of the same is
    being answered waits for that, as long as a request may take.
    """

    def __init__(self, app: ASGIApp, book: Book, limits: Limits) -> None:
        self._app, self._book, self._limits = app, book, limits
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        names = is_post and [value for name, value in scope["headers"] if name == HEADER]
        if not names:
            await self._app(scope, receive, send)
            return
        name, limits = read_name(names), self._limits
        seconds = shorten(_find_timeout(scope), limits.request_timeout_s)
        async with within(seconds):
            body, receive = await read_ahead(receive, limits.max_body_bytes)
        if len(body) > limits.max_body_bytes:
            await self._app(scope, receive, send)
            return
        visit: Visit = scope.get(VISIT) or Visit(ANYBODY)
        question = Question(visit.key.id, name, digest(scope, body))
        claimant = secrets.token_hex(16)
        standing = await self._await_turn(question, claimant, seconds)
        if isinstance(standing, Receipt):
            await repeat(standing, visit, send)
            return
        if standing == "other":
            raise Refusal(
                422,
                "this Idempotency-Key was used with another request: give each its own",
                HEADER.decode(),
            )
        if standing == "busy":
            raise Refusal(
                409,
                "the first request with this Idempotency-Key is being answered: retry later",
                HEADER.decode(),
                {"retry-after": "1"},
            )
        await self._answer(question, claimant, visit, (scope, receive, send))

    async def _answer(
        self,
        question: Question,
        claimant: str,
        visit: Visit,
        call: tuple[Scope, Receive, Send],
    ) -> None:
        scope, receive, send = call
        copy, receipt = Copy(send), None
        try:
            async with self._hold(question, claimant):
                await self._app(scope, receive, copy.send)
            receipt = copy.make_receipt(visit)
        finally:
            await asyncio.shield(self._settle(question, claimant, receipt))

    async def _await_turn(self, question: Question, claimant: str, seconds: float) -> Standing:
        pause, deadline = FIRST_PAUSE_S, asyncio.get_running_loop().time() + seconds
        self._waiting += 1
        try:
            while (standing := await self._claim(question, claimant)) == "busy":
                late = asyncio.get_running_loop().time() + pause > deadline
                if late or self._waiting > MAX_WAITING:
                    break
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            return standing
        finally:
            self._waiting -= 1

    async def _claim(self, question: Question, claimant: str) -> Standing:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                return await self._book.claim(question, claimant)
        except (Away, TimeoutError) as error:
            raise Refusal(
                503, "idempotency keys cannot be looked up now: retry later, or without one"
            ) from error

    @asynccontextmanager
    async def _hold(self, question: Question, claimant: str) -> AsyncIterator[None]:
        """The claim does not end within, however long that takes."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(CLAIM_SECONDS / 3)
                try:
                    await self._book.claim(question, claimant)
                except Away:
                    logger.warning("a claim on an idempotency key could not be renewed")

        renewing = asyncio.ensure_future(renew())
        try:
            yield
        finally:
            renewing.cancel()

    async def _settle(self, question: Question, claimant: str, receipt: Receipt | None) -> None:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await self._book.settle(question, claimant, receipt)
        except (Away, TimeoutError):
            logger.warning("an answer under an idempotency key could not be kept")


class Copy:
    """Passes the messages of an answer on, and keeps them if they are no more than may be kept."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._headers: tuple[tuple[bytes, bytes], ...] = ()
        self._body, self._size, self._is_whole = list[bytes](), 0, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._headers = tuple((name, value) for name, value in message.get("headers", ()))
        elif message["type"] == "http.response.body":
            part = bytes(message.get("body", b""))
            self._size += len(part)
            if self._size <= MAX_ANSWER_BYTES:
                self._body.append(part)
            self._is_whole = not message.get("more_body")
        await self._send(message)

    def make_receipt(self, visit: Visit) -> Receipt | None:
        if visit.status != 200 or not self._is_whole or self._size > MAX_ANSWER_BYTES:
            return None
        return Receipt(self._headers, b"".join(self._body), visit.model, visit.version)


async def repeat(receipt: Receipt, visit: Visit, send: Send) -> None:
    """Send what was sent before, under the id of this request; nothing of it is charged again."""
    visit.enter(receipt.model)
    visit.version = receipt.version
    name = REQUEST_ID.encode()
    kept = [pair for pair in receipt.headers if pair[0] != name]
    headers = [*kept, (name, find_request_id().encode()), REPEATED]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": receipt.body, "more_body": False})


def read_name(values: list[bytes]) -> str:
    """Raises Refusal: 400, there are several, or it is none."""
    if len(values) > 1 or not FORM.fullmatch(values[0]):
        sentence = "Idempotency-Key must be given once, of 1 to 200 visible ASCII characters"
        raise Refusal(400, sentence, HEADER.decode())
    return values[0].decode()


def digest(scope: Scope, body: bytes) -> bytes:
    """SHA-256 of all that an answer depends on."""
    meant = sorted((name, value) for name, value in scope["headers"] if name in MEANT)
    parts = [
        scope["path"].encode(),
        scope["query_string"],
        *(part for one in meant for part in one),
    ]
    hashed = hashlib.sha256()
    for part in (*parts, body):
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.digest()


def _find_timeout(scope: Scope) -> str | None:
    wanted = (value for name, value in scope["headers"] if name == TIMEOUT_HEADER.encode())
    value: bytes | None = next(wanted, None)
    return None if value is None else value.decode("latin-1")
