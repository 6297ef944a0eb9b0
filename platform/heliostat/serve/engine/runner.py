"""The engine beside an event loop: steps in a thread, tokens to whoever awaits them."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from heliostat.serve.engine.ask import Ask
from heliostat.serve.engine.engine import Engine, Made
from heliostat.serve.engine.scheduler import Stream

logger = logging.getLogger(__name__)


class Failed(Exception):
    """The engine failed in the middle of an answer; its log has the reason."""


@dataclass(eq=False)
class Heard(Stream):
    """A stream of an answer; `number` is its place among the asks."""

    answer: "Answer"
    number: int


class Answer:
    """What is made of the asks of one request; leaving the `with` block ends what still runs."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self.streams = [Heard(ask, answer=self, number=i) for i, ask in enumerate(asks)]
        self._made: list[Made] = []
        self._open = len(asks)
        self._failure: Exception | None = None
        self._news: asyncio.Future[None] | None = None

    def __enter__(self) -> "Answer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()

    def leave(self) -> None:
        for stream in self.streams:
            stream.left = True

    async def wait(self) -> None:
        """Until there is something to take.

        Raises:
            Failed: there will be no more.
        """
        if self._open and not self._made and not self._failure:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if self._failure:
            raise self._failure

    async def take(self) -> list[Made]:
        """All that was made since the last call, at least one; [] when every stream has ended.

        Raises:
            Failed: there will be no more.
        """
        await self.wait()
        made, self._made = self._made, []
        return made

    def add(self, made: Made) -> None:
        self._made.append(made)
        self._open -= made.finish is not None
        self._tell()

    def fail(self, failure: Exception) -> None:
        """Whoever waits for more gets `failure` raised."""
        self._failure = failure
        self._tell()

    def _tell(self) -> None:
        if self._news and not self._news.done():
            self._news.set_result(None)


class Runner:
    """Steps the engine in `pool` while there is work; between two steps the pool is others'."""

    def __init__(self, engine: Engine, pool: Executor) -> None:
        self.engine = engine
        self._pool = pool
        self._lock = threading.Lock()
        self._stepping = False

    @property
    def size(self) -> int:
        """Bytes of the weights and of the cache of keys and values."""
        return self.engine.decoder.size

    @property
    def context(self) -> int:
        return self.engine.decoder.context

    @property
    def max_waiting(self) -> int:
        return self.engine.scheduler.max_waiting

    def check(self) -> None:
        """It lives as long as this process."""

    def start(self, asks: Sequence[Ask]) -> Answer:
        """Begin to answer; called in the event loop that will await the answer.

        Raises:
            Full: too many wait already.
        """
        answer = Answer(asks)
        self._loop = asyncio.get_running_loop()
        self.engine.submit(answer.streams)
        with self._lock:
            starts, self._stepping = not self._stepping, True
        if starts:
            self._pool.submit(self._step)
        return answer

    def _step(self) -> None:
        try:
            self._call(_deliver, self.engine.step())
        except Exception:
            logger.exception("the engine failed")
            self._call(_fail, self.engine.clear())
        with self._lock:
            self._stepping = goes_on = not self.engine.idle
        if goes_on:
            self._pool.submit(self._step)

    def _call(self, function: Callable[[Any], None], value: Any) -> None:
        if value:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(function, value)


def _deliver(made: Sequence[Made]) -> None:
    for one in made:
        if isinstance(one.stream, Heard) and not one.stream.left:
            one.stream.answer.add(one)


def _fail(streams: Sequence[Stream]) -> None:
    for stream in streams:
        if isinstance(stream, Heard):
            stream.answer.fail(Failed())
