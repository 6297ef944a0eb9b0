"""What a whole run takes: hours, money and energy, and what it reads and writes."""

from dataclasses import dataclass

from heliostat.plan.fleet import Fleet
from heliostat.plan.step import Step

# Power usage effectiveness: of AWS, all regions, 2023; the average of those who answered the Uptime
# Institute in 2024 was 1.56.
PUE = 1.15
# What a machine draws besides its accelerators, as a share of theirs: a DGX H100 at most 10.2 kW,
# its eight chips 5.6. A server of CPUs alone draws by the vCPU.
HOST_SHARE = 0.8
VCPU_WATTS = 5.0
# Accelerators whose maker is silent count as this many watts.
UNKNOWN_WATTS = 300.0
START_SECONDS = 60.0
# Bytes/s between a machine and object storage at most, however wide its network.
STORE_RATE = 5e9


@dataclass(frozen=True)
class Volume:
    """How many steps a run makes, the rows that it stores and their bytes, and its checkpoints."""

    steps: int
    rows: int
    row_bytes: float
    checkpoint_bytes: int
    kept_checkpoints: int


@dataclass(frozen=True)
class Bill:
    """`usd_spot` is None where no spot price is known."""

    steps: int
    hours: float
    machine_hours: float
    usd: float
    usd_spot: float | None
    kwh: float
    stored_bytes: float
    read_bytes_per_second: float
    checkpoint_seconds: float


def add_up(
    volume: Volume,
    step: Step,
    global_batch: int,
    fleet: Fleet,
    pue: float,
    start_seconds: float = START_SECONDS,
) -> Bill:
    """The bill of a run on `fleet`, all of whose machines run from its start to its end.

    Checkpoints are written beside the steps and take `checkpoint_seconds` to be away. Energy is
    power times hours times PUE (Patterson et al. 2021, section 2.3).
    """
    hours = (start_seconds + volume.steps * step.seconds) / 3600
    machine_hours = hours * fleet.machines
    spot = fleet.machine.spot_usd_per_hour
    return Bill(
        steps=volume.steps,
        hours=hours,
        machine_hours=machine_hours,
        usd=machine_hours * fleet.machine.usd_per_hour,
        usd_spot=machine_hours * spot if spot else None,
        kwh=machine_hours * count_watts(fleet) / 1000 * pue,
        stored_bytes=volume.rows * volume.row_bytes
        + (volume.kept_checkpoints + 1) * volume.checkpoint_bytes,
        read_bytes_per_second=global_batch * volume.row_bytes / step.seconds,
        checkpoint_seconds=volume.checkpoint_bytes
        / (fleet.machines * min(fleet.machine.network, STORE_RATE)),
    )


def count_watts(fleet: Fleet) -> float:
    """Watts of a machine at full load."""
    if fleet.device.is_cpu:
        return fleet.machine.vcpus * VCPU_WATTS
    chips = fleet.machine.accelerators * (fleet.device.watts or UNKNOWN_WATTS)
    return chips * (1 + HOST_SHARE)
