"""The cluster on Kubernetes: what KubeRay's operator (1.7 or newer) makes a Ray cluster of."""

from typing import Any

import yaml

from heliostat.environment import GIB, REQUIRED, TUNED
from heliostat.hardware import Machine
from heliostat.pools import POOLS, ClusterSpec, NodeType, list_with_stand_ins, tell

RAY_VERSION = "2.60.0"
RAY_USER, USERS = 1000, 100  # of the images that Ray publishes
# Of a machine Kubernetes keeps a core and a tenth of the memory; objects get a quarter of the rest.
SYSTEM_CPUS, POD_SHARE, OBJECTS_SHARE = 1, 0.9, 0.25
# A node that was asked for and does not come within it makes way for its stand-in on demand.
PATIENCE_SECONDS = 900
# The label by which clouds tell machines on spot, and its value there and elsewhere.
MARKETS = {
    "aws": ("eks.amazonaws.com/capacityType", "SPOT", "ON_DEMAND"),
    "gcp": ("cloud.google.com/gke-provisioning", "spot", "standard"),
}
Manifest = dict[str, Any]


def list_manifests(cluster: ClusterSpec) -> dict[str, list[Manifest]]:
    """By the name of their file: what all need, and a cluster, a job and a service of it."""
    return {
        "base": [_account(cluster), _policy(cluster)],
        "raycluster": [_manifest("RayCluster", cluster, _cluster(cluster))],
        "rayjob": [_manifest("RayJob", cluster, _job(cluster))],
        "rayservice": [_manifest("RayService", cluster, _service(cluster))],
    }


def _manifest(kind: str, cluster: ClusterSpec, spec: Manifest) -> Manifest:
    metadata = {"name": cluster.name, "labels": _labels(cluster)}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _cluster(cluster: ClusterSpec) -> Manifest:
    return {
        "rayVersion": RAY_VERSION,
        # The operator, which asks the cluster how it is, knows the token from this Secret as well.
        "authOptions": {"mode": "token", "secretName": f"{cluster.name}-token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": round(cluster.idle_timeout_minutes * 60),
            "securityContext": _closed(),
            "resources": _exactly({"cpu": "500m", "memory": "1Gi"}),
            "env": _environment(
                {"RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": f"{PATIENCE_SECONDS}"}
            ),
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # Pods are reached by their address, which the network policy allows to few.
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "template": _pod("ray-head", cluster, cluster.machines[0]),
        },
        "workerGroupSpecs": [_group(node, cluster) for node in list_with_stand_ins(cluster)],
    }


def _group(node: NodeType, cluster: ClusterSpec) -> Manifest:
    return {
        "groupName": node.name,
        "replicas": node.min_workers,
        "minReplicas": node.min_workers,
        "maxReplicas": node.max_workers,
        "priority": node.priority,
        "labels": node.labels,
        "resources": {name: str(count) for name, count in _declare(node).items()},
        "rayStartParams": {},
        "template": _pod("ray-worker", cluster, node.machine, node.spot),
    }


def _job(cluster: ClusterSpec) -> Manifest:
    return {
        "entrypoint": cluster.job,
        "submissionMode": "HTTPMode",  # the operator submits, without a pod of its own
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 300,
        "rayClusterSpec": _cluster(cluster),
    }


def _service(cluster: ClusterSpec) -> Manifest:
    """Serves one version; `heliostat deploy` is for a RayCluster, where Serve is left alone."""
    name, number = cluster.serves.split(":")
    plan = {
        "root": f"s3://{cluster.bucket}",
        "models": {name: [int(number)]},
        "max_latency_ms": None,
        "max_model_bytes": GIB,
        "max_body_bytes": 16 * 2**20,
        "max_requests": 100,
        "request_timeout_s": 30,
        "max_streams": 8,
        "max_context": None,
        "vllm": None,
        "gpus": 0,
        "auth": True,
        "scales": False,
    }
    application = {
        "name": "heliostat",
        "route_prefix": "/",
        "import_path": "heliostat.serve.replica:build_application",
        "args": plan,
        "deployments": [
            {
                "name": "Replica",
                "num_replicas": 1,
                "ray_actor_options": {"num_cpus": 1, "resources": {"serving": 0.001}},
            }
        ],
    }
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [application],
    }
    return {
        "serveConfigV2": yaml.safe_dump(config, sort_keys=False),
        "rayClusterConfig": _cluster(cluster),
    }


def _pod(name: str, cluster: ClusterSpec, machine: Machine, spot: bool = False) -> Manifest:
    market, on_spot, on_demand = MARKETS[machine.provider]
    container = {
        "name": name,
        "image": cluster.image,
        "securityContext": _closed(),
        "env": _environment(_settings(cluster)),
        "resources": _exactly(_size(machine)),
        "volumeMounts": [{"name": "objects", "mountPath": "/dev/shm"}],
    }
    return {
        "metadata": {"labels": _labels(cluster)},
        "spec": {
            "serviceAccountName": cluster.name,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": RAY_USER,
                "runAsGroup": USERS,
                "fsGroup": USERS,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "nodeSelector": {
                "node.kubernetes.io/instance-type": machine.name,
                market: on_spot if spot else on_demand,
            },
            "tolerations": [
                {"key": key, "operator": "Exists", "effect": "NoSchedule"}
                for key in ("nvidia.com/gpu", "cloud.google.com/gke-spot")
            ],
            "containers": [container],
            "volumes": [
                {
                    "name": "objects",
                    "emptyDir": {"medium": "Memory", "sizeLimit": _objects(machine)},
                }
            ],
        },
    }


def _settings(cluster: ClusterSpec) -> dict[str, str]:
    """Without what the operator sets itself."""
    tables = {s.name: s.value for s in (*REQUIRED, *TUNED) if s.name.startswith("RAY_")}
    del tables["RAY_AUTH_MODE"]
    return {POOLS: tell(cluster), "AWS_REGION": cluster.region, **tables}


def _declare(node: NodeType) -> dict[str, int]:
    return node.resources | {"CPU": node.machine.vcpus - SYSTEM_CPUS}


def _size(machine: Machine) -> dict[str, str]:
    size = {
        "cpu": str(machine.vcpus - SYSTEM_CPUS),
        "memory": f"{int(machine.memory_bytes * POD_SHARE / GIB)}Gi",
    }
    gpus = {"nvidia.com/gpu": str(machine.accelerators)} if machine.accelerators else {}
    return size | gpus


def _objects(machine: Machine) -> str:
    return f"{int(machine.memory_bytes * POD_SHARE * OBJECTS_SHARE / GIB)}Gi"


def _closed() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _exactly(size: dict[str, str]) -> Manifest:
    return {"requests": dict(size), "limits": dict(size)}


def _environment(settings: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in settings.items()]


def _labels(cluster: ClusterSpec) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": cluster.name}


def _account(cluster: ClusterSpec) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": cluster.name, "labels": _labels(cluster)},
    }


def _policy(cluster: ClusterSpec) -> Manifest:
    """Pods of the cluster talk to each other, the operator asks after them, clients ask Serve."""

    def allow(labels: dict[str, str], *ports: int) -> Manifest:
        peer = {"namespaceSelector": {}, "podSelector": {"matchLabels": labels}}
        return {"from": [peer], "ports": [{"protocol": "TCP", "port": port} for port in ports]}

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": cluster.name, "labels": _labels(cluster)},
        "spec": {
            "podSelector": {"matchLabels": _labels(cluster)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": _labels(cluster)}}]},
                allow({"app.kubernetes.io/name": "kuberay-operator"}, 8265, 8000),
                allow({"app.kubernetes.io/name": "prometheus"}, 8080),
                allow({f"{cluster.name}/client": "true"}, 8000),
            ],
        },
    }
