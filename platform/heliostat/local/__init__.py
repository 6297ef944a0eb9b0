"""The laptop cluster: an S3 store, a Ray head with Serve and an edge before it."""

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from heliostat.environment import (
    EDGE_HOST,
    EDGE_URL,
    LOOPBACK,
    PREFERRED_PORTS,
    STORE_PORT_OFFSET,
    Ports,
)
from heliostat.errors import HeliostatError
from heliostat.local import edge, head, machine, processes, scaling, store
from heliostat.local.home import (
    MARKER_FILE,
    Home,
    State,
    furnish,
    lock,
    read_state,
    read_store_keys,
    write_state,
)
from heliostat.local.home import Listen as Listen
from heliostat.local.home import locate as locate
from heliostat.pools import MARKET_LABEL, POOLS, ClusterSpec, tell

BUCKET = "heliostat"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A third of a cluster; it runs while all of its main programs do."""

    name: str
    title: str
    programs: frozenset[str]
    grace_seconds: float


# The edge ends first, so that requests end before their replicas, and Ray before the store, so that
# a job's last write still finds it.
EDGE = Part(edge.NAME, "the edge", frozenset({edge.PROGRAM}), grace_seconds=2.0)
RAY = Part(head.NAME, "Ray", frozenset({"gcs_server", "raylet"}), grace_seconds=2.0)
STORE = Part(store.NAME, "the S3 store", frozenset({"weed"}), grace_seconds=10.0)
PARTS = (EDGE, RAY, STORE)


@dataclass(frozen=True)
class Usage:
    """The processes of a part and the memory that they share with nobody."""

    pids: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True)
class Node:
    """A raylet that stands for a machine, of a type, bought on a market: spot or on-demand."""

    name: str
    type: str
    market: str


@dataclass(frozen=True)
class Cluster:
    """A laptop cluster that was started: where it answers and how to point a program at it."""

    home: Home
    state: State

    @property
    def root(self) -> str:
        return f"s3://{BUCKET}"

    @property
    def s3_url(self) -> str:
        return f"http://127.0.0.1:{self.state.ports.s3}"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.state.ports.dashboard}"

    @property
    def serve_url(self) -> str:
        return f"http://127.0.0.1:{self.state.ports.serve}"

    @property
    def edge_url(self) -> str:
        """Where models answer: the one address that is fit for others."""
        return edge.describe(self.state).url

    @property
    def gcs_address(self) -> str:
        return f"127.0.0.1:{self.state.ports.gcs}"

    @property
    def credentials(self) -> dict[str, str]:
        """What a program needs to be let in, by Ray and by the store."""
        keys = read_store_keys(self.home)
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.home.token),
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            "AWS_REGION": store.REGION,
            "AWS_DEFAULT_REGION": store.REGION,
        }

    @property
    def env(self) -> dict[str, str]:
        """The variables with which `ray job submit`, `ray.init` and S3 clients find the cluster.

        `ray job` prefers RAY_API_SERVER_ADDRESS and `serve` reads RAY_DASHBOARD_ADDRESS, which
        leaves RAY_ADDRESS for `ray.init` and `ray status`.
        """
        return {
            "RAY_ADDRESS": self.gcs_address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            EDGE_URL: self.edge_url,
            EDGE_HOST: self.state.listen.host,
            LOOPBACK.name: LOOPBACK.value,
            **({POOLS: tell(self.state.pools)} if self.state.pools else {}),
            **self.credentials,
        }


def start(
    home: Home,
    *,
    free_ports: bool = False,
    with_ray: bool = True,
    listen: Listen | None = None,
    pools: ClusterSpec | None = None,
    report: Report = lambda line: None,
) -> Cluster:
    """Start what does not run yet of store, Ray with Serve, and edge; a line per step to `report`.

    With `pools` the head is one that scales: each of their nodes is a raylet on this machine.

    Raises:
        HeliostatError: a port is taken or a part does not come up, and nothing of this call stays;
            or the cluster that runs was told to `listen` elsewhere or has other `pools`.
    """
    furnish(home)
    with lock(home):
        state = read_state(home)
        if state and not any(_runs(state, part) for part in PARTS):
            report("The last cluster here ended without `heliostat down`: starting anew.")
            _end(home, state)
            state = None
        state = state or replace(_plan(free_ports, listen or Listen()), pools=pools)
        if listen not in (None, state.listen):
            raise HeliostatError(
                f"the edge of {home.path} listens at {edge.describe(state).url} already: "
                f"`heliostat down` first, which keeps the data"
            )
        if pools not in (None, state.pools):
            raise HeliostatError(
                f"the cluster of {home.path} was started with other pools: `heliostat down` first, "
                "which keeps the data"
            )
        wanted = PARTS if with_ray else (STORE,)
        missing = [part for part in wanted if not _runs(state, part)]
        cluster = Cluster(home, state)
        if missing:
            report(f"Starting {' and '.join(part.title for part in missing)} in {home.path}")
            _start_parts(cluster, missing, report)
        else:
            report("Everything runs already.")
        return cluster


def find(home: Home) -> Cluster | None:
    """The cluster of `home`, if its store or its Ray runs."""
    state = read_state(home)
    if state and any(_runs(state, part) for part in PARTS):
        return Cluster(home, state)
    return None


def measure_usage(cluster: Cluster) -> dict[str, Usage]:
    """What each part of `cluster` takes, by its name; a part that does not run is left out."""
    return {
        part.name: _sum_usage(cluster.state, part) for part in PARTS if _runs(cluster.state, part)
    }


def list_nodes(cluster: Cluster) -> list[Node]:
    """What the autoscaler has brought, by name."""
    found = []
    for process in processes.find(cluster.state.marker(RAY.name)):
        environment = processes.read_environment(process)
        name = environment.get(scaling.INSTANCE, scaling.HEAD)
        if process.info["name"] == "raylet" and name != scaling.HEAD:
            market = json.loads(environment[scaling.LABELS]).get(MARKET_LABEL, "")
            found.append(Node(name, environment[scaling.TYPE], market))
    return sorted(found, key=lambda node: node.name)


def stop(home: Home) -> list[int]:
    """End every process that `start` started and keep the data; the ids of the processes."""
    if not home.exists:
        return []
    with lock(home):
        state = read_state(home)
        return _end(home, state) if state else []


def purge(home: Home) -> int:
    """Stop the cluster of `home` and remove the directory, objects included; the bytes removed.

    Raises:
        HeliostatError: the directory is not a Heliostat home.
    """
    if not home.exists:
        raise HeliostatError(
            f"{home.path} is not a Heliostat home (it has no {MARKER_FILE} file): "
            f"nothing was removed"
        )
    stop(home)
    size_bytes = sum(path.lstat().st_size for path in home.path.rglob("*"))
    shutil.rmtree(home.path)
    return size_bytes


def _plan(free_ports: bool, listen: Listen) -> State:
    """Decide everything about a new cluster; of the world only its scratch directory is made."""
    chosen = {"replicas": machine.pick_replica_ports()}
    chosen |= {} if free_ports else PREFERRED_PORTS
    others = [field.name for field in fields(Ports) if field.name not in chosen]
    ports = Ports(**chosen, **dict(zip(others, machine.pick_ports(len(others)), strict=True)))
    # Sockets lie in it, whose paths are limited to about a hundred characters.
    scratch = Path(tempfile.mkdtemp(prefix="heliostat-", dir="/tmp"))
    return State(secrets.token_hex(16), ports, machine.measure(), scratch, listen)


def _start_parts(cluster: Cluster, parts: list[Part], report: Report) -> None:
    """Start `parts`; if one fails or the user interrupts, none of them stays."""
    home, state = cluster.home, cluster.state
    try:
        _end_parts(state, parts)
        machine.check_free(_list_ports(state.ports, parts))
        write_state(home, state)
        _launch(cluster, parts, report)
    except BaseException:
        _end_parts(state, parts)
        if find(home) is None:
            _end(home, state)
        raise


def _launch(cluster: Cluster, parts: list[Part], report: Report) -> None:
    home, state = cluster.home, cluster.state
    began = time.monotonic()

    def tell(what: str) -> None:
        report(f"{time.monotonic() - began:5.1f} s  {what}")

    environment = head.compose_environment(state, cluster.credentials)
    if RAY in parts:
        ray = head.launch(home, state, environment)
        serve = head.launch_serve(home, state, environment)
    if STORE in parts:
        store.await_bucket(home, state.ports, store.launch(home, state), BUCKET)
        tell(f"S3 store   {cluster.s3_url}")
    if RAY in parts:
        head.await_end(ray, "Ray", home.ray_log)
        tell(f"Ray        {cluster.dashboard_url}")
        head.let_serve_start(serve)
        head.await_end(serve, "Ray Serve", home.serve_log)
        tell(f"Ray Serve  {cluster.serve_url}")
    if EDGE in parts:
        marker = state.marker(edge.NAME)
        edge.start(edge.describe(state), marker, state.scratch, home.edge_log)
        tell(f"Edge       {cluster.edge_url}")


def _list_ports(ports: Ports, parts: Iterable[Part]) -> list[tuple[str, int]]:
    """The ports that a user meets, with what each is for."""
    purposes = {
        STORE: [("S3", ports.s3), ("S3, gRPC", ports.s3 + STORE_PORT_OFFSET)],
        RAY: [
            ("Ray dashboard", ports.dashboard),
            ("Ray GCS", ports.gcs),
            ("Ray Serve", ports.serve),
        ],
        EDGE: [("edge", ports.edge)],
    }
    return [purpose for part in parts for purpose in purposes[part]]


def _runs(state: State, part: Part) -> bool:
    found = processes.find(state.marker(part.name))
    return {process.info["name"] for process in found} >= part.programs


def _sum_usage(state: State, part: Part) -> Usage:
    found = processes.find(state.marker(part.name))
    return Usage(
        tuple(sorted(process.pid for process in found)),
        sum(map(processes.measure_memory, found)),
    )


def _end(home: Home, state: State) -> list[int]:
    """End all parts, keep Ray's logs, drop its scratch and the state."""
    ended = _end_parts(state, PARTS)
    session_logs = state.ray_directory / "session_latest" / "logs"
    if session_logs.exists():
        shutil.rmtree(home.session_logs, ignore_errors=True)
        shutil.move(session_logs, home.session_logs)
    shutil.rmtree(state.scratch, ignore_errors=True)
    home.state.unlink(missing_ok=True)
    return ended


def _end_parts(state: State, parts: Iterable[Part]) -> list[int]:
    if EDGE in parts:
        edge.stop(state.marker(edge.NAME))
    return [
        pid for part in parts for pid in processes.end(state.marker(part.name), part.grace_seconds)
    ]
