"""Where the seconds of a run went: each in one class, over every attempt that the run took."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from heliostat.storage import Store
from heliostat.storage.documents import Damaged, read_document
from heliostat.train.loop import StepReport

PRODUCTIVE, DATA, CHECKPOINT, VALIDATION = "productive", "data", "checkpoint", "validation"
RESTART, QUEUE, STARTUP = "restart", "queue", "startup"
CLASSES = (PRODUCTIVE, DATA, CHECKPOINT, VALIDATION, RESTART, QUEUE, STARTUP)

Clock = Callable[[], float]


@dataclass(frozen=True)
class Attempt:
    """One life of the training workers; its `seconds` by class add up to its length.

    `submission` names the job that it belongs to, `began` is Unix time, `step` the last step made,
    `repeated_seconds` the part of the class restart in which steps were made a second time.
    """

    submission: str
    began: float
    step: int
    checkpoints: int
    repeated_seconds: float
    seconds: Mapping[str, float]

    @property
    def ended(self) -> float:
        return self.began + sum(self.seconds.values())


@dataclass(frozen=True)
class Goodput:
    """The seconds of a run by class, and what its checkpoints and failures cost."""

    seconds: Mapping[str, float]
    checkpoints: int = 0
    failures: int = 0
    repeated_seconds: float = 0.0

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Of all seconds, those in which a step was made for the first time."""
        return self.seconds[PRODUCTIVE] / self.wall_seconds if self.wall_seconds else 0.0

    @property
    def bound(self) -> float | None:
        """The share that the best interval between checkpoints would give; None before a failure.

        Waiting, starting and validating are taken as given: no checkpoint wins them back.
        """
        given = sum(self.seconds[kind] for kind in (QUEUE, STARTUP, VALIDATION))
        if not self.failures or not self.checkpoints or given >= self.wall_seconds:
            return None
        exposed = self.wall_seconds - given
        best = bound_goodput(
            checkpoint_seconds=self.seconds[CHECKPOINT] / self.checkpoints,
            restart_seconds=(self.seconds[RESTART] - self.repeated_seconds) / self.failures,
            failure_seconds=exposed / self.failures,
        )
        return best * exposed / self.wall_seconds

    @property
    def values(self) -> dict[str, float]:
        """As `metrics.emit` takes them."""
        classes = {f"goodput/{kind}": seconds for kind, seconds in self.seconds.items()}
        return classes if self.bound is None else {**classes, "goodput_bound": self.bound}

    def render(self) -> str:
        """`goodput 93.1% (bound 95.0%): productive 120 s, data 2 s`."""
        bound = "" if self.bound is None else f" (bound {self.bound:.1%})"
        spent = ", ".join(
            f"{kind} {seconds:,.3g} s" if seconds < 100 else f"{kind} {seconds:,.0f} s"
            for kind, seconds in self.seconds.items()
            if seconds >= 0.005
        )
        return f"goodput {self.share:.1%}{bound}: {spent or 'nothing yet'}"


def bound_goodput(
    checkpoint_seconds: float, restart_seconds: float, failure_seconds: float
) -> float:
    """The greatest share of time that makes progress, at a mean of `failure_seconds` to a failure.

    With a checkpoint every t seconds a run loses C/t to checkpoints, t/2M to work that is done
    again and R/M to restarts, the least at t = sqrt(2CM): Young 1974; Daly 2006 gives the terms of
    higher order, which matter only where C is close to M.
    """
    interval = math.sqrt(2 * checkpoint_seconds * failure_seconds)
    lost = interval / failure_seconds + restart_seconds / failure_seconds
    return max(0.0, 1 - lost)


def merge(attempts: Sequence[Attempt]) -> Goodput:
    """All attempts of a run as one.

    What passed between two attempts of a submission is restart, the steps that had not been
    recorded among it. Between two submissions there was no run.
    """
    ordered = sorted(attempts, key=lambda attempt: attempt.began)
    seconds = {kind: sum(attempt.seconds.get(kind, 0.0) for attempt in ordered) for kind in CLASSES}
    followed = [(one, two) for one, two in pairwise(ordered) if one.submission == two.submission]
    seconds[RESTART] += sum(max(0.0, two.began - one.ended) for one, two in followed)
    return Goodput(
        seconds,
        checkpoints=sum(attempt.checkpoints for attempt in ordered),
        failures=max(0, len(ordered) - 1),
        repeated_seconds=sum(attempt.repeated_seconds for attempt in ordered),
    )


class Ledger:
    """The seconds of this attempt, each in one class; what happens now is of the class `kind`.

    `waited` are the classes of what passed before: waiting for resources, say. A step up to that of
    an `earlier` attempt is made again, which is restart.
    """

    def __init__(
        self,
        submission: str,
        earlier: Sequence[Attempt] = (),
        waited: Mapping[str, float] | None = None,
        clock: Clock = time.monotonic,
        unix_time: Clock = time.time,
    ):
        self.clock = clock
        self._submission, self._earlier = submission, tuple(earlier)
        self._reached = max((attempt.step for attempt in earlier), default=0)
        self._seconds = {kind: max(0.0, (waited or {}).get(kind, 0.0)) for kind in CLASSES}
        self._began = unix_time() - sum(self._seconds.values())
        self._kind = RESTART if earlier else STARTUP
        self._since = clock()
        self._step = self._checkpoints = 0
        self._repeated_seconds = 0.0
        self._warm_seconds, self._warm_steps = 0.0, 0

    def count(self, report: StepReport) -> None:
        """All since the last call was the step of `report`: waiting for its rows, then work."""
        seconds = self._take()
        waited = min(seconds, report.wait_seconds)
        if report.step <= self._reached:
            self._seconds[RESTART] += seconds
            self._repeated_seconds += seconds
        elif self._step == 0:
            # The first step warms up: pipelines fill, kernels are compiled.
            self._seconds[self._kind] += waited
            self._seconds[PRODUCTIVE] += seconds - waited
        else:
            self._seconds[DATA] += waited
            self._seconds[PRODUCTIVE] += seconds - waited
            self._warm_seconds += seconds - waited
            self._warm_steps += 1
        self._step, self._kind = report.step, PRODUCTIVE

    @property
    def step_seconds(self) -> float:
        """Of a step on average, without waiting for rows and without the first; 0 before any."""
        return self._warm_seconds / self._warm_steps if self._warm_steps else 0.0

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """What happens inside is of the class `kind`, as `CHECKPOINT`."""
        self._settle()
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._settle()
            self._kind = before
            self._checkpoints += kind == CHECKPOINT

    @property
    def attempt(self) -> Attempt:
        """This attempt up to now."""
        self._settle()
        return Attempt(
            self._submission,
            self._began,
            max(self._step, self._reached),
            self._checkpoints,
            self._repeated_seconds,
            dict(self._seconds),
        )

    @property
    def total(self) -> Goodput:
        """The whole run up to now."""
        return merge([*self._earlier, self.attempt])

    def _settle(self) -> None:
        self._seconds[self._kind] += self._take()

    def _take(self) -> float:
        before, self._since = self._since, self.clock()
        return max(0.0, self._since - before)


def record(store: Store, run: str, attempt: Attempt) -> None:
    """Keep the attempt beside its run, in place of what was recorded of it before."""
    document = json.dumps(asdict(attempt), indent=1).encode()
    store.write(f"{_prefix(run)}{attempt.began:017.6f}.json", document)


def load_attempts(store: Store, run: str) -> list[Attempt]:
    """What was recorded of `run`, the oldest attempt first; without records that are damaged."""
    attempts = []
    for entry in store.list(_prefix(run)):
        with contextlib.suppress(Damaged):
            attempts.append(read_document(store, entry.key, Attempt))
    return attempts


def _prefix(run: str) -> str:
    return f"runs/{run}/goodput/"
