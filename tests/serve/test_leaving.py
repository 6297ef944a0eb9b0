"""A replica on a node whose cloud takes it back, and what its clients see of that: nothing."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from deploying import (
    Wait,
    count_failed,
    deploy,
    find_application,
    list_replicas,
    make_spec,
    steady_load,
)
from heliostat.local import Cluster, head, processes
from heliostat.storage import Store
from metadata import MAINTENANCE, PREEMPTED, Metadata, serve_metadata
from watching import run_watch

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

AWS: dict[str, str] = {}
GCP = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}
CPUS_PER_REPLICA = 2


@pytest.fixture
def head_is_full(cluster: Cluster, store: Store, wait_until: Wait) -> Iterator[PlacementGroup]:
    """Leaves the head one CPU, less than a replica takes, until the group is removed."""
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    deploy(make_spec(store.uri, version=1))

    def count_taken() -> float:
        free: float = ray.available_resources().get("CPU", 0)
        return float(ray.cluster_resources()["CPU"]) - free

    wait_until(lambda: count_taken() == 1, 120)
    group = placement_group([{"CPU": ray.cluster_resources()["CPU"] - 2}])
    assert group.wait(60)
    yield group
    remove_placement_group(group)


def take_back(cloud: Metadata) -> None:
    if PREEMPTED in cloud.said:
        cloud.said[PREEMPTED] = "TRUE"
    else:
        cloud.take_back(120)


@pytest.mark.parametrize(
    ("source", "said", "replicas"),
    [
        pytest.param("aws", AWS, 2, id="one of two, in 120 s"),
        pytest.param("gcp", GCP, 1, id="the only one, in 30 s"),
    ],
)
def test_a_replica_moves_off_a_node_that_goes_without_a_failed_request(
    cluster: Cluster,
    store: Store,
    head_is_full: PlacementGroup,
    serve_client: ServeSubmissionClient,
    join_node: Callable[..., str],
    wait_until: Wait,
    tmp_path: Path,
    source: str,
    said: dict[str, str],
    replicas: int,
) -> None:
    def find_nodes() -> list[str | None]:
        """The node of each replica, one that stops as well."""
        found: list[dict[str, Any]] = find_application(serve_client)["deployments"]["Replica"][
            "replicas"
        ]
        return [replica.get("node_id") for replica in found]

    def list_living() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    stays = list_living()
    marker = join_node(
        CPUS_PER_REPLICA, **head.compose_environment(cluster.state, cluster.credentials)
    )
    wait_until(lambda: list_living() - stays, 120)
    (goes,) = list_living() - stays
    shape: dict[str, Any] = {"version": 1, "cpus_per_replica": CPUS_PER_REPLICA}
    deploy(make_spec(store.uri, replicas=1, **shape))
    wait_until(lambda: find_nodes() == [goes], 120)
    remove_placement_group(head_is_full)
    url = deploy(make_spec(store.uri, replicas=replicas, **shape))
    wait_until(lambda: len(list_replicas(serve_client)) == replicas, 120)
    assert find_nodes().count(goes) == 1
    with serve_metadata(dict(said)) as cloud, steady_load(url, 3) as answered:
        options = ["--source", source, "--metadata-url", cloud.url, "--node", goes]
        with run_watch(tmp_path, *options) as agent:
            wait_until(lambda: agent.count("watching "), 60)
            wait_until(lambda: answered.total() > 100)
            began = time.monotonic()
            take_back(cloud)
            wait_until(lambda: agent.count("node "), 60)
            drained = time.monotonic() - began
            wait_until(lambda: goes not in find_nodes(), 120)
            moved = time.monotonic() - began
        processes.end(marker, grace_seconds=0)
        wait_until(lambda: len(list_replicas(serve_client)) == replicas, 120)
        total = answered.total()
        wait_until(lambda: answered.total() > total + 100)
    print(
        f"\nD9: {source}: notice to drain {drained:.1f} s, to a replica that is gone "
        f"{moved:.1f} s: {count_failed(answered)} failed of {answered.total():,} requests"
    )
    assert set(answered) == {(200, 1)}, answered
