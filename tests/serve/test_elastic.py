"""Replicas that come and go with what is asked, down to none, on a real cluster."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.util.placement_group import placement_group, remove_placement_group

from deploying import (
    INSTANCES,
    Wait,
    deploy,
    find_application,
    forget_packages,
    list_replicas,
    make_spec,
    steady_load,
    submit_deploy,
)
from heliostat.local import Cluster, head
from heliostat.storage import Store

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

SCALE: dict[str, Any] = {"replicas": [0, 2], "scale_up_s": 2, "scale_down_s": 2}


def await_none(client: ServeSubmissionClient, wait_until: Wait) -> None:
    def find() -> Any:
        return find_application(client)["deployments"]["Replica"]["replicas"]

    wait_until(lambda: find() == [], 90)


def ask_at_once(url: str, times: int) -> list[int]:
    def ask(_: int) -> int:
        return httpx.post(url, json=INSTANCES, timeout=90).status_code

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(ask, range(times)))


def test_without_requests_there_is_no_replica_and_the_first_ones_wait_for_one(
    store: Store, digits: str, serve_client: ServeSubmissionClient, wait_until: Wait
) -> None:
    deploy(make_spec(store.uri, version=1, **SCALE))
    await_none(serve_client, wait_until)
    assert ask_at_once(digits, 8) == [200] * 8
    assert len(list_replicas(serve_client)) == 1


def test_late_answers_bring_a_replica_that_goes_again_without_a_lost_request(
    store: Store, digits: str, serve_client: ServeSubmissionClient, wait_until: Wait
) -> None:
    deploy(make_spec(store.uri, version=1, latency_target_ms=0.1, **SCALE))
    with steady_load(digits, 3) as answered:
        wait_until(lambda: len(list_replicas(serve_client)) == 2, 90)
        total = answered.total()
        wait_until(lambda: answered.total() > total + 100)
    with steady_load(digits, 1) as later:
        deploy(make_spec(store.uri, version=1, target_requests=100, **SCALE))
        wait_until(lambda: len(list_replicas(serve_client)) == 1, 90)
        total = later.total()
        wait_until(lambda: later.total() > total + 100)
    assert set(answered) == set(later) == {(200, 1)}


@pytest.fixture
def fill_head(cluster: Cluster) -> Iterator[Callable[[], None]]:
    """Takes every CPU that is free, which on the one node there is are those of the head."""
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    held: list[Any] = []

    def fill() -> None:
        held.append(placement_group([{"CPU": ray.available_resources()["CPU"]}]))
        assert held[-1].wait(30)

    yield fill
    for group in held:
        remove_placement_group(group)


def test_a_served_version_outlives_its_job_and_starts_on_a_node_that_came_later(
    cluster: Cluster,
    store: Store,
    digits: str,
    serve_client: ServeSubmissionClient,
    join_node: Callable[..., str],
    fill_head: Callable[[], None],
    wait_until: Wait,
    tmp_path: Path,
) -> None:
    settings = [f"deploy.{key}={value}" for key, value in SCALE.items()]
    submit_deploy(cluster, store, tmp_path / "digits.yaml", wait_until, *settings)
    await_none(serve_client, wait_until)
    forget_packages(cluster.env["RAY_ADDRESS"])
    fill_head()
    known = {node["NodeID"] for node in ray.nodes()}
    join_node(2, **head.compose_environment(cluster.state, cluster.credentials))
    wait_until(lambda: len([node for node in ray.nodes() if node["Alive"]]) == 2)
    assert ask_at_once(digits, 4) == [200] * 4
    (replica,) = list_replicas(serve_client)
    assert replica["node_id"] not in known
