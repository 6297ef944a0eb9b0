"""Laws of pools: who asks for one gets into it, and where there are none nobody waits for them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray import serve
from ray.util.state import list_actors

from datasets import store_images
from heliostat import pools, spec, storage
from heliostat.data.pipeline import quiet_ray_data
from heliostat.data.stream import configure
from heliostat.errors import HeliostatError
from heliostat.local import Cluster
from heliostat.pools import LABEL, POOLS, PURPOSES, ClusterSpec, Most
from heliostat.serve import deploy
from heliostat.spec import DeploySpec
from heliostat.train.launch import train

DECLARED = dict.fromkeys(PURPOSES, pools.DECLARED)
TOLD = "data=1x3:0 training=1x3:0 serving=1x3:0"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_nothing_is_asked_of_a_cluster_without_pools(purpose: Any) -> None:
    assert pools.find_pool(purpose, {}) is None
    assert (pools.ask(purpose, {}), pools.select(purpose, {})) == ({}, {})
    others = {POOLS: " ".join(f"{other}=1x1:0" for other in PURPOSES if other != purpose)}
    assert (pools.ask(purpose, others), pools.select(purpose, others)) == ({}, {})


def test_processes_hear_what_a_cluster_can_grow_to() -> None:
    cluster = ClusterSpec(training=pools.PoolSpec(machine="p5.48xlarge", max_workers=3))
    told = {POOLS: pools.tell(cluster)}
    assert pools.find_pool("training", told) == Most(3, 192, 8)
    assert pools.ask("training", told) == {"training": pools.ASKED}
    assert pools.select("data", told) == {LABEL: "data"}


@pytest.mark.parametrize(
    "told", ["training", "training=", "training=1", "training=a:b", "training=4:1", "a=b=c"]
)
def test_what_tells_of_no_pools_is_refused(told: str) -> None:
    with pytest.raises(HeliostatError, match="write a word like training=4x16:1"):
        pools.find_pool("training", {POOLS: told})


def test_a_pool_has_room_for_any_number_of_processes() -> None:
    assert pools.DECLARED / pools.ASKED >= 1e6


def list_workers() -> set[tuple[str, str]]:
    """Those of all trainings, dead ones too, with their nodes."""
    found = list_actors(
        filters=[("class_name", "=", "RayTrainWorker")], limit=10_000, raise_on_missing_output=False
    )
    return {(actor.actor_id, actor.node_id) for actor in found}


@pytest.fixture
def pooled(
    cluster: Cluster,
    join_node: Callable[..., str],
    wait_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The id of a second node, which alone is in the pools; this process is told of them."""
    ray.init(ignore_reinit_error=True, logging_level="ERROR", log_to_driver=False)
    settings = {
        "RAY_OVERRIDE_RESOURCES": json.dumps(DECLARED),
        "RAY_OVERRIDE_LABELS": json.dumps({LABEL: "data"}),
    }
    join_node(3, **settings)

    def find() -> list[str]:
        return [n["NodeID"] for n in ray.nodes() if n["Alive"] and "training" in n["Resources"]]

    wait_until(find, 60)
    monkeypatch.setenv(POOLS, TOLD)
    return find()[0]


def find_nodes(rows: ray.data.Dataset) -> set[str]:
    """The nodes on which a pipeline ran."""

    def locate(batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"node": [ray.get_runtime_context().get_node_id()] * len(batch["id"])}

    return {row["node"] for row in rows.map_batches(locate).iter_rows()}


@pytest.mark.cluster
def test_each_kind_of_work_stays_in_its_pool(pooled: str, cluster: Cluster) -> None:
    with quiet_ray_data():
        rows = ray.data.range(8, override_num_blocks=8)
        assert find_nodes(rows.sort("id", boundaries=[4])) == {pooled}
    context = ray.data.DataContext.get_current().copy()
    with ray.data.DataContext.current(context):
        configure(context)
        assert find_nodes(ray.data.range(8, override_num_blocks=8)) == {pooled}

    store = storage.connect(f"{cluster.root}/pools")
    manifest = store_images(store, {"train": 64, "validation": 8, "test": 8})
    document = {
        "name": "pooled",
        "root": store.uri,
        "data": {"source": "unused"},
        "model": {"kind": "mlp", "hidden": [8]},
        "train": {"workers": 2, "global_batch": 32, "epochs": 1, "run": "pooled"},
    }
    before = list_workers()
    train(spec.parse(document), manifest)
    assert {node for _, node in list_workers() - before} == {pooled}

    def tell_node() -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node

    replica = serve.deployment(ray_actor_options=deploy._reserve(DeploySpec()))(tell_node)
    handle = serve.run(replica.bind(), name="pooled", route_prefix="/pooled")
    try:
        assert handle.remote().result(timeout_s=30) == pooled
    finally:
        serve.delete("pooled")


@pytest.mark.cluster
def test_a_run_larger_than_the_pool_can_grow_is_refused_at_once(pooled: str, bucket: str) -> None:
    store = storage.connect(bucket)
    manifest = store_images(store, {"train": 64, "validation": 8, "test": 8})
    document = {
        "name": "large",
        "root": store.uri,
        "data": {"source": "unused"},
        "model": {"kind": "mlp", "hidden": [8]},
        "train": {"workers": 4, "global_batch": 32},
    }
    with pytest.raises(HeliostatError, match="training pool can hold: 3, on 1 machines"):
        train(spec.parse(document), manifest)
