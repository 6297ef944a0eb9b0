"""Laws of the manifests for Kubernetes: it and KubeRay take them, and nothing in them is open."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as derive_config,
)
from ray.serve.schema import ServeDeploySchema

from heliostat import pools
from heliostat.cluster.render import describe, render
from heliostat.pools import POOLS, find_pool
from heliostat.serve.replica import Plan
from kuberay_fields import KINDS

Manifest = dict[str, Any]
KUBERNETES = "1.36"
SAID = ("image=registry.example/heliostat:0.1.0",)


def read(*said: str) -> dict[str, list[Manifest]]:
    files = render("kuberay", describe("kuberay", None, (*SAID, *said)))
    return {name: list(yaml.safe_load_all(text)) for name, text in files.items()}


@pytest.fixture(scope="module")
def manifests() -> dict[str, Manifest]:
    return {found["kind"]: found for file in read().values() for found in file}


def find_cluster(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    found: Manifest = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def list_groups(cluster: Manifest) -> list[Manifest]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def take(manifest: Manifest) -> None:
    """As the API server would with `--validate=strict`.

    Raises:
        ValidationError: a field is unknown, missing or of another type.
    """
    if manifest["kind"] not in KINDS:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, KINDS[manifest["kind"]])
    for group in list_groups(find_cluster(manifest)):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    options = find_cluster(manifest)["autoscalerOptions"]
    kept = {key: options[key] for key in ("env", "resources", "securityContext")}
    container = {"name": "autoscaler", "image": "ray"} | kept
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [container]}}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


KIND = ("ServiceAccount", "NetworkPolicy", "RayCluster", "RayJob", "RayService")


@pytest.mark.parametrize("kind", KIND)
def test_the_api_takes_it(manifests: dict[str, Manifest], kind: str) -> None:
    take(manifests[kind])


def spoil() -> Iterator[tuple[str, str, Callable[[Manifest], object]]]:
    yield "RayCluster", "a key", lambda m: m["spec"].update(headGroup={})
    yield "RayCluster", "type", lambda m: m["spec"]["workerGroupSpecs"][0].update(priority="1")
    yield "RayCluster", "pod", lambda m: m["spec"]["headGroupSpec"]["template"].update(specs={})
    yield (
        *("RayJob", "container"),
        lambda m: find_cluster(m)["workerGroupSpecs"][0]["template"]["spec"]["containers"][
            0
        ].update(imagePull="x"),
    )
    yield "RayService", "no head", lambda m: find_cluster(m).pop("headGroupSpec")
    yield "NetworkPolicy", "a key", lambda m: m["spec"].update(ingres=[])


@pytest.mark.parametrize(
    ("kind", "name", "change"), list(spoil()), ids=lambda value: str(value)[:12]
)
def test_the_api_refuses_what_it_does_not_know(
    manifests: dict[str, Manifest], kind: str, name: str, change: Callable[[Manifest], object]
) -> None:
    spoiled = deepcopy(manifests[kind])
    change(spoiled)
    errors = (jsonschema.ValidationError, kubernetes_validate.ValidationError, KeyError)
    with pytest.raises(errors):
        take(spoiled)


def test_every_pod_is_bounded_and_without_privileges(manifests: dict[str, Manifest]) -> None:
    for kind in KINDS:
        cluster = find_cluster(manifests[kind])
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        for group in list_groups(cluster):
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                assert container["image"] == SAID[0].partition("=")[2]
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                size = container["resources"]
                assert size["limits"] == size["requests"]
                assert {"cpu", "memory"} <= size["limits"].keys()


def test_the_token_comes_from_a_secret_and_stands_nowhere(manifests: dict[str, Manifest]) -> None:
    for kind in KINDS:
        cluster = find_cluster(manifests[kind])
        assert cluster["authOptions"] == {"mode": "token", "secretName": "heliostat-token"}
        names = {
            variable["name"]
            for group in list_groups(cluster)
            for variable in group["template"]["spec"]["containers"][0]["env"]
        }
        assert not [name for name in names if "TOKEN" in name or "AWS_SECRET" in name]


def test_dashboard_and_metrics_are_for_the_cluster_alone(manifests: dict[str, Manifest]) -> None:
    spec = manifests["NetworkPolicy"]["spec"]
    labels = spec["podSelector"]["matchLabels"]
    for group in list_groups(find_cluster(manifests["RayCluster"])):
        assert labels.items() <= group["template"]["metadata"]["labels"].items()
    open_to_others = {
        (tuple(peer["podSelector"]["matchLabels"].items()), port["port"])
        for rule in spec["ingress"]
        for peer in rule["from"]
        for port in rule.get("ports", [])
    }
    assert {port for peer, port in open_to_others if "client" in str(peer)} == {8000}
    assert {peer[0][1] for peer, port in open_to_others if port == 8265} == {"kuberay-operator"}
    assert all(rule["from"] for rule in spec["ingress"])


def test_the_autoscaler_prefers_spot_and_knows_the_pools(manifests: dict[str, Manifest]) -> None:
    cluster = find_cluster(manifests["RayCluster"])
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 300
    known = derive_config({"metadata": {"name": "x", "namespace": "y"}, "spec": cluster})
    types = known["available_node_types"]
    spot, on_demand = types["training"], types["training-on-demand"]
    assert spot["resources"] == on_demand["resources"]
    assert spot["resources"]["GPU"] == 1
    assert spot["priority"] > on_demand["priority"]
    for purpose in pools.PURPOSES:
        assert types[purpose]["resources"][purpose] == pools.DECLARED
        assert types[purpose]["labels"][pools.LABEL] == purpose
    markets = [
        group["template"]["spec"]["nodeSelector"]["eks.amazonaws.com/capacityType"]
        for group in cluster["workerGroupSpecs"]
        if group["groupName"].startswith("training")
    ]
    assert markets == ["SPOT", "ON_DEMAND"]


def test_processes_are_told_of_the_pools(manifests: dict[str, Manifest]) -> None:
    for group in list_groups(find_cluster(manifests["RayCluster"])):
        variables = group["template"]["spec"]["containers"][0]["env"]
        settings = {one["name"]: one["value"] for one in variables}
        most = find_pool("training", {POOLS: settings[POOLS]})
        assert most
        assert (most.machines, most.gpus) == (4, 1)
        assert settings["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_what_is_served_is_what_a_deploy_would_serve(manifests: dict[str, Manifest]) -> None:
    text = manifests["RayService"]["spec"]["serveConfigV2"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    plan = Plan.model_validate(application.args)
    assert plan.models == {"digits-mlp": (1,)}
    assert plan.root == "s3://heliostat-models"
    assert plan.auth
    module, _, name = application.import_path.partition(":")
    assert (module, hasattr(__import__(module, fromlist=[name]), name)) == (Plan.__module__, True)
