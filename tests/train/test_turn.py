"""The queue on a real cluster: who gives room back loses no step, and goes on afterwards."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import safetensors.numpy
from numpy.typing import NDArray
from ray.job_submission import JobStatus, JobSubmissionClient

from datasets import store_images
from heliostat import spec, storage
from heliostat.data.manifest import Manifest
from heliostat.local import Cluster
from heliostat.queue import Amount
from heliostat.spec import RunSpec
from heliostat.storage import Store
from heliostat.tickets import Board, read_board
from heliostat.train import checkpoint
from heliostat.train.launch import Result, train
from heliostat.train.turn import find_head, line_up, measure_room

pytestmark = pytest.mark.cluster
TESTS = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(TESTS), str(TESTS.parent / "platform")])
RUNTIME_ENV = {"env_vars": {"PYTHONPATH": PYTHONPATH}}
STEPS = 3000
Wait = Callable[..., None]


@pytest.fixture(scope="module")
def connected(cluster: Cluster) -> Iterator[Cluster]:
    """Ray for this process, with workers that can import `faulty`."""
    ray.shutdown()
    ray.init(runtime_env=RUNTIME_ENV, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.fixture
def store(bucket: str, connected: Cluster) -> Store:
    return storage.connect(bucket)


def make_data(store: Store) -> Manifest:
    return store_images(store, {"train": 6000, "validation": 50})


def make_run(store: Store, journal: Path, name: str, priority: int, **section: Any) -> RunSpec:
    """Steps that are saved only where somebody is told to; rank 0 pauses at 120 if it is `low`."""
    journal.mkdir(exist_ok=True)
    act = "pause" if name == "low" else "nothing"
    options = {"act": act, "rank": 0, "step": 120, "journal": str(journal)}
    return spec.parse(
        {
            "name": "tiny",
            "root": store.uri,
            "data": {"source": "unused"},
            "model": {"kind": "custom", "build": "faulty:build", "options": options},
            "job": {"priority": priority},
            "train": {
                **{"run": name, "global_batch": 40, "epochs": 20, "checkpoint_steps": 100_000},
                **section,
            },
        }
    )


def weights(result: Result) -> NDArray[np.float32]:
    tensors = safetensors.numpy.load(result.weights)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def read_ranks(journal: Path) -> list[int]:
    """How many ranks each pass had."""
    path = journal / "passes"
    return [int(line.split()[1]) for line in path.read_text().splitlines()] if path.exists() else []


def read_queue(store: Store) -> Board:
    return read_board(store, find_head())


@pytest.mark.faults
@pytest.mark.parametrize(
    ("low_workers", "high_workers", "told"),
    [
        pytest.param(2, 2, "giving all workers back: run high", id="yields"),
        pytest.param([1, 2], 1, "going on with 1 workers: run high", id="shrinks"),
    ],
)
def test_a_run_makes_room_for_one_of_higher_priority_and_loses_no_step(
    store: Store,
    tmp_path: Path,
    wait_until: Wait,
    capfd: pytest.CaptureFixture[str],
    low_workers: Any,
    high_workers: int,
    told: str,
) -> None:
    manifest = make_data(store)
    journals = {name: tmp_path / name for name in ("low", "high", "calm")}
    low = make_run(store, journals["low"], "low", 0, workers=low_workers)
    high = make_run(store, journals["high"], "high", 5, workers=high_workers, epochs=2)
    heard = ""

    def was_told() -> bool:
        nonlocal heard
        heard += capfd.readouterr().out
        return told in heard

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(train, low, manifest)
        wait_until(lambda: (journals["low"] / "done").exists() or first.done(), 120)
        second = threads.submit(train, high, manifest)
        try:
            wait_until(lambda: was_told() or second.done(), 180)
        finally:
            (journals["low"] / "go").touch()
        assert second.result().step == 300
        result = first.result()
    assert result.step == STEPS
    ranks = read_ranks(journals["low"])
    assert len(ranks) == STEPS
    assert {*ranks} == ({2} if told.startswith("giving") else {1, 2})
    assert read_queue(store).tickets == ()
    calm = train(make_run(store, journals["calm"], "calm", 0, workers=2), manifest)
    np.testing.assert_allclose(weights(result), weights(calm), atol=1e-5)


def test_to_be_admitted_where_there_is_room_takes_little(store: Store, tmp_path: Path) -> None:
    run = make_run(store, tmp_path / "journal", "alone", 0, workers=2)
    with line_up(store, run, "alone") as turn:
        assert turn.wait() == 2
        (ticket,) = read_queue(store).tickets
        assert (ticket.held, ticket.what) == (2, "run alone")
    assert read_queue(store).tickets == ()


def test_what_others_hold_is_no_room_for_trainings(connected: Cluster) -> None:
    @ray.remote(num_cpus=2)
    class Other:
        def ready(self) -> None:
            pass

    mine = ray.get_runtime_context().get_job_id()
    before = measure_room(set())
    other = Other.remote()  # type: ignore[attr-defined]
    ray.get(other.ready.remote())
    assert measure_room(set()).total == before.total - Amount(2)
    assert measure_room({mine}).total.cpus >= measure_room(set()).total.cpus + 2
    ray.kill(other)


JOB = """
import json, sys
from heliostat import job, spec, storage
from heliostat.data.manifest import load_manifest
from heliostat.train.launch import train
def main(document, version):
    run = spec.parse(json.loads(document))
    train(run, load_manifest(storage.connect(run.root), "tiny", version))
job.run(main)
"""


@pytest.mark.faults
def test_a_stopped_training_has_its_last_step_saved(
    store: Store, tmp_path: Path, wait_until: Wait
) -> None:
    manifest, journal = make_data(store), tmp_path / "journal"
    run = make_run(store, journal, "stopped", 0, workers=2, epochs=400)
    program = tmp_path / "job.py"
    program.write_text(JOB)
    words = [sys.executable, str(program), json.dumps(spec.dump(run)), manifest.version]
    jobs = JobSubmissionClient()
    job = jobs.submit_job(entrypoint=shlex.join(words), runtime_env=RUNTIME_ENV)
    wait_until(lambda: len(read_ranks(journal)) > 100, 120)
    jobs.stop_job(job)
    wait_until(lambda: jobs.get_job_status(job) == JobStatus.STOPPED, 60)
    saved = checkpoint.find(store, "stopped")[0].step
    assert saved == len(read_ranks(journal))
    assert f"saved at step {saved:,}" in jobs.get_job_logs(job)
