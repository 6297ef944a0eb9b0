"""What a replica is asked: how many requests are inside it, and how soon answers begin."""

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.serve.delivery import SLOTS, Tally, find_slot
from heliostat.serve.scaling import INSIDE, LATENCY_MS, REQUESTS

SHARE = 0.95


class Load:
    """An ASGI layer that measures. A text that is streamed is timed to its first piece; a refusal,
    which is quick when there is too much to do, is not timed."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._inside = 0
        self._area = 0.0  # requests times seconds inside
        self._since = self._at = clock()
        self._slots = [0] * SLOTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = self._step(+1)
        counts = False

        async def tell(message: Message) -> None:
            nonlocal counts
            if message["type"] == "http.response.start":
                counts = message["status"] < 400
            elif counts and message.get("body"):
                counts = False
                self._slots[find_slot(self._clock() - began)] += 1
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            self._step(-1)

    def take(self) -> dict[str, float]:
        """What was measured since this was asked last."""
        now = self._step(0)
        seconds = now - self._since
        slots, self._slots = tuple(self._slots), [0] * SLOTS
        area, self._area, self._since = self._area, 0.0, now
        return {
            INSIDE: area / seconds if seconds else float(self._inside),
            REQUESTS: float(sum(slots)),
            LATENCY_MS: 1000 * Tally(slots=slots).quantile(SHARE),
        }

    def _step(self, change: int) -> float:
        """Now, from which on there is one request more or less inside."""
        now = self._clock()
        self._area += self._inside * (now - self._at)
        self._at = now
        self._inside += change
        return now
