"""Nodes that Ray's autoscaler starts and ends on this machine: a raylet stands for a machine."""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
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

from heliostat.environment import STAND_IN
from heliostat.local import processes
from heliostat.local.scaling import HEAD, INSTANCE, LABELS, RESOURCES, TYPE
from heliostat.pauses import Pauses
from heliostat.pools import MARKET_LABEL

SPOT, ON_DEMAND = "spot", "on-demand"
SHORTAGE = "InsufficientInstanceCapacity"
GRACE_SECONDS = 2.0


class Nodes(NodeProvider):  # type: ignore[misc]
    """The provider of `heliostat up --autoscale`, in Ray's process that scales.

    `provider` names the cluster's `gcs_address` and `marker`, a folder for `scratch` and the file
    `capacity`: as many machines as the cloud has of a node type, on each market, by JSON such as
    `{"training": {"spot": 0}}`. What it does not name there is any number of. What happens is
    written to the file `journal`.
    """

    def __init__(self, provider: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider, cluster_name)
        self._lock = threading.Lock()
        self._head = _describe(HEAD, NODE_KIND_HEAD, HEAD)
        self._nodes: dict[str, _Node] = {}
        self._pauses = Pauses()

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._lock:
            for name, node in list(self._nodes.items()):
                self._look_at(name, node)
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
        resources: Mapping[str, float],
        labels: Mapping[str, str],
    ) -> None:
        """A spot machine that cannot be had comes on demand.

        Raises:
            NodeLaunchException: there is no capacity for one of `count` machines.
        """
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        with self._lock, self._pauses.keep(node_type):
            for _ in range(count):
                market = self._choose_market(node_type, node_config["spot"])
                name = f"{node_type}-{secrets.token_hex(3)}"
                self._nodes[name] = _Node(
                    {**_describe(name, NODE_KIND_WORKER, node_type), **tags},
                    market,
                    self._launch(name, node_type, resources, {**labels, MARKET_LABEL: market}),
                )
                self._tell(name, f"asked for, {market}")

    def terminate_node(self, node_id: str) -> None:
        processes.end(self.provider_config["marker"], GRACE_SECONDS, {INSTANCE: node_id})
        with self._lock:
            if node := self._nodes.pop(node_id, None):
                self._tell(node_id, f"let go, {node.age_seconds:.1f} s after it was asked for")

    def _look_at(self, name: str, node: "_Node") -> None:
        if not node.is_alive():
            # As a machine that was taken away.
            del self._nodes[name]
            self._tell(name, f"ended by itself: {node.start.log} may say why")
        elif not node.joined.is_set() and node.start.find_raylet():
            node.joined.set()
            self._tell(name, f"joined, {node.age_seconds:.1f} s after it was asked for")

    def _tell(self, name: str, what: str) -> None:
        with Path(self.provider_config["journal"]).open("a") as journal:
            journal.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {name} {what}\n")

    def _choose_market(self, node_type: str, spot: bool) -> str:
        markets = (SPOT, ON_DEMAND) if spot else (ON_DEMAND,)
        for market in markets:
            if self._has_capacity(node_type, market):
                return market
        words = f"there is no machine for {node_type}, {' or '.join(markets)}"
        self._tell(node_type, f"{SHORTAGE}: {words}")
        raise NodeLaunchException(SHORTAGE, words, None)

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
        self, name: str, node_type: str, resources: Mapping[str, float], labels: dict[str, str]
    ) -> "_Start":
        provider, declared = self.provider_config, json.dumps(dict(resources))
        environment = {
            **os.environ,
            STAND_IN: "1",
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
    began: float = field(default_factory=time.monotonic)
    joined: threading.Event = field(default_factory=threading.Event)

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self.began

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
