"""When a run is saved: the interval is the best one, and follows what checkpoints cost."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.train.cadence import HOUR, LEAST_SECONDS, Cadence, find_interval
from heliostat.train.goodput import PRODUCTIVE, Attempt

SECONDS = st.floats(0.01, 100)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@given(stall=SECONDS, failure=st.floats(1e3, 1e6), other=st.floats(0.1, 10))
def test_no_other_interval_loses_less_to_checkpoints_and_repeated_steps(
    stall: float, failure: float, other: float
) -> None:
    def loss(interval: float) -> float:
        return stall / interval + interval / (2 * failure)

    best = find_interval(stall, 0, failure)
    assert best == LEAST_SECONDS or loss(best) <= loss(best * other) * (1 + 1e-9)


@given(stall=SECONDS, write=SECONDS, failure=st.floats(1, 1e6))
def test_a_run_is_written_for_a_quarter_of_its_time_at_most(
    stall: float, write: float, failure: float
) -> None:
    assert find_interval(stall, write, failure) >= 4 * write


def test_given_steps_are_kept_to() -> None:
    cadence = Cadence(50)
    assert [step for step in range(1, 201) if cadence.is_due(step)] == [50, 100, 150, 200]


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_the_more_a_run_fails_the_more_often_it_is_saved(failures: int) -> None:
    clock = Clock()
    earlier = [Attempt("try", 0.0, 10, 1, 0.0, {PRODUCTIVE: 200.0})] * failures
    cadence = Cadence("auto", earlier, clock)
    saved = [0.0]
    for step in range(1, 400):
        clock.now += 1.0
        if cadence.is_due(step):
            saved.append(clock.now)
            cadence.count(stall_seconds=0.5, write_seconds=1.0)
    assert saved[1] == LEAST_SECONDS
    mean = (HOUR + 200 * failures + saved[-2]) / (1 + failures)
    assert saved[-1] - saved[-2] == math.ceil(math.sqrt(2 * 0.5 * mean))
