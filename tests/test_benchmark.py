"""What the benchmark of training reads out of the records that a run leaves, and its turns."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from heliostat import storage
from heliostat.benchmark import turns
from heliostat.benchmark.train import read_events
from heliostat.benchmark.turns import WARM_TURNS, Turn, compare, find_paces
from heliostat.metrics import emit
from heliostat.train.events import EventFiles


@pytest.mark.parametrize("max_bytes", [1, 2**20])
def test_the_ends_of_the_steps_of_each_attempt_are_read_back(
    tmp_path: Path, max_bytes: int
) -> None:
    store = storage.connect(str(tmp_path))
    for began, first_step in ((1000.0, 0), (2000.0, 3)):
        now = began
        files = EventFiles(store, "run", first_step, lambda: now, max_bytes)  # noqa: B023
        for step in range(first_step + 1, first_step + 6):
            now = began + step
            emit(step, {"loss": 1.0}, [files])
            files.upload()
            now += 0.5  # what is told of a step later is not its end
            emit(step, {"samples_per_second": 1.0}, [files])
        files.upload()
    assert read_events(store, "run") == [
        [1001, 1002, 1003, 1004, 1005],
        [2004, 2005, 2006, 2007, 2008],
    ]


def test_the_pace_is_that_within_the_turns_of_one_side() -> None:
    taken = [Turn(number % 2, 10.0 * number, 10.0 * number + 9.6) for number in range(12)]
    ends: list[list[float]] = [[], []]
    for turn, pace in zip(taken, (0.1, 0.7) * 6, strict=True):
        steps = int(9.6 / pace)
        ends[turn.side] += [turn.start + pace * step for step in range(1, steps + 1)]
    for side, pace in enumerate((0.1, 0.7)):
        assert find_paces(taken, side, ends[side], 1) == pytest.approx([pace] * (6 - WARM_TURNS))
        rare = ends[side][2::3]
        assert find_paces(taken, side, rare, 3) == pytest.approx([pace] * (6 - WARM_TURNS))


def test_noise_that_lasts_longer_than_a_turn_is_in_both_sides() -> None:
    noise = [1 + 0.1 * turn for turn in range(20)]  # the machine gets slower and slower
    ones, others = [0.9 * level for level in noise[::2]], noise[1::2]
    assert compare(ones, others) == pytest.approx((0.9, 0))


def test_who_waits_for_a_turn_is_stopped_and_all_go_on_in_the_end(
    monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.0)
    with ExitStack() as stack:
        sleepers = [stack.enter_context(run_sleeper()) for _ in range(2)]
        taken = 0

        def run() -> bool:
            nonlocal taken
            if taken:
                side = (taken - 1) % 2
                wait_until(lambda: is_stopped(sleepers[1 - side]))
                wait_until(lambda: not is_stopped(sleepers[side]))
            taken += 1
            return taken < 6

        assert [turn.side for turn in turns.take_turns(([sleepers[0]], [sleepers[1]]), run)] == [
            *(0, 1, 0, 1, 0)
        ]
        for pid in sleepers:
            wait_until(lambda pid=pid: not is_stopped(pid))


@contextmanager
def run_sleeper() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED
