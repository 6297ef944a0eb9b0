"""What dies below a served model, under load, and what its clients see of that: the figures."""

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.util.state import list_actors

from deploying import (
    Wait,
    answers,
    count_failed,
    deploy,
    list_replicas,
    make_spec,
    predict_online,
    publish,
    steady_load,
)
from heliostat import local
from heliostat.local import Cluster, processes
from heliostat.local.home import Home, furnish
from heliostat.serve.deploy import APPLICATION
from heliostat.serve.table import Placement, read_table
from heliostat.storage import Store, connect

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

REPLICA_KILLS, CONTROLLER_KILLS, PROXY_KILLS = 20, 3, 3
CLIENTS = 3


@pytest.fixture
def served(store: Store, digits: str) -> str:
    """Where one replica of digits:1 answers."""
    return deploy(make_spec(store.uri, version=1))


def tell(goal: str, what: str, answered: Counter[object]) -> None:
    print(f"\n{goal}: {what}: {count_failed(answered)} failed of {answered.total():,} requests")


def find_pids(class_name: str) -> list[int]:
    found = list_actors(filters=[("class_name", "=", class_name), ("state", "=", "ALIVE")])
    return [actor.pid for actor in found]


def kill_actor(class_name: str, wait_until: Wait) -> None:
    """SIGKILL the one actor of the class, and wait until another has taken its place."""
    (killed,) = find_pids(class_name)
    psutil.Process(killed).kill()
    wait_until(lambda: find_pids(class_name) not in ([], [killed]), 60)


def test_five_updates_lose_none_of_ten_thousand_requests(
    store: Store, served: str, wait_until: Wait
) -> None:
    with steady_load(served, 4) as answered:
        for version in (2, 1, 2, 1, 2):
            deploy(make_spec(store.uri, version=version))
        wait_until(lambda: answered.total() >= 10_000, 600)
    tell("G-1", "5 updates", answered)
    assert set(answered) == {(200, 1), (200, 2)}


def test_killed_replicas_cost_no_request(
    store: Store, served: str, serve_client: ServeSubmissionClient, wait_until: Wait
) -> None:
    deploy(make_spec(store.uri, version=1, replicas=2))

    def find_running() -> set[int]:
        return {replica["pid"] for replica in list_replicas(serve_client)}

    with steady_load(served, CLIENTS) as answered:
        for _ in range(REPLICA_KILLS):
            killed = find_running().pop()
            psutil.Process(killed).kill()
            wait_until(lambda killed=killed: len(find_running() - {killed}) == 2, 60)
    tell("G-3", f"{REPLICA_KILLS} replicas killed, one of two at a time", answered)
    assert count_failed(answered) == 0, answered


def test_a_killed_controller_costs_no_request_and_deploys_again(
    store: Store, served: str, wait_until: Wait
) -> None:
    with steady_load(served, CLIENTS) as answered:
        for _ in range(CONTROLLER_KILLS):
            kill_actor("ServeController", wait_until)
        deploy(make_spec(store.uri, version=2))
        assert predict_online(served)[0] == 2
    tell("G-4", f"{CONTROLLER_KILLS} controllers killed", answered)
    assert count_failed(answered) == 0, answered


def test_a_killed_proxy_costs_what_is_inside_it(
    cluster: Cluster, served: str, wait_until: Wait
) -> None:
    marker = cluster.state.marker("ray")
    direct = f"{cluster.serve_url}/v1/models/digits:predict"
    away = []
    with steady_load(served, CLIENTS) as answered:
        for _ in range(PROXY_KILLS):
            before = answered.total()
            wait_until(lambda before=before: answered.total() > before + 100)
            killed = [p for p in processes.find(marker) if p.info["name"] == "haproxy"]
            assert killed
            for process in killed:
                process.kill()
            began = time.monotonic()
            wait_until(lambda: answers(direct))
            away.append(time.monotonic() - began)
    tell("G-5", f"Serve's proxy away for {', '.join(f'{s:.1f}' for s in away)} s", answered)
    assert count_failed(answered) <= PROXY_KILLS * CLIENTS, answered
    assert max(away) < 6


def test_a_killed_keeper_of_the_proxy_costs_what_is_inside_and_leaves_no_stale_one(
    store: Store, served: str, wait_until: Wait
) -> None:
    with steady_load(served, CLIENTS) as answered:
        kill_actor("HAProxyManager", wait_until)
        deploy(make_spec(store.uri, version=2))
        wait_until(lambda: answered[200, 2] > 100)
    tell("G-5", "the actor that keeps Serve's proxy killed", answered)
    assert count_failed(answered) <= CLIENTS, answered
    later: Counter[object] = Counter()
    for _ in range(100):  # each over a connection of its own, which a stale one would take half of
        response = httpx.get(httpx.URL(served).join("/v1/models"), timeout=30)
        later[response.status_code, response.json()["models"][0]["version"]] += 1
    assert later == {(200, 2): 100}


NEW_WORK = "import ray; ray.init(); assert ray.get(ray.remote(lambda: 1).remote()) == 1"


@pytest.fixture
def durable(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[local.Cluster]:
    """A cluster of its own whose GCS keeps its tables on a disk."""
    own = Home(tmp_path / "home")
    furnish(own)
    own.token.write_bytes(home.token.read_bytes())  # this process has read that one
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    try:
        cluster = local.start(own, free_ports=True)
        for name, value in cluster.env.items():
            monkeypatch.setenv(name, value)
        yield cluster
    finally:
        local.stop(own)


def test_a_killed_gcs_costs_no_request_and_deploys_again_when_it_is_back(
    durable: local.Cluster, wait_until: Wait
) -> None:
    store = connect(f"{durable.root}/serve")
    publish(store, 1)
    publish(store, 2)
    url = deploy(make_spec(store.uri, version=1))
    (gcs,) = (
        process
        for process in processes.find(durable.state.marker("ray"))
        if process.info["name"] == "gcs_server"
    )
    command, environment, directory = gcs.cmdline(), gcs.environ(), gcs.cwd()
    with steady_load(url, CLIENTS) as answered:
        wait_until(lambda: answered.total() > 100)
        gcs.kill()
        total = answered.total()
        wait_until(lambda: answered.total() > total + 100)
        with subprocess.Popen(
            command, env=environment, cwd=directory, start_new_session=True
        ) as again:
            began = time.monotonic()
            subprocess.run([sys.executable, "-c", NEW_WORK], check=True)
            worked = time.monotonic() - began
            deploy(make_spec(store.uri, version=2))
            seconds = time.monotonic() - began
            assert predict_online(url)[0] == 2
            again.kill()
    told = (
        f"GCS killed, a new program's task done {worked:.1f} s after its start, digits:2 deployed"
    )
    tell("G-6", f"{told} after {seconds:.1f} s", answered)
    assert count_failed(answered) == 0, answered
    assert worked < 10


class Canary:
    """`heliostat deploy` in a process of its own, which follows a canary of digits."""

    def __init__(self, store: Store, version: int, min_requests: int) -> None:
        command = [sys.executable, "-m", "heliostat.cli", "deploy", f"digits:{version}"]
        command += [f"candidate.min_requests={min_requests}", "candidate.max_latency_ratio=100"]
        command += ["--root", store.uri, "--canary", "30%"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def await_requests(self) -> None:
        """Until it has told how the candidate does."""
        assert self.process.stdout is not None
        assert any(" requests, " in line for line in self.process.stdout)


@pytest.fixture
def start_canary(store: Store) -> Iterator[Callable[[int, int], Canary]]:
    started: list[Canary] = []

    def start(version: int, min_requests: int) -> Canary:
        started.append(Canary(store, version, min_requests))
        return started[-1]

    yield start
    for canary in started:
        canary.process.kill()
        canary.process.wait()


def test_a_canary_outlives_the_command_that_follows_it_and_its_steward(
    store: Store,
    served: str,
    start_canary: Callable[[int, int], Canary],
    serve_client: ServeSubmissionClient,
    wait_until: Wait,
) -> None:
    new = publish(store, 700).number
    with steady_load(served, CLIENTS) as answered:
        canary = start_canary(new, 1500)
        canary.await_requests()
        canary.process.kill()
        kill_actor("Steward", wait_until)
        wait_until(lambda: read_table(store).models["digits"].number == new, 120)
        wait_until(
            lambda: list(serve_client.get_serve_details()["applications"]) == [APPLICATION], 60
        )
        assert predict_online(served)[0] == new
    assert set(answered) == {(200, 1), (200, new)}
    assert read_table(store).models["digits"] == Placement(number=new, previous=(1,))


def test_an_interrupted_canary_is_taken_back(
    store: Store, served: str, start_canary: Callable[[int, int], Canary], wait_until: Wait
) -> None:
    before, new = read_table(store), publish(store, 701).number
    with steady_load(served, CLIENTS) as answered:
        canary = start_canary(new, 1_000_000)
        canary.await_requests()
        canary.process.send_signal(signal.SIGINT)
        assert canary.process.wait(60) != 0
    assert set(answered) == {(200, 1), (200, new)}
    assert read_table(store) == before
    wait_until(lambda: find_pids("Steward") == [])
