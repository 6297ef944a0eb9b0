"""A cluster, written down once: its head, its pools of workers and what Ray is told of each."""

from collections.abc import Iterator
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
    """A head, which runs no training, and a pool for each purpose."""

    name: str = Field(default="heliostat", pattern=r"^[a-z][a-z0-9-]{0,38}[a-z0-9]$")
    head: str = "m7i.2xlarge"
    head_disk_gib: Positive = 150
    data: PoolSpec = PoolSpec(machine="m7i.2xlarge", max_workers=8)
    training: PoolSpec = PoolSpec(machine="g6.xlarge", spot=True)
    serving: PoolSpec = PoolSpec(machine="m7i.2xlarge")
    idle_timeout_minutes: PositiveFloat = 5

    @field_validator("head")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return check_machine(name)


@dataclass(frozen=True)
class NodeType:
    """A kind of node as Ray's autoscaler knows it.

    `resources` are what a node declares before it exists. Of two that could take the same demand
    the one of higher `priority` is launched, unless it failed to come shortly before.
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
    def resources(self) -> dict[str, int]:
        gpus = {"GPU": self.machine.accelerators} if self.machine.accelerators else {}
        return {"CPU": self.machine.vcpus, **gpus, self.purpose: DECLARED}

    @property
    def labels(self) -> dict[str, str]:
        market = "spot" if self.spot else "on-demand"
        return {
            LABEL: self.purpose,
            MACHINE_LABEL: self.machine.name,
            MARKET_LABEL: market,
        }


def list_node_types(cluster: ClusterSpec) -> list[NodeType]:
    """A node type for each pool, two for one on spot: of those only the first keeps a minimum."""
    return [node_type for purpose in PURPOSES for node_type in _split(purpose, cluster)]


def _split(purpose: Purpose, cluster: ClusterSpec) -> Iterator[NodeType]:
    pool: PoolSpec = getattr(cluster, purpose)
    machine = find_machine(pool.machine)
    yield NodeType(
        purpose, purpose, machine, pool.min_workers, pool.max_workers, pool.spot, 1, pool.disk_gib
    )
    if pool.spot:
        yield NodeType(
            f"{purpose}-on-demand", purpose, machine, 0, pool.max_workers, False, 0, pool.disk_gib
        )
