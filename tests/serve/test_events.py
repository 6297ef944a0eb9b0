"""Work for a client that leaves, or that nobody waits for any more."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from heliostat.serve.events import while_connected


class Work:
    """What charges at its end, as a text does."""

    def __init__(self) -> None:
        self.begun, self.charged = asyncio.Event(), False

    async def __call__(self) -> None:
        try:
            self.begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.charged = True


def test_what_a_client_left_behind_is_charged_before_the_answer() -> None:
    async def run() -> None:
        work = Work()

        async def receive() -> Message:
            await work.begun.wait()
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnect):
            await while_connected(Request({"type": "http"}, receive), work())
        assert work.charged

    asyncio.run(run())


def test_what_came_too_late_is_charged_before_the_answer() -> None:
    async def run() -> None:
        work = Work()

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        waiting = asyncio.ensure_future(while_connected(Request({"type": "http"}, receive), work()))
        await work.begun.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert work.charged

    asyncio.run(run())
