"""What accelerators can do at most, by their makers' data sheets, and what clouds rent them for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from heliostat.errors import HeliostatError

GB, TERA, MIB, GIB = 10**9, 10**12, 2**20, 2**30


@dataclass(frozen=True)
class Accelerator:
    """One chip. `pattern` is found in what PyTorch calls the device.

    FLOP/s are dense, by precision; that of fp32 without TF32, which PyTorch does not use for matrix
    products unless it is told to. `memory_bytes` is what a program finds, not what is advertised,
    and `bandwidth` that of it; `link` leads to the chips of the same machine; both are bytes/s in
    one direction. `watts` is the most that it takes, None where the maker does not say.
    """

    name: str
    pattern: str
    flops: Mapping[str, float]
    memory_bytes: int
    bandwidth: float
    link: float
    watts: float | None
    source: str


@dataclass(frozen=True)
class Machine:
    """What a cloud rents: a number of accelerators of one kind, or none.

    `network` is in bytes/s in one direction; `usd_per_hour` on demand, `spot_usd_per_hour` what
    spot capacity costs as a rule, None where that is not known.
    """

    name: str
    provider: str
    accelerator: str | None
    accelerators: int
    vcpus: int
    memory_bytes: int
    network: float
    usd_per_hour: float
    spot_usd_per_hour: float | None
    priced: str


def _dense(fp32: float, half: float, fp8: float | None = None) -> dict[str, float]:
    """From TFLOP/s; fp16 and bf16 are equally fast on tensor cores."""
    known = {"fp32": fp32, "bf16": half, "fp16": half, "fp8": fp8}
    return {name: value * TERA for name, value in known.items() if value}


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_TPU = "https://docs.cloud.google.com/tpu/docs"
NVLINK_3, NVLINK_4, NVLINK_5 = 300 * GB, 450 * GB, 900 * GB
PCIE_3, PCIE_4, PCIE_5 = 15.8 * GB, 31 * GB, 63 * GB

# A pattern that matches more names stands behind those that match fewer. Memory of NVIDIA's chips
# is what nvidia-smi shows. The T4 computes in bf16 on no tensor core, so that is not listed.
ACCELERATORS = (
    Accelerator("B200", r"\bB200\b", _dense(80, 2250, 4500),
                183_359 * MIB, 8000 * GB, NVLINK_5, 1000, f"{_NVIDIA}/hgx"),
    Accelerator("H200", r"\bH200\b", _dense(67, 989, 1979),
                143_771 * MIB, 4800 * GB, NVLINK_4, 700, f"{_NVIDIA}/h200"),
    Accelerator("H100 PCIe", r"\bH100 PCIe\b", _dense(51, 756, 1513),
                81_559 * MIB, 2000 * GB, PCIE_5, 350, f"{_NVIDIA}/h100"),
    Accelerator("H100 NVL", r"\bH100 NVL\b", _dense(60, 835, 1671),
                95_830 * MIB, 3900 * GB, 300 * GB, 400, f"{_NVIDIA}/h100"),
    Accelerator("H100", r"\bH100\b", _dense(67, 989, 1979),
                81_559 * MIB, 3350 * GB, NVLINK_4, 700, f"{_NVIDIA}/h100"),
    Accelerator("A100 40GB", r"\bA100.*40GB", _dense(19.5, 312),
                40_960 * MIB, 1555 * GB, NVLINK_3, 400, f"{_NVIDIA}/a100"),
    Accelerator("A100 80GB", r"\bA100\b", _dense(19.5, 312),
                81_920 * MIB, 2039 * GB, NVLINK_3, 400, f"{_NVIDIA}/a100"),
    Accelerator("L40S", r"\bL40S\b", _dense(91.6, 362, 733),
                46_068 * MIB, 864 * GB, PCIE_4, 350, f"{_NVIDIA}/l40s"),
    Accelerator("L4", r"\bL4\b", _dense(30.3, 121, 242.5),
                23_034 * MIB, 300 * GB, PCIE_4, 72, f"{_NVIDIA}/l4"),
    Accelerator("A10G", r"\bA10G\b", _dense(31.5, 70),
                23_028 * MIB, 600 * GB, PCIE_4, 300, f"{_NVIDIA}/products/a10-gpu"),
    Accelerator("T4", r"\bT4\b", {"fp32": 8.1 * TERA, "fp16": 65 * TERA},
                15_360 * MIB, 320 * GB, PCIE_3, 70, f"{_NVIDIA}/tesla-t4"),
    Accelerator("TPU v5e", r"\bTPU v5 ?e\b", {"bf16": 197 * TERA},
                16 * GB, 819 * GB, 50 * GB, None, f"{_TPU}/v5e"),
    Accelerator("TPU v5p", r"\bTPU v5 ?p\b", {"bf16": 459 * TERA},
                95 * GB, 2765 * GB, 100 * GB, None, f"{_TPU}/v5p"),
)  # fmt: skip

# On demand: the price lists of AWS in us-east-1 and of Google in us-central1, Linux, as catalogues
# of that day or year had them. Spot is the order of what the region asked for, which changes.
MACHINES = (
    Machine("m7i.2xlarge", "aws", None, 0, 8, 32 * GIB, 1.56 * GB, 0.4032, 0.20, "2026"),
    Machine("m7i.4xlarge", "aws", None, 0, 16, 64 * GIB, 1.56 * GB, 0.8064, 0.40, "2026"),
    Machine("m7i.8xlarge", "aws", None, 0, 32, 128 * GIB, 1.56 * GB, 1.6128, 0.80, "2026"),
    Machine("g4dn.xlarge", "aws", "T4", 1, 4, 16 * GIB, 3.1 * GB, 0.526, 0.21, "2026"),
    Machine("g6.xlarge", "aws", "L4", 1, 4, 16 * GIB, 1.25 * GB, 0.8048, 0.42, "2026"),
    Machine("g6.48xlarge", "aws", "L4", 8, 192, 768 * GIB, 12.5 * GB, 13.3504, None, "2026"),
    Machine("g5.xlarge", "aws", "A10G", 1, 4, 16 * GIB, 1.25 * GB, 1.006, 0.48, "2026"),
    Machine("g5.12xlarge", "aws", "A10G", 4, 48, 192 * GIB, 5 * GB, 5.672, 2.2, "2026"),
    Machine("p4d.24xlarge", "aws", "A100 40GB", 8, 96, 1152 * GIB, 50 * GB, 21.9576, 10,
            "2026-11-09"),
    Machine("p4de.24xlarge", "aws", "A100 80GB", 8, 96, 1152 * GIB, 50 * GB, 27.447, 10.5,
            "2026-11-09"),
    Machine("p5.4xlarge", "aws", "H100", 1, 16, 256 * GIB, 12.5 * GB, 6.88, None, "2026"),
    Machine("p5.48xlarge", "aws", "H100", 8, 192, 2048 * GIB, 400 * GB, 55.04, 14.5, "2026-11-09"),
    Machine("p5en.48xlarge", "aws", "H200", 8, 192, 2048 * GIB, 400 * GB, 63.296, 27.2,
            "2026-08-06"),
    Machine("p6-b200.48xlarge", "aws", "B200", 8, 192, 2048 * GIB, 400 * GB, 113.933, 19.1, "2026"),
    Machine("n2-standard-8", "gcp", None, 0, 8, 32 * GIB, 2 * GB, 0.3885, None, "2025"),
    Machine("n2-standard-16", "gcp", None, 0, 16, 64 * GIB, 4 * GB, 0.7769, None, "2025"),
    Machine("g2-standard-4", "gcp", "L4", 1, 4, 16 * GIB, 1.25 * GB, 0.7068, None, "2025"),
    Machine("a3-ultragpu-8g", "gcp", "H200", 8, 224, 2952 * GIB, 400 * GB, 83.49, 50.09,
            "2026-10-13"),
    Machine("ct5lp-hightpu-4t", "gcp", "TPU v5e", 4, 112, 192 * GIB, 12.5 * GB, 4.8, 1.39, "2026"),
    Machine("ct5p-hightpu-4t", "gcp", "TPU v5p", 4, 208, 448 * GIB, 25 * GB, 16.80, 6.57, "2026"),
)  # fmt: skip


def find_machine(name: str) -> Machine:
    """Raises HeliostatError: there is no such machine in the table."""
    for machine in MACHINES:
        if machine.name == name:
            return machine
    known = ", ".join(machine.name for machine in MACHINES)
    raise HeliostatError(f"there is no machine {name!r:.80} in the table: use one of {known}")


def find_accelerator(device_name: str) -> Accelerator | None:
    """What PyTorch calls a device; an L40 is no L4: the name counts as a word."""
    return next((a for a in ACCELERATORS if re.search(a.pattern, device_name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s at most of a device as PyTorch names it in fp32, bf16 or fp16; None if not known."""
    found = find_accelerator(device_name)
    return found.flops.get(precision) if found else None
