"""Nodes that Ray's autoscaler starts and ends on this machine: a raylet stands for a machine."""

import json
import os
import secrets
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from heliostat.local import processes
from heliostat.pools import MARKET_LABEL

HEAD, HEAD_TYPE = "head", "head"
SPOT, ON_DEMAND = "spot", "on-demand"
# By which a raylet says which machine it is, and its processes what they belong to.
INSTANCE, TYPE = "RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME"
LABELS, RESOURCES = "RAY_OVERRIDE_LABELS", "RAY_OVERRIDE_RESOURCES"
SHORTAGE = "InsufficientInstanceCapacity"
GRACE_SECONDS = 2.0


class Nodes(NodeProvider):  # type: ignore[misc]
    """The provider of `heliostat up --autoscale`, in Ray's process that scales.

    `provider` names the cluster's `gcs_address` and `marker`, a folder for `scratch` and the file
    `capacity`: as many machines as the cloud has of a node type, on each market, by JSON such as
    `{"training": {"spot": 0}}`. What it does not name there is any number of.
    """

    def __init__(self, provider: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider, cluster_name)
        self._lock = threading.Lock()
        self._head = _describe(HEAD, NODE_KIND_HEAD, HEAD_TYPE)
        self._nodes: dict[str, _Node] = {}

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._lock:
            # One whose raylet ended by itself is gone, as a machine that was taken away.
            self._nodes = {name: node for name, node in self._nodes.items() if node.is_alive()}
            known = {HEAD: self._head, **{name: node.tags for name, node in self._nodes.items()}}
        return [name for name, tags in known.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id == HEAD or node_id in self._nodes

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._lock:
            return self._head if node_id == HEAD else self._nodes[node_id].tags

    def internal_ip(self, node_id: str) -> str:
        return "127.0.0.1"

    external_ip = internal_ip

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """A spot machine that cannot be had comes on demand.

        Raises:
            NodeLaunchException: there is no capacity for one of `count` machines.
        """
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        with self._lock:
            for _ in range(count):
                market = self._choose_market(node_type, node_config["spot"])
                name = f"{node_type}-{secrets.token_hex(3)}"
                self._nodes[name] = _Node(
                    {**_describe(name, NODE_KIND_WORKER, node_type), **tags},
                    market,
                    self._launch(name, node_type, resources, {**labels, MARKET_LABEL: market}),
                )

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            self._nodes.pop(node_id, None)
        processes.end(self.provider_config["marker"], GRACE_SECONDS, {INSTANCE: node_id})

    def _choose_market(self, node_type: str, spot: bool) -> str:
        markets = (SPOT, ON_DEMAND) if spot else (ON_DEMAND,)
        for market in markets:
            if self._has_capacity(node_type, market):
                return market
        raise NodeLaunchException(
            SHORTAGE, f"there is no machine for {node_type}, {' or '.join(markets)}", None
        )

    def _has_capacity(self, node_type: str, market: str) -> bool:
        file = Path(self.provider_config["capacity"])
        told = json.loads(file.read_text()) if file.exists() else {}
        most = told.get(node_type, {}).get(market)
        taken = sum(
            node.tags[TAG_RAY_USER_NODE_TYPE] == node_type and node.market == market
            for node in self._nodes.values()
        )
        return most is None or taken < most

    def _launch(
        self, name: str, node_type: str, resources: dict[str, float], labels: dict[str, str]
    ) -> "_Start":
        provider, declared = self.provider_config, json.dumps(resources)
        environment = {
            **os.environ,
            INSTANCE: name,
            TYPE: node_type,
            LABELS: json.dumps(labels),
            RESOURCES: declared,
        }
        # A folder each: raylets that start together in one take each other's sockets.
        folder = Path(provider["scratch"]) / name.rpartition("-")[2]
        folder.mkdir()
        log = folder / "join.log"
        command = [sys.executable, "-P", "-m", "heliostat.local.join"]
        command += [provider["gcs_address"], str(folder), declared]
        return _Start(processes.launch(provider["marker"], command, environment, log), log)


@dataclass(frozen=True)
class _Start:
    """The program that starts a raylet, whose process id is the last that it says."""

    program: "subprocess.Popen[bytes]"
    log: Path

    def find_raylet(self) -> int | None:
        """None while it starts, or if it could not."""
        if self.program.poll() != 0:
            return None
        return int(self.log.read_text().split()[-1])


@dataclass(frozen=True)
class _Node:
    tags: dict[str, str]
    market: str
    start: _Start

    def is_alive(self) -> bool:
        if self.start.program.poll() is None:
            return True
        raylet = self.start.find_raylet()
        return raylet is not None and psutil.pid_exists(raylet)


def _describe(node: str, kind: str, node_type: str) -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: kind,
        TAG_RAY_USER_NODE_TYPE: node_type,
        TAG_RAY_NODE_NAME: node,
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }
