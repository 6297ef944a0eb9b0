"""The workers of a run on rented machines: what each computes with, and what lies between them."""

import math
from dataclasses import dataclass

from heliostat.errors import HeliostatError
from heliostat.hardware import ACCELERATORS, GB, MACHINES, Accelerator, Machine

# A core is two vCPUs and adds 32 products a cycle (AVX-512, two instructions at once), at 2.5 GHz;
# 64 vCPUs share eight channels of DDR5-4800.
VCPU_FLOPS = 2.5e9 * 64 / 2
VCPU_BANDWIDTH = 307 * GB / 64
LOOPBACK = 2 * GB


@dataclass(frozen=True)
class Device:
    """What one worker computes with: an accelerator, or its share of a machine's CPUs."""

    name: str
    flops: float
    bandwidth: float
    link: float
    memory_bytes: int
    watts: float | None
    is_cpu: bool


@dataclass(frozen=True)
class Fleet:
    """`workers` on machines of one kind, `per_machine` on each as far as they go."""

    machine: Machine
    device: Device
    workers: int
    per_machine: int

    @property
    def machines(self) -> int:
        return math.ceil(self.workers / self.per_machine)

    @property
    def ring_rate(self) -> float:
        """Bytes/s of the slowest link of a ring through all workers."""
        return self.machine.network if self.machines > 1 else self.device.link


def list_machines() -> list[Machine]:
    """Those that this platform runs on, the cheapest first. TPUs it only knows: they want another
    PyTorch."""
    able = (machine for machine in MACHINES if "TPU" not in (machine.accelerator or ""))
    return sorted(able, key=lambda machine: machine.usd_per_hour)


def compose_fleet(machine: Machine, workers: int, precision: str, cpus: int, gpus: int) -> Fleet:
    """`workers` on as many of `machine` as they need; each wants so many CPUs and accelerators.

    Raises:
        HeliostatError: the machine does not compute in `precision`, or has less than one wants.
    """
    if bool(machine.accelerators) != bool(gpus):
        has = (
            f"{machine.accelerators} x {machine.accelerator}" if machine.accelerators else "no GPU"
        )
        raise HeliostatError(
            f"a worker or replica wants {gpus} GPUs, {machine.name} has {has}: set "
            "train.gpus_per_worker, of a replica deploy.gpus_per_replica with deploy.engine=vllm"
        )
    per_machine = machine.vcpus // cpus
    if gpus:
        per_machine = min(per_machine, machine.accelerators // gpus)
    if not per_machine:
        raise HeliostatError(
            f"a worker or replica wants {cpus} CPUs and {gpus} GPUs, {machine.name} has "
            f"{machine.vcpus} and {machine.accelerators}: ask for less or take a larger machine"
        )
    if not gpus:
        together = min(workers, per_machine)
        return Fleet(machine, _share_cpus(machine, cpus, together), workers, per_machine)
    chip = next((a for a in ACCELERATORS if a.name == machine.accelerator), None)
    if chip is None:
        raise HeliostatError(
            f"{machine.accelerator} is not in the table of accelerators: plan with --on a machine "
            "that has one of " + ", ".join(one.name for one in ACCELERATORS)
        )
    return Fleet(machine, _take(chip, precision), workers, per_machine)


def _take(chip: Accelerator, precision: str) -> Device:
    if precision not in chip.flops:
        raise HeliostatError(
            f"{chip.name} does not compute in {precision}, only in {', '.join(chip.flops)}: "
            "change train.precision or take another machine"
        )
    return Device(
        chip.name,
        chip.flops[precision],
        chip.bandwidth,
        chip.link,
        chip.memory_bytes,
        chip.watts,
        False,
    )


def _share_cpus(machine: Machine, cpus: int, together: int) -> Device:
    """CPUs are a worker's own; memory is shared by those that are `together` on the machine."""
    return Device(
        f"{cpus} vCPU",
        cpus * VCPU_FLOPS,
        cpus * VCPU_BANDWIDTH,
        LOOPBACK,
        machine.memory_bytes // together,
        None,
        True,
    )
