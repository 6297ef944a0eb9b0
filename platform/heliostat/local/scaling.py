"""What Ray's autoscaler is told on this machine: node types as a cloud would have them."""

import json
from pathlib import Path
from typing import Any

from heliostat.local.home import Home, State, write_private
from heliostat.pools import LABEL, ClusterSpec, NodeType, list_node_types

HEAD = "head"
# By which a raylet says which node it is, and its processes which one they belong to.
INSTANCE, TYPE = "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME"
LABELS, RESOURCES = "RAY_OVERRIDE_LABELS", "RAY_OVERRIDE_RESOURCES"
# For the processes of the head alone: the autoscaler looks every second, not every five, and what
# fails to come is asked for again after as long.
SETTINGS = {
    "RAY_enable_autoscaler_v2": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    INSTANCE: HEAD,
    TYPE: HEAD,
}
# Ray wants these of a cluster whose machines it sets up.
EMPTY = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "rsync_exclude",
    "rsync_filter",
)


def write_config(home: Home, state: State, cluster: ClusterSpec) -> Path:
    """The file for `ray start --autoscaling-config`."""
    path = state.scratch / "autoscaling.json"
    write_private(path, json.dumps(compose(home, state, cluster), indent=1))
    return path


def compose(home: Home, state: State, cluster: ClusterSpec) -> dict[str, Any]:
    node_types = list_node_types(cluster)
    head = {"resources": {"CPU": state.bounds.logical_cpus}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": cluster.name,
        "max_workers": sum(node_type.max_workers for node_type in node_types),
        "idle_timeout_minutes": cluster.idle_timeout_minutes,
        "provider": {
            "type": "external",
            "module": "heliostat.local.nodes.Nodes",
            "gcs_address": f"127.0.0.1:{state.ports.gcs}",
            "marker": state.marker("ray"),
            "scratch": str(state.scratch),
            "capacity": str(home.capacity),
            "journal": str(home.nodes_log),
            # The raylets start themselves.
            "disable_node_updaters": True,
        },
        "head_node_type": HEAD,
        "available_node_types": {HEAD: head, **{one.name: _describe(one) for one in node_types}},
        "upscaling_speed": 100,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in EMPTY},
    }


def _describe(node_type: NodeType) -> dict[str, Any]:
    return {
        "resources": node_type.resources,
        # Not which machine it stands for: what runs here says nothing about that one.
        "labels": {LABEL: node_type.purpose},
        "node_config": {"spot": node_type.spot},
        "min_workers": node_type.min_workers,
        "max_workers": node_type.max_workers,
        "priority": node_type.priority,
    }
