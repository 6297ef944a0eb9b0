"""What a model needs before any of it is rented: arithmetic over measured costs and data sheets."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from heliostat.errors import HeliostatError
from heliostat.hardware import GIB, Machine
from heliostat.plan.bill import PUE, START_SECONDS, Bill, Volume, add_up, count_watts
from heliostat.plan.calibration import UNCORRECTED, Correction, Record, Taken, correct
from heliostat.plan.figure import Figure
from heliostat.plan.fleet import Fleet, compose_fleet, list_machines
from heliostat.plan.memory import Footprint, Layout, estimate_memory, most_rows, total
from heliostat.plan.serving import Load, Replicas, Served, plan_replicas
from heliostat.plan.step import LLAMA, UTILISATION, Step, Work, estimate_step
from heliostat.spec import DeploySpec, TrainSpec

ON_CPU = Figure(
    "framework",
    0.5 * GIB,
    "B",
    "Python, PyTorch and Ray",
    "measured: 0.41 GiB once they are loaded",
)
ON_GPU = Figure(
    "framework", 0.7 * GIB, "B", "the device's context and kernels", "judgement: 0.3 to 0.9 GB seen"
)
BESIDE_OTHERS = Figure(
    "framework", 1.5 * GIB, "B", "the device's context and kernels, buffers of NCCL",
    "0.5 to 0.7 GB each communicator: NCCL issue 964",
)  # fmt: skip
# What stays free for what an allocator cannot use, or for the rest of the machine.
SPARE = {True: 0.5, False: 0.1}
MOST_WORKERS = 1024


@dataclass(frozen=True)
class Model:
    """A model as measured: FLOPs forward and backward; the footprint if it recomputes, or not."""

    name: str
    parameters: int
    flops_per_row: float
    tokens_per_row: int
    footprint: Callable[[bool], Footprint]


@dataclass(frozen=True)
class Room:
    """A worker's memory by its `parts`, of which it may use `limit_bytes`.

    `rows` are in flight, 0 where as many as are asked for do not fit; `most_rows` would.
    """

    layout: Layout
    rows: int
    most_rows: int
    limit_bytes: int
    parts: tuple[Figure, ...]

    @property
    def fits(self) -> bool:
        return self.rows > 0

    @property
    def bytes(self) -> int:
        return total(self.parts)


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes as given.

    `utilisation` of the peak FLOP/s, None: what large runs reached. `spare` is the share of memory
    that stays free, of machines without accelerators and of accelerators.
    """

    utilisation: float | None = None
    pue: float = PUE
    correction: Correction = UNCORRECTED
    spare: Mapping[bool, float] = field(default_factory=lambda: SPARE)


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Plan:
    """A run on machines of one kind."""

    model: Model
    train: TrainSpec
    volume: Volume
    fleet: Fleet
    room: Room
    utilisation: Figure
    step: Step
    bill: Bill
    assumed: Assumptions

    @property
    def taken(self) -> Taken:
        """What the run will take, as it is measured afterwards."""
        return Taken(
            self.room.bytes,
            self.step.seconds,
            self.volume.checkpoint_bytes,
            self.volume.row_bytes * self.train.global_batch,
            self.bill.hours,
        )


def make_plan(
    model: Model,
    train: TrainSpec,
    volume: Volume,
    machine: Machine,
    assumed: Assumptions = ASSUMED,
) -> Plan:
    """The plan of `train` on `machine`, with the most workers that it asks for.

    Raises:
        HeliostatError: the machine does not compute in this precision, or has too few CPUs.
    """
    fleet = _compose(machine, train)
    footprint = model.footprint(train.recompute)
    room = _find_room(footprint, train, fleet, assumed)
    chosen = _choose_utilisation(assumed.utilisation)
    work = Work(
        model.flops_per_row,
        train.global_batch,
        max(room.rows, 1),
        train.recompute,
        train.compile,
    )
    step = estimate_step(work, footprint, room.layout, fleet, chosen.value)
    step = step.scale(assumed.correction.step.value)
    start = assumed.correction.start_seconds
    seconds = START_SECONDS if start is None else start
    bill = add_up(volume, step, train.global_batch, fleet, assumed.pue, seconds)
    return Plan(model, train, volume, fleet, room, chosen, step, bill, assumed)


def correct_plan(plan: Plan, records: Sequence[Record]) -> Plan:
    """`plan`, which is uncorrected, as earlier runs on the same hardware correct it."""
    assumed = replace(plan.assumed, correction=correct(records, plan.taken))
    return make_plan(plan.model, plan.train, plan.volume, plan.fleet.machine, assumed)


@dataclass(frozen=True)
class Serving:
    """Replicas on machines of one kind, all the time."""

    fleet: Fleet
    replicas: Replicas
    limit_bytes: int
    usd_per_hour: float
    kwh_per_hour: float


def plan_serving(
    served: Served,
    load: Load,
    deploy: DeploySpec,
    machine: Machine,
    precision: str,
    utilisation: float | None = None,
    pue: float = PUE,
) -> Serving:
    """The fewest replicas on `machine` that take the load; those of our own engine are on CPUs.

    Raises:
        HeliostatError: the machine does not compute so, a replica does not fit it, or no number of
            replicas answers in time.
    """
    gpus = math.ceil(deploy.gpus_per_replica) if deploy.engine == "vllm" else 0
    fleet = compose_fleet(machine, 1, precision, math.ceil(deploy.cpus_per_replica), gpus)
    limit = int(fleet.device.memory_bytes * (1 - SPARE[fleet.device.is_cpu]))
    limit -= round(_find_overhead(fleet).value)
    share = _choose_utilisation(utilisation).value
    found = plan_replicas(served, load, fleet.device, limit, deploy.max_streams, share)
    fleet = replace(fleet, workers=found.count)
    kilowatts = fleet.machines * count_watts(fleet) / 1000
    return Serving(fleet, found, limit, fleet.machines * machine.usd_per_hour, kilowatts * pue)


def _compose(machine: Machine, train: TrainSpec) -> Fleet:
    return compose_fleet(
        machine,
        train.most_workers,
        train.precision,
        train.cpus_per_worker,
        train.gpus_per_worker,
    )


def _choose_utilisation(asked: float | None) -> Figure:
    if asked is not None:
        return Figure("utilisation", asked, "", "as asked for", "--utilisation")
    return Figure("utilisation", UTILISATION, "", "what large runs reached", LLAMA)


def _find_room(
    footprint: Footprint,
    train: TrainSpec,
    fleet: Fleet,
    assumed: Assumptions,
) -> Room:
    """The micro batch that is asked for, or the largest that fits."""
    limit = int(fleet.device.memory_bytes * (1 - assumed.spare[fleet.device.is_cpu]))
    usable = int(limit / assumed.correction.memory.value)
    share = -(-train.global_batch // fleet.workers)
    wanted = min(train.micro_batch, share) if isinstance(train.micro_batch, int) else share
    layout = Layout(
        train.strategy, train.precision, fleet.workers, wanted < share, _find_overhead(fleet)
    )
    most = most_rows(footprint, layout, usable, share)
    if train.micro_batch == "auto" and most < share:
        layout = replace(layout, accumulates=True)
        most = wanted = most_rows(footprint, layout, usable, share)
    parts = _correct_memory(estimate_memory(footprint, layout, max(wanted, 1)), assumed.correction)
    return Room(layout, wanted if wanted <= most else 0, most, limit, parts)


def _correct_memory(parts: tuple[Figure, ...], correction: Correction) -> tuple[Figure, ...]:
    factor = correction.memory
    if not factor.runs:
        return parts
    more = (factor.value - 1) * total(parts)
    why = f"x {factor.value:.2f}: what was taken of what was planned, {factor.say_runs()}"
    return (*parts, Figure("correction", more, "B", why, "calibration/ in the bucket"))


def find_remedy(plan: Plan) -> str | None:
    """The smallest change of the train section with which it fits on such machines, if any does."""
    for changes in _list_changes(plan.train):
        train = plan.train.model_copy(update=changes)
        fleet = _compose(plan.fleet.machine, train)
        footprint = plan.model.footprint(train.recompute)
        room = _find_room(footprint, train, fleet, plan.assumed)
        if room.fits:
            return " ".join(f"train.{key}={_write(value)}" for key, value in changes.items())
    return None


def find_machine_that_fits(plan: Plan) -> Machine | None:
    """The cheapest machine on which the train section fits as it is."""
    footprint, train = plan.model.footprint(plan.train.recompute), plan.train
    for machine in list_machines():
        with suppress(HeliostatError):  # it has no such precision, or too few CPUs
            fleet = _compose(machine, train)
            if _find_room(footprint, train, fleet, ASSUMED).fits:
                return machine
    return None


def _list_changes(train: TrainSpec) -> Iterator[dict[str, Any]]:
    """From what costs nothing to what costs most; more workers may need more rows to share."""
    small = {"micro_batch": "auto"}
    yield small
    yield small | {"recompute": True}
    workers = train.most_workers
    while workers <= MOST_WORKERS:
        more: dict[str, Any] = {"strategy": "fsdp", "workers": workers}
        if workers > train.global_batch:
            more["global_batch"] = workers
        yield small | more
        yield small | more | {"recompute": True}
        workers *= 2


def _write(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _find_overhead(fleet: Fleet) -> Figure:
    if fleet.device.is_cpu:
        return ON_CPU
    return BESIDE_OTHERS if fleet.workers > 1 else ON_GPU
