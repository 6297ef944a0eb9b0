"""`heliostat up --autoscale`: a real autoscaler brings nodes for what asks, and lets them go."""

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from heliostat import local
from heliostat.environment import MachineBounds, Ports
from heliostat.local import Cluster, processes, scaling
from heliostat.local.home import Home, State
from heliostat.local.nodes import Nodes
from heliostat.pools import ClusterSpec, PoolSpec, list_node_types

WaitUntil = Callable[..., None]
# A machine is two cores here, whatever its pool says: few nodes are enough.
POOLS = ClusterSpec(
    data=PoolSpec(machine="m7i.2xlarge", max_workers=1),
    training=PoolSpec(machine="g6.xlarge", max_workers=2, spot=True),
    serving=PoolSpec(machine="m7i.2xlarge", max_workers=1),
    idle_timeout_minutes=0.1,
)
SPEC = """
name: scaled
root: {root}
data:
  source: {root}/raw/scaled
  task: regression
  label: [y0]
  synthetic: {{inputs: 20, outputs: 1, rows: 2000}}
model: {{kind: mlp, hidden: [8]}}
train: {{workers: 2, gpus_per_worker: 1, global_batch: 64, epochs: 1}}
"""


def make_state(path: Path) -> State:
    ports = Ports(*range(20_000, 20_000 + len(Ports.__dataclass_fields__)))
    return State("here", ports, MachineBounds(4, 1, 1), path, pools=POOLS)


# What Ray is told, and what the provider does with capacity.


def test_ray_reads_the_node_types_of_the_description(tmp_path: Path) -> None:
    home = Home(tmp_path)
    config = AutoscalingConfig(
        scaling.compose(home, make_state(tmp_path), POOLS), skip_content_hash=True
    )
    found = config.get_node_type_configs()
    assert set(found) == {"head", "data", "training", "serving"}
    assert found["training"].resources == {"CPU": 4, "GPU": 1, "training": 1000}
    assert (found["training"].min_worker_nodes, found["training"].max_worker_nodes) == (0, 2)
    assert config.get_idle_timeout_s() == pytest.approx(6)


class Counted(Nodes):
    """Starts nothing."""

    def _launch(self, *described: object) -> object:  # type: ignore[override]
        class Start:
            program = type("Program", (), {"poll": staticmethod(lambda: None)})

            @staticmethod
            def find_raylet() -> None:
                return None

        return Start()


@pytest.fixture
def provider(tmp_path: Path) -> Counted:
    told = scaling.compose(Home(tmp_path), make_state(tmp_path), POOLS)["provider"]
    (tmp_path / "logs").mkdir()
    return Counted(told, "here")


def launch(provider: Counted, count: int = 1) -> None:
    (training,) = (one for one in list_node_types(POOLS) if one.name == "training")
    provider.create_node_with_resources_and_labels(
        {"spot": True}, {"ray-user-node-type": training.name}, count, training.resources, {}
    )


def read_markets(provider: Counted) -> list[str]:
    return [node.market for node in provider._nodes.values()]


def test_a_spot_machine_that_cannot_be_had_comes_on_demand(
    provider: Counted, tmp_path: Path
) -> None:
    (tmp_path / "capacity.json").write_text(json.dumps({"training": {"spot": 1}}))
    launch(provider, 3)
    assert read_markets(provider) == ["spot", "on-demand", "on-demand"]


def test_without_any_capacity_the_launch_fails_by_name_and_is_written_down(
    provider: Counted, tmp_path: Path
) -> None:
    (tmp_path / "capacity.json").write_text(json.dumps({"training": {"spot": 0, "on-demand": 0}}))
    with pytest.raises(NodeLaunchException, match="no machine for training, spot or on-demand"):
        launch(provider)
    assert read_markets(provider) == []
    assert "InsufficientInstanceCapacity" in (tmp_path / "logs" / "nodes.log").read_text()
    (tmp_path / "capacity.json").unlink()
    with pytest.raises(NodeLaunchException):  # it is not asked again at once
        launch(provider)
    assert (tmp_path / "logs" / "nodes.log").read_text().count("\n") == 1


# A real autoscaler.


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of this module's own, whose nodes come and go."""
    home = Home(tmp_path_factory.mktemp("autoscale"))
    yield local.start(home, free_ports=True, pools=POOLS)
    local.stop(home)


@pytest.fixture
def spec(scaled: Cluster, tmp_path: Path) -> Path:
    path = tmp_path / "scaled.yaml"
    path.write_text(SPEC.format(root=scaled.root))
    return path


def run(cluster: Cluster, program: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A job of this repository as a driver, pointed at `cluster` and nothing else."""
    return _call(cluster, [sys.executable, f"jobs/{program}.py", *map(str, words)])


def submit(cluster: Cluster, program: str, *words: object) -> str:
    """The same as a job of the cluster, by its id."""
    job = f"{program}-{secrets.token_hex(4)}"
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    options = ["--no-wait", "--submission-id", job, "--runtime-env-json", json.dumps(path)]
    entrypoint = [sys.executable, str(Path(f"jobs/{program}.py").resolve()), *map(str, words)]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    told = _call(cluster, [*ray, *options, "--", *entrypoint])
    assert told.returncode == 0, told.stderr
    return job


def ask(cluster: Cluster, *words: str) -> str:
    """What `heliostat ...` answers."""
    told = _call(cluster, [sys.executable, "-m", "heliostat.cli", *words])
    assert told.returncode == 0, told.stderr
    return told.stdout


def _call(cluster: Cluster, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(sys.path)
    environment = {**processes.clean_environment(), **cluster.env, "PYTHONPATH": path}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@contextlib.contextmanager
def watch(cluster: Cluster) -> Iterator[dict[str, set[str]]]:
    """The nodes that were there at some time within, by type."""
    seen: dict[str, set[str]] = {"data": set(), "training": set(), "serving": set()}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            for node in local.list_nodes(cluster):
                seen[node.type].add(node.market)
                seen[node.type].add(node.name)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def count(seen: set[str]) -> int:
    return len(seen - {"spot", "on-demand"})


def prepare(cluster: Cluster, spec: Path) -> dict[str, set[str]]:
    with watch(cluster) as seen:
        for program in ("synthesize", "prepare"):
            done = run(cluster, program, spec)
            assert done.returncode == 0, done.stderr[-2000:]
    return seen


@pytest.mark.faults
def test_a_job_of_ray_data_bursts_and_a_training_brings_its_gpus_and_lets_them_go(
    scaled: Cluster, spec: Path, wait_until: WaitUntil
) -> None:
    assert count(prepare(scaled, spec)["data"]) == 1
    began = time.monotonic()
    with watch(scaled) as seen:
        done = run(scaled, "train", spec)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "scaled:1"
    assert count(seen["training"]) == 2
    assert seen["training"] >= {"spot"}
    assert "on-demand" not in seen["training"]
    print(f"trained on two nodes that came for it, {time.monotonic() - began:.1f} s")
    wait_until(lambda: not local.list_nodes(scaled), 60)
    journal = scaled.home.nodes_log.read_text()
    print(journal)
    assert len(re.findall(r"training-\w+ joined, [\d.]+ s after", journal)) == 2
    assert len(re.findall(r"training-\w+ let go", journal)) == 2


@pytest.mark.faults
def test_what_can_never_fit_is_refused_with_the_numbers(scaled: Cluster, spec: Path) -> None:
    prepare(scaled, spec)
    done = run(scaled, "train", spec, "train.workers=3")
    assert done.returncode == 2
    assert "train.workers=3 of 1 CPU and 1 GPU each are more than the training" in done.stderr
    assert "pool can hold: 2, on 2 machines of 4 CPU and 1 GPU at most" in done.stderr
    assert not [node for node in local.list_nodes(scaled) if node.type == "training"]


@pytest.mark.faults
def test_missing_spot_capacity_is_made_up_for_on_demand(
    scaled: Cluster, spec: Path, wait_until: WaitUntil
) -> None:
    prepare(scaled, spec)
    scaled.home.capacity.write_text(json.dumps({"training": {"spot": 1}}))
    try:
        with watch(scaled) as seen:
            done = run(scaled, "train", spec, "train.seed=5")
        assert done.returncode == 0, done.stderr[-2000:]
        assert seen["training"] >= {"spot", "on-demand"}
        assert count(seen["training"]) == 2
    finally:
        scaled.home.capacity.unlink()
    wait_until(lambda: not local.list_nodes(scaled), 60)


@pytest.mark.faults
def test_without_capacity_the_reason_is_told_in_time_and_the_job_runs_once_there_is_some(
    scaled: Cluster, spec: Path, wait_until: WaitUntil
) -> None:
    prepare(scaled, spec)
    scaled.home.capacity.write_text(json.dumps({"training": {"spot": 0, "on-demand": 0}}))
    job = submit(scaled, "train", spec, "train.seed=7", "train.workers=1")
    try:
        began = time.monotonic()
        wait_until(lambda: "Insufficient" in ask(scaled, "why", job), 60)
        print(f"after {time.monotonic() - began:.1f} s: {ask(scaled, 'why', job)}")
    finally:
        scaled.home.capacity.unlink()
    wait_until(lambda: "it has ended" in ask(scaled, "why", job), 240)
    assert "SUCCEEDED" in ask(scaled, "why", job)
    wait_until(lambda: not local.list_nodes(scaled), 60)


@pytest.mark.faults
def test_replicas_bring_a_node_and_from_none_the_first_request_is_answered(
    scaled: Cluster, spec: Path, wait_until: WaitUntil
) -> None:
    prepare(scaled, spec)
    assert run(scaled, "train", spec, "train.workers=1").returncode == 0
    settings = ["replicas=[0,1]", "scale_down_s=2", "request_timeout_s=120", "auth=false"]
    done = run(scaled, "deploy", spec, *(f"deploy.{setting}" for setting in settings))
    assert done.returncode == 0, done.stderr[-2000:]
    wait_until(lambda: not local.list_nodes(scaled), 120)
    row = {f"x{place:03}": 0.5 for place in range(20)}
    request = urllib.request.Request(
        f"{scaled.edge_url}/v1/models/scaled:predict",
        json.dumps({"instances": [row]}).encode(),
        {"content-type": "application/json"},
    )
    began = time.monotonic()
    with watch(scaled) as seen, urllib.request.urlopen(request, timeout=150) as answer:
        assert answer.status == 200
        assert "y0" in answer.read().decode()
    assert count(seen["serving"]) == 1
    print(f"answered from no replica and no node after {time.monotonic() - began:.1f} s")
    wait_until(lambda: not local.list_nodes(scaled), 120)
    print(scaled.home.nodes_log.read_text())


@pytest.mark.faults
def test_a_node_that_ends_by_itself_is_replaced(
    scaled: Cluster, spec: Path, wait_until: WaitUntil
) -> None:
    """As a machine that is taken away without a word: the training goes on where it was."""
    prepare(scaled, spec)
    marker = scaled.state.marker("ray")
    with watch(scaled) as seen:
        done = threading.Thread(target=lambda: results.append(
            run(scaled, "train", spec, "train.seed=6", "train.epochs=400", "train.workers=1")
        ))  # fmt: skip
        results: list[subprocess.CompletedProcess[str]] = []
        done.start()
        wait_until(lambda: count(seen["training"]) == 1, 120)
        (name,) = seen["training"] - {"spot", "on-demand"}
        wait_until(lambda: "joined" in scaled.home.nodes_log.read_text().split(name)[-1], 60)
        processes.end(marker, 0, {scaling.INSTANCE: name})
        done.join()
    assert results[0].returncode == 0, results[0].stderr[-2000:]
    assert count(seen["training"]) == 2
    assert f"{name} ended by itself" in scaled.home.nodes_log.read_text()
    wait_until(lambda: not local.list_nodes(scaled), 60)
