"""The fault catalogue of training: what a run does when something dies, hangs or goes away."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import safetensors.numpy
from numpy.typing import NDArray
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from datasets import store_images
from faultproxy import Exchange, Fault, FaultProxy, Request
from heliostat import spec, storage
from heliostat.data.manifest import Manifest
from heliostat.errors import HeliostatError
from heliostat.local import Cluster, processes
from heliostat.spec import RunSpec
from heliostat.storage import Store
from heliostat.train import checkpoint
from heliostat.train.launch import Result, train
from metadata import serve_metadata
from watching import list_draining, run_watch

pytestmark = pytest.mark.cluster
ROWS = 6000
# A worker looks every second whether it must leave, and steps take a few milliseconds.
LONG_EPOCHS, LONG_STEPS = 10, 1500
RUNS = ("calm", "spot")
TESTS = Path(__file__).parents[1]
# It takes the place of the variable, so the package of this checkout is named as well.
PLACES = (TESTS, TESTS.parent / "platform")
RUNTIME_ENV = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, PLACES))}}
Wait = Callable[..., None]


@pytest.fixture(scope="module")
def connected(cluster: Cluster) -> Iterator[Cluster]:
    """Ray for this process, with workers that can import `faulty`."""
    ray.shutdown()
    ray.init(runtime_env=RUNTIME_ENV, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.fixture(scope="module")
def calm(connected: Cluster, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """The weights of a run that nothing disturbs."""
    store = storage.connect(f"{connected.root}/calm")
    run = make_run(store, tmp_path_factory.mktemp("calm"), {}, run="calm")
    result = train(run, make_data(store))
    assert result.step == 300
    return weights(result)


@pytest.fixture
def store(bucket: str, connected: Cluster) -> Store:
    return storage.connect(bucket)


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return make_data(store)


def make_data(store: Store) -> Manifest:
    return store_images(store, {"train": ROWS, "validation": 50})


def make_run(store: Store, journal: Path, fault: dict[str, Any], **section: Any) -> RunSpec:
    """300 steps with a checkpoint every 50, in which `fault` happens."""
    journal.mkdir(exist_ok=True)
    options = {"act": "nothing", "rank": 0, "step": 1, "journal": str(journal), **fault}
    train_section = {"workers": 2, "global_batch": 40, "epochs": 2, "checkpoint_steps": 50}
    return spec.parse(
        {
            "name": "tiny",
            "root": store.uri,
            "data": {"source": "unused"},
            "model": {"kind": "custom", "build": "faulty:build", "options": options},
            "train": train_section | section,
        }
    )


def weights(result: Result) -> NDArray[np.float32]:
    tensors = safetensors.numpy.load(result.weights)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def find_actor(name: str, job: str | None = None) -> psutil.Process:
    """The process of an actor; with `job` one of that submitted job."""
    wanted = [("class_name", "=", name), ("state", "=", "ALIVE")]
    if job:
        driver = JobSubmissionClient().get_job_info(job).driver_info
        assert driver
        wanted.append(("job_id", "=", driver.id))
    return psutil.Process(list_actors(filters=wanted)[0].pid)


def count_passes(journal: Path) -> int:
    path = journal / "passes"
    return len(path.read_text().splitlines()) if path.exists() else 0


def count_ranks(journal: Path) -> int:
    """How many ranks the last pass had."""
    return int((journal / "passes").read_text().split()[-1])


def wait_for_pause(journal: Path, ranks: int, pending: Future[Result], wait_until: Wait) -> None:
    """Until a run pauses with so many ranks: Ray looks for new nodes every 20 s only, so that it
    may begin with fewer and grow."""
    while True:
        wait_until(lambda: (journal / "done").exists() or pending.done(), 300)
        assert not pending.done(), pending.result()
        if count_ranks(journal) == ranks:
            return
        (journal / "done").unlink()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "repeated"),
    [
        # After the commit of step 100, whose files may still be on their way: 50 steps at most.
        pytest.param({"act": "kill", "rank": 1, "step": 101}, 50, id="at a checkpoint"),
        pytest.param({"act": "kill", "rank": 0, "step": 149}, 100, id="the writer between two"),
        pytest.param({"act": "kill", "rank": 1, "step": 1}, 1, id="at the first step"),
        pytest.param({"act": "hang", "rank": 1, "step": 120}, 100, id="a rank that hangs"),
    ],
)
def test_what_happens_to_a_rank_costs_no_step(
    store: Store,
    manifest: Manifest,
    calm: NDArray[np.float32],
    tmp_path: Path,
    fault: dict[str, Any],
    repeated: int,
) -> None:
    journal = tmp_path / "journal"
    result = train(make_run(store, journal, fault, run="hurt", hang_seconds=40.0), manifest)
    assert (journal / "done").exists()
    assert result.step == 300
    np.testing.assert_array_equal(weights(result), calm)
    assert 300 <= count_passes(journal) <= 300 + repeated + 1


@pytest.mark.faults
def test_a_second_live_writer_is_refused_by_the_name_of_the_first(
    store: Store, manifest: Manifest, tmp_path: Path, wait_until: Wait
) -> None:
    journal = tmp_path / "journal"
    run = make_run(store, journal, {"act": "hang", "rank": 0, "step": 60}, run="mine")
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        wait_until((journal / "done").exists, 120)
        with pytest.raises(HeliostatError, match=f"run mine .* by pid {os.getpid()}"):
            train(run, manifest)
        find_actor("RayTrainWorker").kill()
        assert pending.result().step == 300


@pytest.mark.faults
@pytest.mark.parametrize("hangs", [False, True], ids=["a node that dies", "a node that hangs"])
def test_a_run_shrinks_when_a_node_goes(
    store: Store,
    manifest: Manifest,
    calm: NDArray[np.float32],
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[..., str],
    hangs: bool,
) -> None:
    cpus, marker, _ = double_the_cluster(join_node, wait_until)
    journal = tmp_path / "journal"
    # A worker takes more than half of a node, so that each node has one.
    section = {"workers": [1, 2], "cpus_per_worker": cpus - 1}
    run = make_run(store, journal, {"act": "pause", "step": 120}, run="hurt", **section)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        wait_for_pause(journal, 2, pending, wait_until)
        stopped = processes.find(marker)
        if hangs:
            for process in stopped:
                process.suspend()
        else:
            processes.end(marker, grace_seconds=0)
        (journal / "go").touch()
        result = pending.result()
    kept = checkpoint.find(store, "hurt")
    for process in stopped if hangs else []:
        process.resume()
    assert result.step == 300
    assert count_ranks(journal) == 1
    np.testing.assert_allclose(weights(result), calm, atol=1e-6)
    assert checkpoint.find(store, "hurt") == kept


@pytest.mark.faults
def test_a_run_grows_when_a_node_comes_and_that_is_no_failure(
    store: Store,
    manifest: Manifest,
    calm: NDArray[np.float32],
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[..., str],
) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    journal = tmp_path / "journal"
    section = {"workers": [1, 2], "cpus_per_worker": cpus - 1, "max_failures": 0}
    run = make_run(store, journal, {"act": "pause", "step": 120}, run="grown", **section)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        wait_for_pause(journal, 1, pending, wait_until)
        join_node(cpus)
        result = pending.result()
    assert result.step == 300
    assert count_ranks(journal) == 2
    np.testing.assert_allclose(weights(result), calm, atol=1e-6)


@pytest.mark.faults
def test_a_worker_without_memory_ends_the_run_in_a_sentence(
    store: Store, manifest: Manifest, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    run = make_run(store, journal, {"act": "exhaust", "rank": 1}, run="mad", max_failures=2)
    with pytest.raises(HeliostatError, match=r"run mad failed 3 times, train\.max_failures is 2"):
        train(run, manifest)


@pytest.mark.faults
def test_a_worker_that_ray_kills_for_memory_is_named_with_the_reason(
    store: Store,
    manifest: Manifest,
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[..., str],
) -> None:
    cpus, marker, _ = double_the_cluster(join_node, wait_until, RAY_memory_usage_threshold="0.001")
    section = {"workers": 2, "cpus_per_worker": cpus - 1, "max_failures": 1}
    run = make_run(store, tmp_path / "journal", {}, run="fat", **section)
    with pytest.raises(HeliostatError, match=r"run fat failed 2 times.*low on memory"):
        train(run, manifest)
    assert processes.find(marker)


@pytest.mark.faults
def test_a_notice_is_answered_with_a_checkpoint_and_loses_nothing(
    store: Store,
    manifest: Manifest,
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[..., str],
    cluster: Cluster,
) -> None:
    cpus, marker, joined = double_the_cluster(join_node, wait_until)
    journal = tmp_path / "journal"
    section = {"workers": [1, 2], "cpus_per_worker": cpus - 1, "checkpoint_steps": 100_000}
    pause = {"act": "pause", "step": 120}
    run = make_run(store, journal, pause, run="noticed", max_failures=0, epochs=20, **section)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        wait_for_pause(journal, 2, pending, wait_until)
        passes = count_passes(journal)
        drain(cluster, joined)
        (journal / "go").touch()
        result = pending.result()
    assert processes.find(marker)  # the run did not wait for the end of the node
    assert result.step == 3000
    assert count_ranks(journal) == 1
    assert count_passes(journal) - passes == 3000 - 120


@pytest.mark.faults
def test_a_notice_shorter_than_the_upload_leaves_the_older_checkpoint_the_newest(
    store: Store,
    manifest: Manifest,
    calm: NDArray[np.float32],
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[..., str],
    cluster: Cluster,
) -> None:
    drained, held = threading.Event(), threading.Event()

    def hold(exchange: Exchange) -> None:
        held.set()
        exchange.wait_until_client_leaves()

    def plan(request: Request) -> Fault | None:
        upload = request.operation in ("PUT", "PART") and "/late/checkpoints/" in request.target
        return hold if upload and drained.is_set() else None

    journal = tmp_path / "journal"
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, ThreadPoolExecutor(1) as thread:
        proxy.start()
        proxy.inject(plan)
        cpus, marker, joined = double_the_cluster(join_node, wait_until, AWS_ENDPOINT_URL=proxy.url)
        section = {"workers": [1, 2], "cpus_per_worker": cpus - 1}
        run = make_run(store, journal, {"act": "pause", "step": 120}, run="late", **section)
        with let_go(journal):
            pending = thread.submit(train, run, manifest)
            wait_for_pause(journal, 2, pending, wait_until)
            drained.set()
            drain(cluster, joined, seconds=2)
            (journal / "go").touch()
            wait_until(lambda: held.is_set() or pending.done(), 60)
            assert held.is_set()
            newest, before, *_ = checkpoint.find(store, "late")
            assert (newest.committed, before.committed) == (False, True)
            processes.end(marker, grace_seconds=0)
        result = pending.result()
    assert result.step == 300
    assert read_lives(journal)[-1] == (300 - before.step, 1)
    np.testing.assert_allclose(weights(result), calm, atol=1e-6)


@pytest.mark.faults
def test_a_spot_node_that_goes_and_its_successor_cost_no_step_that_was_saved(
    store: Store,
    manifest: Manifest,
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[..., str],
) -> None:
    cpus, marker, joined = double_the_cluster(join_node, wait_until)
    shape = {"epochs": LONG_EPOCHS, "checkpoint_steps": 50, "cpus_per_worker": cpus - 1}
    undisturbed = make_run(store, tmp_path / "calm", {}, run="calm", **shape)
    wanted = train(undisturbed, manifest)
    journal = tmp_path / "journal"
    section = {"workers": [1, 2], "max_failures": 0}
    run = make_run(store, journal, {"act": "pause", "step": 120}, run="spot", **section, **shape)
    with serve_metadata({}) as aws, ThreadPoolExecutor(1) as thread, let_go(journal):
        pending = thread.submit(train, run, manifest)
        wait_for_pause(journal, 2, pending, wait_until)
        options = ["--source", "aws", "--metadata-url", aws.url, "--node", joined]
        with run_watch(tmp_path, *options) as agent:
            wait_until(lambda: agent.count("watching AWS"), 120)
            (journal / "done").unlink()  # the next life pauses as well
            noticed = time.monotonic()
            aws.take_back(300)
            wait_until(lambda: joined in list_draining(), 240)
            drained = time.monotonic()
            (journal / "go").touch()
            wait_until(lambda: count_ranks(journal) == 1, 240)
            resumed = time.monotonic()
            (journal / "go").unlink()
            assert agent.count("node ") == 1
        processes.end(marker, grace_seconds=0)
        wait_for_pause(journal, 1, pending, wait_until)
        join_node(cpus)
        result = pending.result()
    lives, calm, spot = read_lives(journal), *(copy_events(store, run, tmp_path) for run in RUNS)
    begun = [*list_begins(spot), LONG_STEPS]
    lost = [begun[i] + steps - begun[i + 1] for i, (steps, _) in enumerate(lives)]
    print(
        f"\nG-9: notice to drain {drained - noticed:.1f} s, to the first step without the node "
        f"{resumed - noticed:.1f} s; steps, workers and lost steps of each life: "
        f"{[(*life, gone) for life, gone in zip(lives, lost, strict=True)]}"
    )
    assert result.step == wanted.step == LONG_STEPS
    assert [ranks for _, ranks in lives][-3:] == [2, 1, 2]
    assert lost[-3] == lost[-1] == 0
    assert lost[-2] <= 100 + 1  # the checkpoint before the newest, and the step that was begun
    np.testing.assert_allclose(weights(result), weights(wanted), atol=1e-6)
    losses = [dict(read_losses(events)) for events in (calm, spot)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, LONG_STEPS + 1))
    assert max(abs(losses[0][step] - losses[1][step]) for step in losses[0]) < 1e-5


@contextmanager
def let_go(journal: Path) -> Iterator[None]:
    """A run that pauses goes on when a test fails, for whoever waits for its end."""
    try:
        yield
    except BaseException:
        (journal / "go").touch()
        raise


def read_lives(journal: Path) -> list[tuple[int, int]]:
    """Steps that were begun and number of ranks, of each life of a run."""
    lives: list[tuple[int, int]] = []
    for line in (journal / "passes").read_text().splitlines():
        step, ranks = map(int, line.split())
        lives[len(lives) - (step > 1) :] = [(step, ranks)]
    return lives


def copy_events(store: Store, run: str, folder: Path) -> Path:
    """The folder with the TensorBoard files of a run."""
    for entry in store.list(f"runs/{run}/tensorboard/"):
        path = folder / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(entry.key))
    return folder / f"runs/{run}/tensorboard"


def list_begins(events: Path) -> list[int]:
    """After which step each life of a run began."""
    found = (
        event for path in sorted(events.iterdir()) for event in EventFileLoader(str(path)).Load()
    )
    return [event.step - 1 for event in found if event.HasField("session_log")]


def read_losses(events: Path) -> Iterator[tuple[int, float]]:
    """The loss of each step as TensorBoard shows it."""
    shown = EventAccumulator(str(events), {"scalars": 0})
    shown.Reload()
    return ((event.step, event.value) for event in shown.Scalars("loss"))


def double_the_cluster(
    join_node: Callable[..., str], wait_until: Wait, **environment: str
) -> tuple[int, str, str]:
    """The CPUs of each node, the marker of the new one's processes, and its id."""
    cpus = int(ray.cluster_resources()["CPU"])
    before = {node["NodeID"] for node in ray.nodes()}
    marker = join_node(cpus, **environment)
    wait_until(lambda: ray.cluster_resources()["CPU"] == 2 * cpus, 60)
    (joined,) = {node["NodeID"] for node in ray.nodes()} - before
    return cpus, marker, joined


def drain(cluster: Cluster, node: str, seconds: int = 60) -> None:
    command = [str(Path(sys.executable).with_name("ray")), "drain-node"]
    options = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    options += ["--reason-message", "spot", "--deadline-remaining-seconds", str(seconds)]
    subprocess.run(
        [*command, "--address", cluster.gcs_address, *options],
        check=True,
        capture_output=True,
        env={**os.environ, **cluster.env},
    )


JOB = """
import json, sys
from heliostat import spec, storage
from heliostat.data.manifest import load_manifest
from heliostat.train.launch import train
run = spec.parse(json.loads(sys.argv[1]))
train(run, load_manifest(storage.connect(run.root), "tiny", sys.argv[2]))
"""


def stop_job(job: str) -> None:
    JobSubmissionClient().stop_job(job)


def kill_supervisor(job: str) -> None:
    find_actor("JobSupervisor").kill()


def kill_controller(job: str) -> None:
    find_actor("TrainController", job).kill()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        (stop_job, JobStatus.STOPPED, ""),
        (kill_supervisor, JobStatus.FAILED, ""),
        (kill_controller, JobStatus.FAILED, "Ray's controller of run again died: submit the job"),
    ],
)
def test_a_job_that_ends_leaves_the_last_commit_and_the_next_goes_on(
    store: Store,
    manifest: Manifest,
    calm: NDArray[np.float32],
    tmp_path: Path,
    wait_until: Wait,
    end: Callable[[str], None],
    status: JobStatus,
    told: str,
) -> None:
    journal = tmp_path / "journal"
    run = make_run(store, journal, {"act": "pause", "step": 120}, run="again")
    command = [sys.executable, "-c", JOB, json.dumps(spec.dump(run)), manifest.version]
    jobs = JobSubmissionClient()
    job = jobs.submit_job(entrypoint=shlex.join(command), runtime_env=RUNTIME_ENV)
    wait_until(lambda: (journal / "done").exists() or jobs.get_job_status(job).is_terminal(), 120)
    workers = [actor.pid for actor in list_actors(filters=[("class_name", "=", "RayTrainWorker")])]
    end(job)
    wait_until(lambda: jobs.get_job_status(job) == status, 60)
    assert told in jobs.get_job_logs(job)
    wait_until(lambda: not any(map(psutil.pid_exists, workers)))
    kept = checkpoint.find(store, "again")
    assert 50 <= kept[0].step <= 100
    result = train(run, manifest)
    assert result.step == 300
    assert count_passes(journal) <= 300 + 100
    np.testing.assert_array_equal(weights(result), calm)
