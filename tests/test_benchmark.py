"""What the benchmark of training reads out of the records that a run leaves."""

from pathlib import Path

import pytest

from heliostat import storage
from heliostat.benchmark.train import ROUND_STEPS, TOLD, find_pace, read_events
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


def test_the_pace_is_that_of_the_steady_steps() -> None:
    slow = [10.0 * step for step in range(ROUND_STEPS // 3)]
    steady = [slow[-1] + 0.5 * step for step in range(1, ROUND_STEPS - len(slow) + 1)]
    assert find_pace((slow + steady)[TOLD - 1 :: TOLD]) == 0.5
