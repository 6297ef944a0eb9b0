"""Continuous batching, a step at a time: streams come and go between two steps."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from heliostat.serve.engine.ask import Ask
from heliostat.serve.engine.decoder import Decoder
from heliostat.serve.engine.sampler import Token, choose
from heliostat.serve.engine.scheduler import Move, Scheduler, Stream

TURN_SECONDS = 0.05  # for which prompts are read before those that run go on; a step longer at most


class Made(NamedTuple):
    """The next token of a stream; `finish` is why it is the last one."""

    stream: Stream
    token: Token
    finish: str | None


class Engine:
    """One thread steps; others may submit streams, and let them leave, at any time."""

    def __init__(
        self,
        decoder: Decoder,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.decoder, self.scheduler, self._clock = decoder, scheduler, clock
        self._lock = threading.Lock()  # of the queue of those that wait
        self._turn_began: float | None = None

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def submit(self, streams: Sequence[Stream]) -> None:
        """Raises Full: too many wait already."""
        with self._lock:
            self.scheduler.submit(streams)

    def step(self) -> list[Made]:
        """Read the prompts that begin, or give a token to each stream that runs: in turns."""
        with self._lock:
            self._move(self.scheduler.sweep())
            begun = self._begin()
        running = begun or self.scheduler.running.copy()
        if not running:
            return []
        rows = sum(len(stream.ask.prompt) for stream in begun) or len(running)
        with self.decoder.threads(rows):
            tokens = choose(self._compute(begun, running), running)
        made = []
        for stream, token in zip(running, tokens, strict=True):
            stream.made.append(token.id)
            made.append(Made(stream, token, stream.finish))
        self._move(self.scheduler.end([one.stream for one in made if one.finish]))
        return made

    def _begin(self) -> list[Stream]:
        """Those whose prompts are read now: the turn of all others comes after TURN_SECONDS."""
        now = self._clock()
        since = now if self._turn_began is None else self._turn_began
        begun = self.scheduler.admit() if now - since < TURN_SECONDS else []
        self._turn_began = since if begun else None
        return begun

    def clear(self) -> list[Stream]:
        """Forget all streams, after a step that failed; returns who they were."""
        with self._lock:
            return self.scheduler.clear()

    def generate(self, asks: Sequence[Ask]) -> list[list[int]]:
        """The tokens of each ask, in this thread, until all have ended."""
        streams = [Stream(ask) for ask in asks]
        self.submit(streams)
        while not all(stream.finish for stream in streams):
            self.step()
        return [stream.made for stream in streams]

    def _compute(self, begun: Sequence[Stream], running: Sequence[Stream]) -> Tensor:
        """Logits (N, V): of those that have begun after their prompts, else of all that run."""
        if begun:
            first = len(self.scheduler.running) - len(begun)
            return self.decoder.prefill(first, [stream.ask.prompt for stream in begun])
        tokens = [stream.made[-1] for stream in running]
        return self.decoder.decode(tokens, [stream.cached for stream in running])

    def _move(self, moves: Iterable[Move]) -> None:
        for move in moves:
            self.decoder.move(*move)
