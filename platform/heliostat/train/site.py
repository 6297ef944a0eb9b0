"""The machines of the cluster that a run is started on, as a planner sees them."""

from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import ray

from heliostat.hardware import GB, MACHINES, Machine, find_accelerator
from heliostat.pools import MACHINE_LABEL
from heliostat.spec import TrainSpec

# What lies between machines that nobody knows more of.
NETWORK = 1.25 * GB
ACCELERATOR = "accelerator_type:"


def find_machine(train: TrainSpec) -> Machine:
    """The kind of machine that has room for most of the workers, not counting who uses it now.

    A node that does not say which machine of the table it is has no price.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    kinds = Counter[Machine]()
    for node in nodes:
        machine = _describe(node)
        kinds[machine] += _count_workers(machine, train)
    return max(kinds, key=lambda machine: kinds[machine])


def _count_workers(machine: Machine, train: TrainSpec) -> int:
    if train.gpus_per_worker:
        return machine.accelerators // train.gpus_per_worker
    return machine.vcpus // train.cpus_per_worker


def _describe(node: dict[str, Any]) -> Machine:
    name, has = node["Labels"].get(MACHINE_LABEL), node["Resources"]
    known = next((machine for machine in MACHINES if machine.name == name), None)
    count, kind = round(has.get("GPU", 0)), _find_kind(has)
    here = node["NodeID"] == ray.get_runtime_context().get_node_id()
    # What Ray was told to use may be a part of the machine, or of the logical CPUs.
    memory = has.get("memory", 0) + has.get("object_store_memory", 0)
    return known or Machine(
        kind if count else f"{_name_processor()} x {psutil.cpu_count()}",
        "",
        kind if count else None,
        count,
        round(has.get("CPU", 0)),
        psutil.virtual_memory().total if here else round(memory),
        NETWORK,
        0.0,
        None,
        "",
    )


def _find_kind(resources: dict[str, float]) -> str:
    """`H100`, as the table calls what Ray calls NVIDIA's H100."""
    named = (name for name in resources if name.startswith(ACCELERATOR))
    name = next(named, ACCELERATOR + "an unknown accelerator").removeprefix(ACCELERATOR)
    found = find_accelerator(name)
    return found.name if found else name


def _name_processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "CPU")
