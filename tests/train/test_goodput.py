"""Laws of goodput: every second has one class, over steps, interruptions and resubmissions."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.storage import connect
from heliostat.train import goodput
from heliostat.train.goodput import (
    CHECKPOINT,
    CLASSES,
    DATA,
    PRODUCTIVE,
    QUEUE,
    RESTART,
    STARTUP,
    VALIDATION,
    Attempt,
    Goodput,
    Ledger,
    bound_goodput,
    merge,
)
from heliostat.train.loop import StepReport

SECONDS = st.floats(0, 1e6)
POSITIVE = st.floats(1e-3, 1e6)
# What happens to a run: so many seconds pass, then this is told to the ledger.
EVENTS = st.lists(
    st.tuples(st.sampled_from(["step", CHECKPOINT, VALIDATION, "nothing"]), SECONDS, SECONDS),
    max_size=30,
)
ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        submission=st.sampled_from("ab"),
        began=st.just(0.0),
        step=st.integers(0, 100),
        checkpoints=st.integers(0, 9),
        repeated_seconds=st.just(0.0),
        seconds=st.dictionaries(st.sampled_from(CLASSES), SECONDS),
    ),
    max_size=6,
)


class Clock:
    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def report(step: int, waited: float) -> StepReport:
    return StepReport(step, 1, 1, {"loss": 1.0}, 1.0, 0.1, waited, waited)


def play(ledger: Ledger, clock: Clock, events: list[tuple[str, float, float]], step: int) -> None:
    for kind, seconds, waited in events:
        clock.now += seconds
        if kind == "step":
            step += 1
            ledger.count(report(step, waited))
        elif kind != "nothing":
            with ledger.spend(kind):
                clock.now += waited


def close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-6)


def in_order(attempts: list[Attempt], gaps: Iterator[float]) -> list[Attempt]:
    """The attempts one after another, each some seconds after the one before has ended."""
    ended, ordered = 0.0, []
    for attempt in attempts:
        ordered.append(replace(attempt, began=ended + next(gaps)))
        ended = ordered[-1].ended
    return ordered


@settings(max_examples=50, deadline=None)
@given(EVENTS, st.integers(0, 20), st.dictionaries(st.sampled_from(CLASSES), SECONDS))
def test_classes_sum_to_the_wall_time_and_none_is_negative(
    events: list[tuple[str, float, float]], reached: int, waited: dict[str, float]
) -> None:
    clock = Clock(5.0)
    earlier = [Attempt("job", 0, reached, 0, 0, {})] if reached else []
    ledger = Ledger("job", earlier, waited, clock, lambda: 1e9)
    play(ledger, clock, events, 0)
    attempt = ledger.attempt
    assert attempt.seconds.keys() == set(CLASSES)
    assert min(attempt.seconds.values()) >= 0
    assert 0 <= attempt.repeated_seconds <= attempt.seconds[RESTART] + 1e-6
    assert close(sum(attempt.seconds.values()), clock.now - 5.0 + sum(waited.values()))
    assert close(attempt.began, 1e9 - sum(waited.values()))


@settings(max_examples=50, deadline=None)
@given(ATTEMPTS, st.data())
def test_merged_attempts_of_one_submission_sum_to_the_time_from_the_first_to_the_last(
    attempts: list[Attempt], data: st.DataObject
) -> None:
    same = [replace(attempt, submission="job") for attempt in attempts]
    ordered = in_order(same, iter(lambda: data.draw(POSITIVE), None))
    wall_seconds = ordered[-1].ended - ordered[0].began if ordered else 0.0
    assert close(merge(ordered).wall_seconds, wall_seconds)
    assert min(merge(ordered).seconds.values()) >= 0
    assert merge(data.draw(st.permutations(ordered))) == merge(ordered)


@settings(max_examples=50, deadline=None)
@given(ATTEMPTS, st.data())
def test_time_between_two_submissions_belongs_to_nobody(
    attempts: list[Attempt], data: st.DataObject
) -> None:
    apart = [replace(attempt, submission=str(n)) for n, attempt in enumerate(attempts)]
    ordered = in_order(apart, iter(lambda: data.draw(POSITIVE), None))
    lengths = sum(attempt.ended - attempt.began for attempt in ordered)
    assert close(merge(ordered).wall_seconds, lengths)


def test_each_second_goes_to_its_class() -> None:
    clock = Clock()
    ledger = Ledger("job", waited={QUEUE: 7.0}, clock=clock)
    events = [
        ("step", 10.0, 4.0),
        ("step", 3.0, 1.0),
        (CHECKPOINT, 0.0, 2.0),
        ("step", 3.0, 0.0),
        (VALIDATION, 0.0, 5.0),
        ("step", 1.0, 9.0),
    ]
    play(ledger, clock, events, 0)
    told = {kind: seconds for kind, seconds in ledger.attempt.seconds.items() if seconds}
    assert told == {
        QUEUE: 7.0,
        STARTUP: 4.0,
        PRODUCTIVE: 6.0 + 2.0 + 3.0,
        DATA: 1.0 + 1.0,
        CHECKPOINT: 2.0,
        VALIDATION: 5.0,
    }


def test_steps_that_are_made_again_are_restart_and_not_productive() -> None:
    clock = Clock(100.0)
    earlier = Attempt("job", began=80.0, step=5, checkpoints=1, repeated_seconds=0, seconds={})
    ledger = Ledger("job", [earlier], clock=clock, unix_time=clock)
    play(ledger, clock, [("step", 10.0, 2.0)] * 4, step=3)
    assert ledger.attempt.seconds[RESTART] == 20.0
    assert ledger.attempt.repeated_seconds == 20.0
    assert ledger.attempt.seconds[PRODUCTIVE] == 16.0
    assert ledger.attempt.seconds[DATA] == 4.0
    assert ledger.total.seconds[RESTART] == 20.0 + 20.0
    assert ledger.attempt.step == 7


def test_a_clock_that_jumps_back_takes_no_second_away() -> None:
    clock = Clock(1000.0)
    ledger = Ledger("job", clock=clock)
    play(ledger, clock, [("step", 10.0, 0.0), ("step", -3600.0, 0.0), ("step", 5.0, 0.0)], 0)
    assert ledger.attempt.seconds[PRODUCTIVE] == 15.0
    assert min(ledger.attempt.seconds.values()) == 0


def test_recorded_attempts_are_read_back_in_their_last_state(tmp_path: Path) -> None:
    store = connect(str(tmp_path))
    attempts = [Attempt("job", n * 1e9 + 0.5, n, 1, 0.25, seconds_of(data=0.1)) for n in range(3)]
    for attempt in attempts:
        goodput.record(store, "run", replace(attempt, step=0))
        goodput.record(store, "run", attempt)
    assert goodput.load_attempts(store, "run") == attempts
    assert goodput.load_attempts(store, "other") == []


# --- The bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure_seconds", "goodput_share"), [(60, 0.62), (300, 0.89), (3600, 0.98)]
)
def test_the_bound_is_that_of_young_and_daly(failure_seconds: float, goodput_share: float) -> None:
    assert bound_goodput(0.5, 15, failure_seconds) == pytest.approx(goodput_share, abs=0.005)


@settings(max_examples=50, deadline=None)
@given(POSITIVE, SECONDS, POSITIVE, POSITIVE)
def test_no_other_interval_between_checkpoints_loses_less(
    checkpoint: float, restart: float, failure: float, interval: float
) -> None:
    loses = checkpoint / interval + interval / (2 * failure) + restart / failure
    assert bound_goodput(checkpoint, restart, failure) >= 1 - loses - 1e-9


@settings(max_examples=50, deadline=None)
@given(SECONDS, SECONDS, POSITIVE, st.floats(1, 10))
def test_the_bound_is_a_share_that_falls_with_every_cost(
    checkpoint: float, restart: float, failure: float, factor: float
) -> None:
    bound = bound_goodput(checkpoint, restart, failure)
    assert 0 <= bound <= 1
    assert bound_goodput(checkpoint * factor, restart, failure) <= bound
    assert bound_goodput(checkpoint, restart * factor, failure) <= bound
    assert bound_goodput(checkpoint, restart, failure * factor) >= bound


def seconds_of(**given: float) -> dict[str, float]:
    return {**dict.fromkeys(CLASSES, 0.0), **given}


def test_the_bound_takes_waiting_starting_and_validating_as_given() -> None:
    core = seconds_of(productive=80, checkpoint=4, restart=16)
    plain = Goodput(core, checkpoints=8, failures=2, repeated_seconds=6)
    assert plain.bound == bound_goodput(4 / 8, (16 - 6) / 2, 100 / 2)
    longer = Goodput({**core, QUEUE: 50, STARTUP: 30, VALIDATION: 20}, 8, 2, 6)
    assert longer.bound == pytest.approx(plain.bound / 2)


@pytest.mark.parametrize(
    ("seconds", "counts", "said"),
    [
        ({}, (0, 0, 0), "goodput 0.0%: nothing yet"),
        ({"productive": 120, "data": 2, "startup": 6.85}, (3, 0, 0), "goodput 93.1%: productive"),
        (
            {"productive": 1200, "checkpoint": 2.5, "restart": 10},
            (5, 1, 0),
            "goodput 99.0% (bound 96.3%): productive 1,200 s, checkpoint 2.5 s, restart 10 s",
        ),
    ],
)
def test_the_line_tells_the_share_the_bound_and_the_classes(
    seconds: dict[str, float], counts: Any, said: str
) -> None:
    assert Goodput(seconds_of(**seconds), *counts).render().startswith(said)


@settings(max_examples=50, deadline=None)
@given(ATTEMPTS)
def test_what_is_emitted_is_json_with_every_class(attempts: list[Attempt]) -> None:
    values = merge(attempts).values
    assert {f"goodput/{kind}" for kind in CLASSES} <= values.keys()
    json.dumps(values, allow_nan=False)
