"""Which streams run, and in which slot of the cache: decisions alone, without a tensor."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from heliostat.serve.engine.ask import Ask

PREFILL_TOKENS = 64  # of the prompts that begin in one step: few, so that the first need not wait


class Full(Exception):
    """As many streams wait as may."""


class Move(NamedTuple):
    """The first `tokens` of slot `source` have to go to slot `target`."""

    source: int
    target: int
    tokens: int


@dataclass(eq=False)
class Stream:
    """An ask and the tokens `made` of it; it has `left` when nobody wants more of them."""

    ask: Ask
    made: list[int] = field(default_factory=list, init=False)
    left: bool = field(default=False, init=False)
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.ask.sampling.seed)

    @property
    def cached(self) -> int:
        """Tokens that the cache holds of it: all but the last one."""
        return len(self.ask.prompt) + len(self.made) - 1

    @property
    def finish(self) -> str | None:
        """Why it has ended: `stop`, `length`, or None as it has not."""
        if self.made and self.made[-1] in self.ask.ends:
            return "stop"
        return "length" if len(self.made) >= self.ask.max_tokens else None


class Scheduler:
    """Streams wait in the order they came, then run until they end.

    Those that run hold slots 0 to n - 1 of `slots`, in the order of `running`, so a step computes
    the first n rows of the cache and no others. A slot has room for `context` tokens.
    """

    def __init__(self, slots: int, context: int, max_waiting: int) -> None:
        self.slots, self.context, self.max_waiting = slots, context, max_waiting
        self.waiting: deque[Stream] = deque()
        self.running: list[Stream] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, streams: Sequence[Stream]) -> None:
        """Let all of them wait.

        Raises:
            Full: not all of them may.
        """
        assert all(stream.ask.prompt and stream.ask.max_tokens > 0 for stream in streams)
        assert all(stream.ask.tokens <= self.context for stream in streams)
        if len(self.waiting) + len(streams) > self.max_waiting:
            raise Full
        self.waiting.extend(streams)

    def admit(self) -> list[Stream]:
        """Those that begin now: the oldest, as slots are free and prompts fit one step."""
        first, tokens = len(self.running), 0
        while self.waiting and len(self.running) < self.slots:
            tokens += len(self.waiting[0].ask.prompt)
            if tokens > PREFILL_TOKENS and len(self.running) > first:
                break
            self.running.append(self.waiting.popleft())
        return self.running[first:]

    def sweep(self) -> Iterator[Move]:
        """Take out those that have left, wherever they are."""
        if any(stream.left for stream in self.waiting):
            self.waiting = deque(stream for stream in self.waiting if not stream.left)
        yield from self.end([stream for stream in self.running if stream.left])

    def end(self, streams: Sequence[Stream]) -> Iterator[Move]:
        """Take them out of their slots; the last one that runs moves into each that is free."""
        for stream in streams:
            slot, last = self.running.index(stream), len(self.running) - 1
            moving = self.running.pop()
            if slot != last:
                self.running[slot] = moving
                yield Move(last, slot, moving.cached)

    def clear(self) -> list[Stream]:
        """Take out all of them; returns who they were."""
        streams = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        return streams
