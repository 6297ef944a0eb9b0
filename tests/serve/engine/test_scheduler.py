"""No slot leaks: whatever comes, leaves and ends, those that run hold slots 0 to n - 1."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from heliostat.serve.engine.ask import Ask
from heliostat.serve.engine.scheduler import PREFILL_TOKENS, Full, Scheduler, Stream

SLOTS, CONTEXT, WAITING = 4, 2 * PREFILL_TOKENS, 6


class Cache:
    """What stands in each slot; a move copies it as the engine does."""

    def __init__(self) -> None:
        self.slots: list[Stream | None] = [None] * SLOTS


class Arrivals(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SLOTS, CONTEXT, WAITING)
        self.slots: list[Stream | None] = [None] * SLOTS
        self.accepted: list[Stream] = []
        self.begun: list[Stream] = []
        self.ended: list[Stream] = []

    @rule(
        prompts=st.lists(st.sampled_from([1, 7, PREFILL_TOKENS, PREFILL_TOKENS + 1]), max_size=4),
        max_tokens=st.integers(1, 3),
    )
    def submit(self, prompts: Sequence[int], max_tokens: int) -> None:
        streams = [Stream(Ask((1,) * prompt, max_tokens)) for prompt in prompts]
        if len(self.scheduler.waiting) + len(streams) > WAITING:
            with pytest.raises(Full):
                self.scheduler.submit(streams)
        else:
            self.scheduler.submit(streams)
            self.accepted += streams

    @rule()
    def admit(self) -> None:
        first = len(self.scheduler.running)
        begun = self.scheduler.admit()
        self.slots[first : first + len(begun)] = begun
        self.begun += begun
        read = [len(stream.ask.prompt) for stream in begun]
        assert len(read) <= 1 or sum(read) <= PREFILL_TOKENS
        assert begun or not self.scheduler.waiting or first == SLOTS
        for stream in begun:
            stream.made.append(0)

    @rule()
    def decode(self) -> None:
        for stream in self.scheduler.running:
            stream.made.append(0)
        self._take_out([stream for stream in self.scheduler.running if stream.finish])

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.accepted))
        stream.left = True
        for source, target, tokens in self.scheduler.sweep():
            self._copy(source, target, tokens)
        assert stream not in (*self.scheduler.running, *self.scheduler.waiting)

    @rule()
    def clear(self) -> None:
        held = {*self.scheduler.running, *self.scheduler.waiting}
        assert set(self.scheduler.clear()) == held
        assert self.scheduler.idle
        self.accepted = [stream for stream in self.accepted if stream not in held]

    @invariant()
    def everyone_is_at_one_place_and_in_its_slot(self) -> None:
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(running) <= SLOTS
        assert len(waiting) <= WAITING
        assert self.slots[: len(running)] == running
        assert len({*running, *waiting}) == len(running) + len(waiting)
        gone = [s for s in self.accepted if s not in running and s not in waiting]
        assert all(stream.left or stream.finish for stream in gone)
        assert sum(stream.ask.tokens for stream in running) <= SLOTS * CONTEXT

    @invariant()
    def the_oldest_begin_first(self) -> None:
        places = [self.accepted.index(s) for s in self.begun if s in self.accepted]
        assert places == sorted(places)

    def _take_out(self, streams: list[Stream]) -> None:
        for source, target, tokens in self.scheduler.end(streams):
            self._copy(source, target, tokens)

    def _copy(self, source: int, target: int, tokens: int) -> None:
        moving = self.slots[source]
        assert moving is not None
        assert tokens == moving.cached
        self.slots[target] = moving


Arrivals.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_no_slot_leaks = Arrivals.TestCase
