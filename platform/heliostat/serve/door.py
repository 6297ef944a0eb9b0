"""The door of a replica: how many requests are inside, for how long, and how large they may be."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType

from starlette.requests import Request
from starlette.responses import Response

from heliostat.serve.replies import Refusal

Handler = Callable[[Request, bytes], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]
TIMEOUT_HEADER = "x-timeout-seconds"
SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


@dataclass(frozen=True)
class Limits:
    max_body_bytes: int
    max_requests: int
    request_timeout_s: float


class Door:
    """Lets a request in while there is room, reads its body, and ends it when its time is over."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._room = Room(limits.max_requests)

    def guard(self, handle: Handler) -> Endpoint:
        """An endpoint that calls `handle` with the whole body.

        A response that is streamed is in time once it has begun, and leaves the room then.
        """
        limits = self.limits

        async def endpoint(request: Request) -> Response:
            seconds = shorten(request.headers.get(TIMEOUT_HEADER), limits.request_timeout_s)
            with self._room:
                async with within(seconds):
                    return await handle(request, await read_body(request, limits.max_body_bytes))

        return endpoint


@asynccontextmanager
async def within(seconds: float, began: float | None = None) -> AsyncIterator[None]:
    """Time for what is inside, from now or from when the clock of the loop said `began`.

    Raises:
        Refusal: 408, it is over.
    """
    start = asyncio.get_running_loop().time() if began is None else began
    try:
        async with asyncio.timeout_at(start + seconds):
            yield
    except TimeoutError as error:
        raise Refusal(408, f"no answer within {seconds:g} s") from error


def shorten(wanted: str | None, limit_s: float) -> float:
    """The seconds that a client asks for, if they are fewer than the limit.

    Raises:
        Refusal: 400, it asks for something that is no number of seconds above 0.
    """
    if wanted is None:
        return limit_s
    if not SECONDS.fullmatch(wanted) or not float(wanted):
        raise Refusal(400, f"{TIMEOUT_HEADER} must be a number of seconds above 0", TIMEOUT_HEADER)
    return min(float(wanted), limit_s)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; reading stops as soon as it is too large, whatever length was declared.

    Raises:
        Refusal: 413, the body has more than `max_bytes`.
    """
    first, rest = b"", bytearray()  # most bodies come in one piece, which needs no copy
    async for chunk in request.stream():
        if first:
            rest += chunk
        else:
            first = chunk
        if len(first) + len(rest) > max_bytes:
            raise Refusal(413, f"the body has more than {max_bytes:,} bytes", "body")
    return b"".join((first, rest)) if rest else first


class Room:
    """At most `limit` requests are inside at once, the next one is refused instead of waiting."""

    def __init__(self, limit: int) -> None:
        self.limit, self.inside = limit, 0

    def __enter__(self) -> None:
        if self.inside >= self.limit:
            raise Refusal(429, f"{self.limit} requests are waiting already, retry later")
        self.inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.inside -= 1
