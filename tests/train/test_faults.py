"""The fault catalogue of training: what a run does when something dies, hangs or goes away."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import safetensors.numpy
from ray.util.state import list_actors

from datasets import store_images
from heliostat import spec, storage
from heliostat.data.manifest import Manifest, data_key
from heliostat.errors import HeliostatError
from heliostat.local import Cluster, processes
from heliostat.spec import RunSpec
from heliostat.storage import Store
from heliostat.train import checkpoint
from heliostat.train.launch import Result, train

pytestmark = pytest.mark.cluster
ROWS = 6000
TESTS = Path(__file__).parents[1]
RUNTIME_ENV = {"env_vars": {"PYTHONPATH": str(TESTS)}}
Wait = Callable[..., None]


@pytest.fixture
def store(bucket: str, cluster: Cluster) -> Iterator[Store]:
    """A bucket, and Ray for this process, with workers that can import `faulty`."""
    ray.shutdown()
    ray.init(runtime_env=RUNTIME_ENV, logging_level="ERROR", log_to_driver=False)
    yield storage.connect(bucket)
    ray.shutdown()


@pytest.fixture
def manifest(store: Store) -> Manifest:
    manifest = store_images(store, {"train": ROWS, "validation": 50})
    key = data_key(manifest.name, manifest.version, "manifest.json")
    store.write(key, json.dumps(manifest.to_json()).encode())
    return manifest


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


def weights(result: Result) -> np.ndarray:
    tensors = safetensors.numpy.load(result.weights)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def find_actor(name: str) -> psutil.Process:
    actors = list_actors(filters=[("class_name", "=", name), ("state", "=", "ALIVE")])
    return psutil.Process(actors[0].pid)


def count_passes(journal: Path) -> int:
    path = journal / "passes"
    return len(path.read_text().split()) if path.exists() else 0


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
    store: Store, manifest: Manifest, tmp_path: Path, fault: dict[str, Any], repeated: int
) -> None:
    calm = train(make_run(store, tmp_path / "calm", {}, run="calm"), manifest)
    journal = tmp_path / "journal"
    result = train(make_run(store, journal, fault, run="hurt", hang_seconds=40.0), manifest)
    assert (journal / "done").exists()
    assert result.step == calm.step == 300
    np.testing.assert_array_equal(weights(result), weights(calm))
    assert 300 <= count_passes(journal) <= 300 + repeated + 1


@pytest.mark.soak
def test_a_killed_controller_ends_in_a_sentence_and_the_next_try_goes_on(
    store: Store, manifest: Manifest, tmp_path: Path, wait_until: Wait
) -> None:
    calm = train(make_run(store, tmp_path / "calm", {}, run="calm"), manifest)
    journal = tmp_path / "journal"
    run = make_run(store, journal, {}, run="hurt")
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        wait_until(lambda: checkpoint.committed(store, "hurt") or pending.done(), 120)
        find_actor("TrainController").kill()
        try:
            result = pending.result(timeout=120)
        except HeliostatError:
            result = train(run, manifest)
    np.testing.assert_array_equal(weights(result), weights(calm))


@pytest.mark.soak
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


@pytest.mark.soak
def test_a_run_shrinks_when_a_node_dies_and_grows_when_one_comes(
    store: Store,
    manifest: Manifest,
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[[int], str],
) -> None:
    calm = train(make_run(store, tmp_path / "calm", {}, run="calm"), manifest)
    cpus = int(ray.cluster_resources()["CPU"])
    marker = join_node(cpus)
    wait_until(lambda: ray.cluster_resources()["CPU"] == 2 * cpus, 60)
    journal = tmp_path / "journal"
    # A worker takes more than half of a node, so that each node has one.
    section = {"workers": [1, 2], "cpus_per_worker": cpus - 1, "epochs": 2}
    run = make_run(store, journal, {}, run="hurt", **section)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        wait_until(lambda: checkpoint.committed(store, "hurt") or pending.done(), 120)
        assert not pending.done()
        processes.end(marker, grace_seconds=0)
        result = pending.result()
    assert result.step == 300
    np.testing.assert_allclose(weights(result), weights(calm), atol=1e-6)


@pytest.mark.soak
def test_a_notice_is_answered_with_a_checkpoint_and_loses_nothing(
    store: Store,
    manifest: Manifest,
    tmp_path: Path,
    wait_until: Wait,
    join_node: Callable[[int], str],
    cluster: Cluster,
) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    before = {node["NodeID"] for node in ray.nodes()}
    join_node(cpus)
    wait_until(lambda: ray.cluster_resources()["CPU"] == 2 * cpus, 60)
    (joined,) = {node["NodeID"] for node in ray.nodes()} - before
    journal = tmp_path / "journal"
    section = {"workers": [1, 2], "cpus_per_worker": cpus - 1, "checkpoint_steps": 100_000}
    run = make_run(store, journal, {}, run="noticed", max_failures=0, epochs=20, **section)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(train, run, manifest)
        wait_until(lambda: count_passes(journal) > 20 or pending.done(), 120)
        drain(cluster, joined)
        wait_until(lambda: checkpoint.committed(store, "noticed") or pending.done(), 60)
        assert not pending.done()
        result = pending.result()
    assert result.step == 3000
    assert count_passes(journal) == 3000


def drain(cluster: Cluster, node: str) -> None:
    command = [str(Path(sys.executable).with_name("ray")), "drain-node"]
    options = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    options += ["--reason-message", "spot", "--deadline-remaining-seconds", "60"]
    subprocess.run(
        [*command, "--address", cluster.gcs_address, *options],
        check=True,
        capture_output=True,
        env={**os.environ, **cluster.env},
    )


SUBMIT = """
import json, sys
import ray
from heliostat import spec, storage
from heliostat.data.manifest import load_manifest
from heliostat.train.launch import train
ray.init(runtime_env=json.loads(sys.argv[3]))
run = spec.parse(json.loads(sys.argv[1]))
train(run, load_manifest(storage.connect(run.root), "tiny", sys.argv[2]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_ends_leaves_the_last_commit_and_the_next_goes_on(
    store: Store, manifest: Manifest, tmp_path: Path, wait_until: Wait, end: signal.Signals
) -> None:
    run = make_run(store, tmp_path / "journal", {}, run="again", epochs=20)
    arguments = [json.dumps(spec.dump(run)), manifest.version, json.dumps(RUNTIME_ENV)]
    driver = subprocess.Popen([sys.executable, "-c", SUBMIT, *arguments])
    wait_until(lambda: checkpoint.committed(store, "again") or driver.poll() is not None, 120)
    driver.send_signal(end)
    driver.wait(30)
    kept = checkpoint.find(store, "again")[0]
    assert kept.step < 3000
    result = train(run, manifest)
    assert result.step == 3000
    passes = count_passes(tmp_path / "journal")
    assert passes < 3000 + 1000
