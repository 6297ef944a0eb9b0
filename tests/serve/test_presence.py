"""A request ends when its client leaves, and for no other reason."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serve.presence import Presence

BODY: Message = {"type": "http.request", "body": b"", "more_body": False}
LEFT: Message = {"type": "http.disconnect"}
START: Message = {"type": "http.response.start", "status": 200, "headers": []}
END: Message = {"type": "http.response.body", "body": b""}


class Server:
    """The server's side of one request, as uvicorn has it: an end of the answer is an end."""

    def __init__(self) -> None:
        self.read = False
        self.ended = asyncio.Event()
        self.listeners = self.most_listeners = 0
        self.listened = asyncio.Event()

    async def receive(self) -> Message:
        if not self.read:
            self.read = True
            return BODY
        self.listeners += 1
        self.most_listeners = max(self.listeners, self.most_listeners)
        self.listened.set()
        try:
            await self.ended.wait()
        finally:
            self.listeners -= 1
        return LEFT

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.ended.set()


async def call(app: ASGIApp, server: Server, after_s: float = 0.0) -> None:
    await Presence(app, after_s)({"type": "http"}, server.receive, server.send)


def run(test: Callable[[Server], Awaitable[None]]) -> None:
    async def begin() -> None:
        async with asyncio.timeout(60):
            await test(Server())

    asyncio.run(begin())


def test_what_works_for_a_client_who_left_is_cancelled() -> None:
    async def test(server: Server) -> None:
        ended: list[str] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("charged")

        request = asyncio.create_task(call(app, server))
        await server.listened.wait()
        assert not request.done()
        server.ended.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert request.done()
        assert request.exception() is None
        assert ended == ["charged"]

    run(test)


def test_what_follows_an_answer_is_not() -> None:
    async def test(server: Server) -> None:
        settled = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await server.listened.wait()
            await send(START)
            await send(END)
            for _ in range(5):
                await asyncio.sleep(0)
            settled.set()

        await call(app, server)
        assert settled.is_set()

    run(test)


def test_an_application_that_listens_is_left_to() -> None:
    async def test(server: Server) -> None:
        heard: list[Message] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            heard.append(await receive())

        request = asyncio.create_task(call(app, server))
        await server.listened.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        server.ended.set()
        await request
        assert heard == [LEFT]
        assert server.most_listeners == 1

    run(test)


def test_a_request_that_is_short_is_not_watched() -> None:
    async def test(server: Server) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send(START)
            await send(END)

        await call(app, server, after_s=3600)
        assert server.most_listeners == 0

    run(test)


def test_a_server_that_stops_is_obeyed() -> None:
    async def test(server: Server) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await asyncio.Event().wait()

        request = asyncio.create_task(call(app, server))
        await server.listened.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        for _ in range(5):
            await asyncio.sleep(0)
        assert server.listeners == 0

    run(test)
