"""Server-sent events, to readers who may be slow or leave; and what is done for one who stays."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from heliostat.serve.identity import REQUEST_ID, find_request_id

PATIENCE_S = 30.0

T = TypeVar("T")


def to_event(document: object) -> bytes:
    return b"data: " + to_json(document) + b"\n\n"


class EventStream(Response):
    """Sends events as they come and closes them at the end.

    It ends early when the reader leaves, or takes longer than `patience_s` to make room for one.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], patience_s: float = PATIENCE_S) -> None:
        super().__init__(headers={"cache-control": "no-cache", REQUEST_ID: find_request_id()})
        del self.headers["content-length"]
        self._events, self._patience_s = events, patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(leave(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
        if not sending.cancelled() and not isinstance(sending.exception(), TimeoutError):
            sending.result()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            async with asyncio.timeout(self._patience_s):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(leave(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def leave(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
