"""When a run is saved: often enough to lose little to a failure, seldom enough to cost little."""

import math
import time
from collections.abc import Sequence
from typing import Literal

from heliostat.train.goodput import Attempt, Clock

LEAST_SECONDS = 5.0
WRITE_SHARE = 0.25  # of the time, in which at most a checkpoint is written beside the run
HOUR = 3600.0


class Cadence:
    """Says at each step whether to save: every so many steps, or with `auto` by `find_interval`.

    The mean time to a failure is that of the `earlier` attempts and this one, with an hour without
    a failure before them.
    """

    def __init__(
        self,
        steps: int | Literal["auto"],
        earlier: Sequence[Attempt] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        self._steps, self._clock = steps, clock
        self._failures = len(earlier)
        self._ran_before = HOUR + sum(sum(attempt.seconds.values()) for attempt in earlier)
        self._began = self._saved = clock()
        self._interval = LEAST_SECONDS

    def is_due(self, step: int) -> bool:
        if self._steps != "auto":
            return step % self._steps == 0
        return self._clock() - self._saved >= self._interval

    def count(self, stall_seconds: float, write_seconds: float) -> None:
        """Tell of a checkpoint: for how long it held the run up, how long the one before took."""
        self._saved = self._clock()
        ran = self._ran_before + self._saved - self._began
        failure_seconds = ran / (1 + self._failures)
        self._interval = find_interval(stall_seconds, write_seconds, failure_seconds)


def find_interval(stall_seconds: float, write_seconds: float, failure_seconds: float) -> float:
    """Seconds from a checkpoint to the next: sqrt(2CM), Young 1974.

    C is for how long a checkpoint holds the run up, M the mean time to a failure. It is long enough
    that the run is written for WRITE_SHARE of its time at most.
    """
    best = math.sqrt(2 * stall_seconds * failure_seconds)
    return max(best, write_seconds / WRITE_SHARE, LEAST_SECONDS)
