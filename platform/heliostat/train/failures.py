"""Which ends of a run's workers count as failures, and what is told of them."""

from collections.abc import Callable, Iterator, Mapping

import ray.train
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from heliostat import storage
from heliostat.train.job import Job, Preempted, failure_key
from heliostat.train.lease import Superseded

DEATHS = (RayActorError, OutOfMemoryError)
MAX_TOLD = 2
MAX_WORDS = 300


class Failures(DefaultFailurePolicy):  # type: ignore[misc]
    """Has the workers of a run start again until they failed more than `train.max_failures` times.

    An end that a node's notice brought is no failure, and what a retry cannot mend is not tried
    again: the worker has then written down why. Nor is a run to which no workers are `allotted` any
    more.
    """

    def __init__(self, job: Job, allotted: Callable[[], int | None]) -> None:
        super().__init__(ray.train.FailureConfig(max_failures=-1))
        self._job, self._allotted = job, allotted
        self._failed = 0

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if self._allotted() == 0:
            return FailureDecision.RAISE
        errors = find_ends(training_failed_error)
        if not errors or any(map(_was_announced, errors.values())):
            return super().make_decision(training_failed_error)
        if any(isinstance(error, Superseded) for error in errors.values()):
            return FailureDecision.RAISE
        store = storage.connect(self._job.spec.root)
        if store.stat(failure_key(self._job)):
            return FailureDecision.RAISE
        self._failed += 1
        run, most, told = self._job.run, self._job.spec.train.max_failures, describe(errors)
        if self._failed > most:
            sentence = (
                f"the workers of run {run} failed {self._failed} times, train.max_failures is "
                f"{most}; the last time: {told}: submit the job again to go on from the last "
                "checkpoint"
            )
            store.write(failure_key(self._job), sentence.encode())
            return FailureDecision.RAISE
        print(f"failure {self._failed} of at most {most}, starting again: {told}", flush=True)
        return FailureDecision.RETRY


def find_ends(error: TrainingFailedError) -> dict[str, BaseException]:
    """What happened to which worker, without what Ray wraps around it; nothing if to none."""
    match error:
        case WorkerGroupError():
            return {f"rank {rank}": _unwrap(end) for rank, end in error.worker_failures.items()}
        case ControllerError() if isinstance(error.controller_failure, DEATHS):
            return {"a worker that started": error.controller_failure}
    return {}


def describe(ends: Mapping[str, BaseException]) -> str:
    """`rank 1: RuntimeError: no memory`, dead workers first: others fail because of them."""
    order = sorted(ends, key=lambda worker: (not isinstance(ends[worker], DEATHS), worker))
    told = [f"{worker}: {_words(ends[worker])}" for worker in order[:MAX_TOLD]]
    more = len(order) - MAX_TOLD
    return "; ".join(told) + f"; and {more} more" * (more > 0)


def _unwrap(error: BaseException) -> BaseException:
    match error:
        case UserExceptionWithTraceback():
            return error._base_exc  # type: ignore[no-any-return]
        case WorkerHealthCheckFailedError():
            return error.health_check_failure  # type: ignore[no-any-return]
    return error


def _was_announced(error: BaseException) -> bool:
    return isinstance(error, Preempted) or (isinstance(error, RayActorError) and error.preempted)


def _words(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        return " ".join(_reasons(str(error))).rstrip(".")[:MAX_WORDS]
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:MAX_WORDS]


def _reasons(told: str) -> Iterator[str]:
    """What Ray says of a dead actor, without the lines that identify it."""
    yield from (line for line in told.splitlines()[1:] if not line.startswith("\t"))
