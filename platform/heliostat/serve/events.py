"""Server-sent events, to readers who may be slow or leave; and what is done for one who stays."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from heliostat.serve.identity import REQUEST_ID, find_request_id

PATIENCE_S = 30.0

T = TypeVar("T")


def to_event(document: object) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


class EventStream(Response):
    """Sends events as they come and closes them at the end.

    It ends early when the reader leaves, or takes longer than `patience_s` to make room for one.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], patience_s: float = PATIENCE_S) -> None:
        super().__init__(headers={"cache-control": "no-cache", REQUEST_ID: find_request_id()})
        del self.headers["content-length"]
        self._events, self._patience_s = events, patience_s
        self._waits_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(leave(receive))
        try:
            await self._await_end({sending, leaving})
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
        if not sending.cancelled():
            sending.result()

    async def _await_end(self, tasks: "set[asyncio.Future[None]]") -> None:
        """Until one of `tasks` has ended, or the reader has made no room for too long."""
        now = asyncio.get_running_loop().time
        done = set[asyncio.Future[None]]()
        while not done:
            since = self._waits_since
            left = self._patience_s if since is None else since + self._patience_s - now()
            if since is not None and left <= 0:
                return
            done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    async def _send(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            self._waits_since = now()
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._waits_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, which is cancelled when the client leaves or nobody waits any more.

    It has ended when this does: what it charges at its end is charged.

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
        await asyncio.wait({working})


async def leave(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
