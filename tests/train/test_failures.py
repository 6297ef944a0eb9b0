"""Which ends of a run's workers count as failures, and what is told of them."""

from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train import PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError

from heliostat import spec, storage
from heliostat.storage import Store
from heliostat.train.failures import Failures
from heliostat.train.job import Job, Preempted, failure_key
from heliostat.train.lease import Superseded

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
DEAD = "The actor died.\n\tactor_id: 1\nIts process was killed: low on memory."


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return storage.connect(str(tmp_path))


@pytest.fixture
def failures(store: Store) -> Failures:
    return make_failures(store, None)


def make_failures(store: Store, allotted: int | None) -> Failures:
    return Failures(make_job(store), lambda: allotted)


def make_job(store: Store) -> Job:
    run = spec.parse(
        {
            "name": "tiny",
            "root": store.uri,
            "data": {"source": "unused"},
            "model": {"kind": "mlp"},
            "train": {"max_failures": 2},
        }
    )
    return Job(run, "tiny", "1", "tiny-1", 10, "try")


def raised(*errors: BaseException) -> TrainingFailedError:
    wrapped = {
        rank: UserExceptionWithTraceback(error, "Traceback") for rank, error in enumerate(errors)
    }
    return WorkerGroupError("many lines", wrapped)


def died(preempted: bool = False) -> TrainingFailedError:
    error = RayActorError(error_msg=DEAD, preempted=preempted)
    others = UserExceptionWithTraceback(RuntimeError("connection closed"), "Traceback")
    return WorkerGroupError("", {0: others, 1: WorkerHealthCheckFailedError("dead", error)})


def test_more_failures_than_wanted_end_the_run_in_a_sentence_with_the_last_words(
    failures: Failures, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    no_memory = raised(MemoryError("no memory for 3 GiB"))
    assert [failures.make_decision(no_memory) for _ in range(2)] == [RETRY, RETRY]
    told = "failure 2 of at most 2, starting again: rank 0: MemoryError: no memory for 3 GiB\n"
    assert capsys.readouterr().out.endswith(told)
    assert failures.make_decision(died()) == RAISE
    sentence = store.read(failure_key(make_job(store))).decode()
    assert sentence.startswith(
        "the workers of run tiny-1 failed 3 times, train.max_failures is 2; the last time: rank 1: "
        "Its process was killed: low on memory; rank 0: RuntimeError: connection closed"
    )


def test_a_worker_that_dies_while_it_starts_is_a_failure(
    failures: Failures, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failures.make_decision(ControllerError(RayActorError(error_msg=DEAD))) == RETRY
    assert "failure 1 of at most 2" in capsys.readouterr().out
    assert failures.make_decision(ControllerError(RuntimeError("a bug"))) == RAISE


@pytest.mark.parametrize(
    "end",
    [
        raised(Preempted("saved at step 3")),
        died(preempted=True),
        PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1]})),
        ControllerError(WorkerGroupStartupTimeoutError(2)),
    ],
    ids=["noticed by the worker", "a node was taken", "noticed by Ray", "no place to start"],
)
def test_what_was_announced_and_waiting_for_nodes_is_no_failure(
    failures: Failures, store: Store, end: TrainingFailedError
) -> None:
    assert {failures.make_decision(end) for _ in range(9)} == {RETRY}
    assert store.stat(failure_key(make_job(store))) is None


@pytest.mark.parametrize("end", [raised(Preempted("saved at step 3")), died()])
def test_a_run_that_gave_its_workers_back_does_not_start_them_again(
    store: Store, end: TrainingFailedError
) -> None:
    assert make_failures(store, 0).make_decision(end) == RAISE
    assert make_failures(store, 1).make_decision(end) == RETRY


def test_what_a_retry_cannot_mend_is_not_tried_again(failures: Failures, store: Store) -> None:
    store.write(failure_key(make_job(store)), b"the loss became nan at step 3")
    assert failures.make_decision(raised(RuntimeError("collateral"))) == RAISE
    assert store.read(failure_key(make_job(store))) == b"the loss became nan at step 3"


def test_who_was_followed_by_another_writer_stops_and_says_nothing_to_it(
    failures: Failures, store: Store
) -> None:
    end = raised(Superseded("it has a later writer"), RuntimeError("collateral"))
    assert failures.make_decision(end) == RAISE
    assert store.stat(failure_key(make_job(store))) is None


def test_what_another_try_wrote_down_does_not_end_this_one(
    failures: Failures, store: Store
) -> None:
    other = replace(make_job(store), submission="another")
    store.write(failure_key(other), b"the loss became nan at step 3")
    assert failures.make_decision(died()) == RETRY
