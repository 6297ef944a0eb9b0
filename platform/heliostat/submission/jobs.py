"""The jobs of a cluster over its dashboard: submit, list, stop, and what surrounds each."""

import codecs
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_actors, list_nodes, list_placement_groups

from heliostat.errors import HeliostatError
from heliostat.hardware import MACHINES
from heliostat.pools import PURPOSES, find_pool
from heliostat.submission import launches
from heliostat.submission.fit import Kind, Resources
from heliostat.submission.order import Order
from heliostat.submission.reason import ENDED, Holder, Request, Situation

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
SUPERVISOR = "_ray_internal_job_actor_"
NODE_GROUP = "ray.io/node-group"
OWN_RESOURCES = ("memory", "object_store_memory", *PURPOSES)
UNPLACED = ("PENDING_CREATION", "DEPENDENCIES_UNREADY", "RESTARTING")
# Without the second, Ray takes nodes that have died for some that it could not list.
ALL: dict[str, Any] = {"limit": 10_000, "raise_on_missing_output": False}
TAIL_LINES = 40
LOG_SECONDS = 60
# They tell of every step of an upload, and of the end of each connection.
CHATTY = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)


@dataclass(frozen=True)
class JobState:
    """A job as Ray knows it; times are Unix seconds of the head, None if it has not come to it."""

    id: str
    status: str
    entrypoint: str
    message: str
    started: float | None
    ended: float | None
    exit_code: int | None
    metadata: Mapping[str, str]
    ray_job: str
    node: str

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def exit_status(self) -> int:
        """Of a program that stands for the job: what its own was, 143 if it was stopped."""
        if self.status == "SUCCEEDED":
            return 0
        return 143 if self.status == "STOPPED" else self.exit_code or 1


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`.

    Every method raises HeliostatError if that does not answer or does not let us in.
    """

    def __init__(self, address: str | None = None) -> None:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with _explained(address or next(filter(None, map(os.environ.get, ADDRESSES)), "")):
            self.client = JobSubmissionClient(address)
        self.address: str = self.client.get_address()

    def submit(self, order: Order) -> None:
        """Raises HeliostatError: the id is taken, or Ray refuses the job."""
        if state := self.find(order.id):
            raise HeliostatError(_say_taken(order.id, state.status))
        environment = {**order.environment, "working_dir": order.working_dir}
        with _explained(self.address):
            try:
                self.client.submit_job(
                    entrypoint=shlex.join(order.entrypoint),
                    submission_id=order.id,
                    runtime_env=environment,
                    metadata=dict(order.metadata),
                    entrypoint_num_cpus=order.cpus or None,
                    entrypoint_num_gpus=order.gpus or None,
                )
            except RuntimeError as error:
                if "already exists" in str(error):  # another has come between
                    raise HeliostatError(_say_taken(order.id, "new")) from error
                raise HeliostatError(
                    f"Ray refused the job: {' '.join(str(error).split())[:400]}"
                ) from error

    def find(self, job: str) -> JobState | None:
        with _explained(self.address):
            try:
                return _read(self.client.get_job_info(job))
            except RuntimeError as error:
                if "does not exist" in str(error) or "404" in str(error):
                    return None
                raise

    def require(self, job: str) -> JobState:
        """Raises HeliostatError if there is no such job; names the newest."""
        if state := self.find(job):
            return state
        newest = ", ".join(state.id for state in self.list()[:5]) or "none"
        raise HeliostatError(f"there is no job {job!r:.80} on this cluster; the newest: {newest}")

    def list(self) -> list[JobState]:
        """Those that were submitted, the newest first."""
        with _explained(self.address):
            found = [_read(one) for one in self.client.list_jobs() if one.submission_id]
        return sorted(found, key=lambda state: -(state.started or 0))

    def stop(self, job: str) -> None:
        with _explained(self.address):
            self.client.stop_job(job)

    def read_log(self, state: JobState, lines: int) -> Iterator[str]:
        """The last `lines` lines of what the job printed, all of it if -1, in pieces; nothing
        before it runs."""
        if state.node:
            yield from self._read_file(state.node, f"job-driver-{state.id}.log", lines)

    def _read_file(self, node: str, name: str, lines: int) -> Iterator[str]:
        """Of a log of a node, in pieces; nothing if there is none."""
        with (
            _explained(self.address),
            requests.get(
                f"{self.address}/api/v0/logs/file",
                params={"node_id": node, "filename": name, "lines": str(lines)},
                headers=self.client._headers,
                stream=True,
                timeout=LOG_SECONDS,
            ) as answer,
        ):
            if answer.status_code != 200:
                return
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            yield from map(decoder.decode, answer.iter_content(chunk_size=None))

    def _tell_launches(self) -> Iterator[str]:
        """Of nodes that come or do not, where the autoscaler of the cluster can be reached."""
        address = os.environ.get("RAY_ADDRESS", "")
        if not address or "://" in address or address == "auto":
            return
        try:
            found = launches.read_launches(address)
        except HeliostatError as error:  # the rest is known without it
            yield str(error)
            return
        log = ""
        if found.failed:
            log = "".join(self._read_file(self.find_head(), launches.LOG, launches.LOG_LINES))
        yield from launches.tell_launches(found, launches.find_refusals(log))

    def list_kinds(self, cluster_file: Path | None = None) -> tuple[tuple[Kind, ...], bool]:
        """The nodes that there are, those that there may be by `cluster_file` or by the pools that
        this process is told of, and whether there may be others still."""
        with _explained(self.address):
            nodes = list_nodes(self.address, filters=[("state", "=", "ALIVE")], **ALL)
        counts: dict[tuple[str, tuple[tuple[str, float], ...]], int] = {}
        for node in nodes:
            group = (node.labels or {}).get(NODE_GROUP, "")
            name = group or ("head" if node.is_head_node else "node")
            shape = tuple(sorted(_plain(node.resources_total).items()))
            counts[name, shape] = counts.get((name, shape), 0) + 1
        kinds = [Kind(name, dict(shape), count) for (name, shape), count in counts.items()]
        grows = any((node.labels or {}).get(NODE_GROUP) for node in nodes)
        pools = list_pools()
        if cluster_file is None and not pools:
            return tuple(kinds), grows
        declared, are_all = read_kinds(cluster_file) if cluster_file else (pools, True)
        names = {kind.name for kind in declared}
        return (*(kind for kind in kinds if kind.name not in names), *declared), not are_all

    def find_head(self) -> str:
        """The id of the head's node, under which the queue of the cluster lies in the bucket."""
        wanted = [("is_head_node", "=", "True"), ("state", "=", "ALIVE")]
        with _explained(self.address):
            return str(list_nodes(self.address, filters=wanted, **ALL)[0].node_id)

    def observe(self, state: JobState) -> Situation:
        """The situation of a job now."""
        with _explained(self.address):
            actors = list_actors(
                self.address, filters=[("state", "!=", "DEAD")], detail=True, **ALL
            )
            groups = list_placement_groups(
                self.address, filters=[("state", "!=", "REMOVED")], detail=True, **ALL
            )
        kinds, grows = self.list_kinds()
        names = {one.ray_job: f"job {one.id}" for one in self.list() if one.ray_job}
        supervisor = next((a for a in actors if a.name == f"{SUPERVISOR}{state.id}"), None)
        return Situation(
            state.status,
            state.message,
            supervisor.state if supervisor else ("" if state.status == "PENDING" else "gone"),
            tuple(_list_requests(state, actors, groups)),
            kinds,
            tuple(_list_holders(names, actors, groups)),
            grows,
            tuple(self._tell_launches()),
            tuple("".join(self.read_log(state, TAIL_LINES)).splitlines()),
        )


def list_pools() -> tuple[Kind, ...]:
    """Those that HELIOSTAT_POOLS tells this process of, at their largest."""
    found = {purpose: find_pool(purpose) for purpose in PURPOSES}
    return tuple(
        Kind(purpose, {"CPU": most.cpus, "GPU": most.gpus}, most.machines)
        for purpose, most in found.items()
        if most
    )


def read_kinds(cluster_file: Path) -> tuple[tuple[Kind, ...], bool]:
    """The kinds of nodes that the file of `ray up` declares, and whether these are all of them:
    without resources in the file a kind is known by its machine, if that is in our table.

    Raises:
        HeliostatError: it cannot be read as such a file.
    """
    try:
        document = yaml.safe_load(cluster_file.read_text(encoding="utf-8"))
        types, head = document["available_node_types"], document["head_node_type"]
        kinds = [
            Kind(name, _find_resources(one), 1 if name == head else one.get("max_workers", 0))
            for name, one in types.items()
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise HeliostatError(
            f"{cluster_file} is not the file of a cluster as `ray up` takes it: it needs "
            "head_node_type and available_node_types"
        ) from error
    known = tuple(kind for kind in kinds if kind.resources)
    return known, len(known) == len(kinds)


def _find_resources(node_type: Mapping[str, Any]) -> dict[str, float]:
    if node_type.get("resources"):
        return _plain(node_type["resources"])
    name = (node_type.get("node_config") or {}).get("InstanceType")
    machine = next((one for one in MACHINES if one.name == name), None)
    return {"CPU": machine.vcpus, "GPU": machine.accelerators} if machine else {}


def _list_requests(state: JobState, actors: Any, groups: Any) -> Iterator[Request]:
    for actor in actors:
        if actor.name == f"{SUPERVISOR}{state.id}":
            needs = _plain(actor.required_resources)
            if actor.state in UNPLACED and needs:
                yield Request("its program", (needs,))
        elif _belongs(actor.job_id, state) and actor.state in UNPLACED:
            needs = _plain(actor.required_resources)
            if needs and not _placed(actor):
                yield Request(f"an actor ({actor.class_name})", (needs,))
    for group in groups:
        if _belongs(group.creator_job_id, state) and group.state in ("PENDING", "RESCHEDULING"):
            yield Request("a group of workers", tuple(_bundles(group)))


def _list_holders(names: Mapping[str, str], actors: Any, groups: Any) -> Iterator[Holder]:
    held: dict[str, dict[str, float]] = {}

    def add(name: str, resources: Resources) -> None:
        sums = held.setdefault(name, {})
        for key, amount in resources.items():
            sums[key] = sums.get(key, 0) + amount

    for actor in actors:
        if actor.state == "ALIVE" and not _placed(actor):
            _, colon, served = actor.class_name.partition("ServeReplica:")
            owner = f"served {served}" if colon else names.get(actor.job_id, actor.class_name)
            add(owner, _plain(actor.required_resources))
    for group in groups:
        if group.state == "CREATED":
            for bundle in _bundles(group):
                add(names.get(group.creator_job_id, "another program"), bundle)
    yield from (Holder(name, sums) for name, sums in held.items() if any(sums.values()))


def _belongs(ray_job: str, state: JobState) -> bool:
    return bool(state.ray_job) and ray_job == state.ray_job


def _placed(actor: Any) -> bool:
    """Whether it runs in a placement group, which has the resources."""
    return bool(actor.placement_group_id)


def _bundles(group: Any) -> list[dict[str, float]]:
    return [_plain(bundle.get("unit_resources") or {}) for bundle in group.bundles or []]


def _plain(resources: Any) -> dict[str, float]:
    """CPUs, GPUs, and what users declare; without what Ray and the pools count for themselves."""
    return {
        name: float(amount)
        for name, amount in (resources or {}).items()
        if amount and not (name in OWN_RESOURCES or ":" in name or "_group_" in name)
    }


def _read(details: Any) -> JobState:
    driver = details.driver_info
    return JobState(
        details.submission_id,
        details.status.value,
        details.entrypoint,
        details.message or "",
        details.start_time / 1000 if details.start_time else None,
        details.end_time / 1000 if details.end_time else None,
        details.driver_exit_code,
        details.metadata or {},
        details.job_id or (driver.id if driver else "") or "",
        details.driver_node_id or "",
    )


def _say_taken(job: str, status: str) -> str:
    return (
        f"there is a job {job} already ({status}): give another --submission-id, or none to have "
        "one made up"
    )


@contextmanager
def _explained(address: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise HeliostatError(
            f"no Ray dashboard answers at {address or 'any address'}: start a cluster with "
            '`heliostat up` and eval "$(heliostat env)", or set RAY_API_SERVER_ADDRESS'
        ) from error
    except AuthenticationError as error:
        raise HeliostatError(
            f"the Ray cluster at {address} wants its token: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file that holds it"
        ) from error
