"""A cluster, written down once: its head, its pools of workers and what Ray is told of each."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, StrictBool, field_validator, model_validator

from heliostat.errors import HeliostatError
from heliostat.hardware import Machine, find_machine
from heliostat.spec.section import Natural, Positive, PositiveFloat, Section

Purpose = Literal["data", "training", "serving"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
# What each pool declares of the resource that is named after its purpose, and what one process asks
# of it: enough for any number of processes, none of which lands in another pool.
DECLARED = 1000
ASKED = 0.001
# The node label that names the purpose, for people and for label selectors.
LABEL = "heliostat/pool"
# And the one that names the machine as the table of hardware does, from which a run has its price.
MACHINE_LABEL = "heliostat/machine"
# Ray's own label for whether a node is spot capacity.
MARKET_LABEL = "ray.io/market-type"
# Set for every process of a cluster with pools: their purposes and what each can grow to, as
# `training=4x16:1` for 4 machines of 16 CPUs and a GPU. A cluster without pools has no such thing.
POOLS = "HELIOSTAT_POOLS"


def check_machine(name: str) -> str:
    """`name` for pydantic, which expects a ValueError where the table has no such machine."""
    try:
        return find_machine(name).name
    except HeliostatError as error:
        raise ValueError(str(error)) from error


class PoolSpec(Section):
    """Machines of one kind for one purpose.

    With `spot` they are rented as spot capacity, and on demand while there is none.
    """

    machine: str
    min_workers: Natural = 0
    max_workers: Positive = 4
    spot: StrictBool = False
    disk_gib: Positive = 150

    @field_validator("machine")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return check_machine(name)

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "PoolSpec":
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} exceeds max_workers")
        return self


class ClusterSpec(Section):
    """A head, which runs no training, and a pool for each purpose.

    `bucket` is the one that `root` in the specs of runs names. Google's project and the letter of a
    zone are for Google alone; the container image, the command of a job and the version that a
    service has (NAME:NUMBER) for Kubernetes.
    """

    name: str = Field(default="heliostat", pattern=r"^[a-z][a-z0-9-]{0,38}[a-z0-9]$")
    region: str = Field(default="us-west-2", pattern=r"^[a-z0-9-]{1,40}$")
    bucket: str = Field(default="heliostat-models", pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    head: str = "m7i.2xlarge"
    head_disk_gib: Positive = 150
    data: PoolSpec = PoolSpec(machine="m7i.2xlarge", max_workers=8)
    training: PoolSpec = PoolSpec(machine="g6.xlarge", spot=True)
    serving: PoolSpec = PoolSpec(machine="m7i.2xlarge")
    idle_timeout_minutes: PositiveFloat = 5
    project: str | None = Field(default=None, pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$")
    zone: str = Field(default="a", pattern=r"^[a-z]$")
    image: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._:/@-]{1,255}$")
    job: str = "python jobs/train.py jobs/specs/digits_mlp.yaml"
    serves: str = Field(default="digits-mlp:1", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}:[1-9][0-9]*$")

    @field_validator("head")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return check_machine(name)

    @property
    def machines(self) -> list[Machine]:
        """The head's, and those of the pools in the order of PURPOSES."""
        pools: list[PoolSpec] = [getattr(self, purpose) for purpose in PURPOSES]
        return [find_machine(name) for name in (self.head, *(pool.machine for pool in pools))]


@dataclass(frozen=True)
class NodeType:
    """A kind of node as Ray's autoscaler knows it.

    `resources` are what a node declares before it exists. Of two that could take the same demand
    the one of higher `priority` is launched, unless it came and did not join shortly before.
    """

    name: str
    purpose: Purpose
    machine: Machine
    min_workers: int
    max_workers: int
    spot: bool
    priority: int
    disk_gib: int

    @property
    def machine_resources(self) -> dict[str, int]:
        gpus = {"GPU": self.machine.accelerators} if self.machine.accelerators else {}
        return {"CPU": self.machine.vcpus, **gpus}

    @property
    def resources(self) -> dict[str, int]:
        return {**self.machine_resources, self.purpose: DECLARED}

    @property
    def labels(self) -> dict[str, str]:
        return {LABEL: self.purpose, MACHINE_LABEL: self.machine.name}


def list_node_types(cluster: ClusterSpec) -> list[NodeType]:
    """A node type for each pool, in the order of PURPOSES."""
    return [_describe(purpose, cluster) for purpose in PURPOSES]


def list_with_stand_ins(cluster: ClusterSpec) -> Iterator[NodeType]:
    """As `list_node_types`, and for each on spot another on demand, of lower priority.

    For an autoscaler that asks for machines and waits for them, as on Kubernetes. Where a launch
    fails at once, Ray takes the same type again and never the other.
    """
    for node in list_node_types(cluster):
        yield node
        if node.spot:
            name = f"{node.name}-on-demand"
            yield NodeType(
                name, node.purpose, node.machine, 0, node.max_workers, False, 0, node.disk_gib
            )


def _describe(purpose: Purpose, cluster: ClusterSpec) -> NodeType:
    pool: PoolSpec = getattr(cluster, purpose)
    machine = find_machine(pool.machine)
    bounds = pool.min_workers, pool.max_workers
    return NodeType(purpose, purpose, machine, *bounds, pool.spot, 1, pool.disk_gib)


@dataclass(frozen=True)
class Most:
    """What a pool can grow to: so many machines, each with so many CPUs and GPUs."""

    machines: int
    cpus: int
    gpus: int


def tell(cluster: ClusterSpec) -> str:
    """The value of POOLS for a cluster."""
    return " ".join(
        f"{node.purpose}={node.max_workers}x{node.machine.vcpus}:{node.machine.accelerators}"
        for node in list_node_types(cluster)
    )


def find_pool(purpose: Purpose, environment: Mapping[str, str] = os.environ) -> Most | None:
    """What the pool of `purpose` can grow to; None in a cluster without it.

    Raises:
        HeliostatError: POOLS was set to something else.
    """
    told = environment.get(POOLS, "")
    try:
        pools = dict(word.split("=") for word in told.split())
        most = pools.get(purpose)
        return Most(*map(int, most.replace("x", ":").split(":"))) if most is not None else None
    except (ValueError, TypeError) as error:
        raise HeliostatError(
            f"{POOLS} is {told[:80]!r}: write a word like training=4x16:1, its machines and the "
            "CPUs and GPUs of each, for every pool, or unset it"
        ) from error


def ask(purpose: Purpose, environment: Mapping[str, str] = os.environ) -> dict[str, float]:
    """The resources that keep a process in the pool of `purpose`; none where there is no pool."""
    return {purpose: ASKED} if find_pool(purpose, environment) else {}


def select(purpose: Purpose, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """As `ask`, for what takes a label selector instead: all tasks of a Ray Data pipeline."""
    return {LABEL: purpose} if find_pool(purpose, environment) else {}
