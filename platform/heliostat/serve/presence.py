"""Whether the client is still there: the work for one who has left is ended."""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

WATCH_AFTER_S = 0.05


class Presence:
    """Cancels a request whose client leaves, looking from `after_s` after its body was read on.

    Most are answered by then and cost next to nothing. What listens for the end itself is left to.
    """

    def __init__(self, app: ASGIApp, after_s: float = WATCH_AFTER_S) -> None:
        self._app, self._after_s = app, after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = asyncio.current_task()
        if scope["type"] != "http" or request is None:
            await self._app(scope, receive, send)
            return
        watch = _Watch(request, receive, send, self._after_s)
        try:
            await self._app(scope, watch.receive, watch.send)
        except asyncio.CancelledError:
            if not watch.has_left:
                raise
            request.uncancel()
        finally:
            watch.end()


class _Watch:
    """Between the server and the application: what passes says when there is who to wait for."""

    def __init__(
        self, request: "asyncio.Task[Any]", receive: Receive, send: Send, after_s: float
    ) -> None:
        self._request, self._receive, self._send, self._after_s = request, receive, send, after_s
        self._others = 0
        self._timer: asyncio.TimerHandle | None = None
        self._leaving: asyncio.Future[Message] | None = None
        self.has_left = False

    async def receive(self) -> Message:
        self._others += 1
        try:
            message = await self._receive()
        finally:
            self._others -= 1
        if (
            self._timer is None
            and message["type"] == "http.request"
            and not message.get("more_body")
        ):
            self._timer = asyncio.get_running_loop().call_later(self._after_s, self._listen)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.end()  # to a server the end of an answer is an end like any other
        await self._send(message)

    def end(self) -> None:
        if self._timer:
            self._timer.cancel()
        if self._leaving:
            self._leaving.remove_done_callback(self._cancel)
            self._leaving.cancel()

    def _listen(self) -> None:
        if not self._others:
            self._leaving = asyncio.ensure_future(self._receive())
            self._leaving.add_done_callback(self._cancel)

    def _cancel(self, leaving: "asyncio.Future[Message]") -> None:
        if not leaving.cancelled() and not leaving.exception():
            self.has_left = True
            self._request.cancel()
