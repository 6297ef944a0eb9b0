"""What accelerators can compute at most: figures of their makers' data sheets."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """`name` is part of what PyTorch calls the device; FLOP/s are dense, without sparsity.

    `half_flops` is of bf16 and fp16 on tensor cores, `single_flops` of fp32 without TF32, which
    PyTorch does not use for matrix products unless it is told to.
    """

    name: str
    half_flops: float
    single_flops: float
    source: str


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
# A name that begins with another stands before it.
ACCELERATORS = (
    Accelerator("H200", 989e12, 67e12, f"{_NVIDIA}/h200"),
    Accelerator("H100 PCIe", 756e12, 51e12, f"{_NVIDIA}/h100"),
    Accelerator("H100 NVL", 835e12, 60e12, f"{_NVIDIA}/h100"),
    Accelerator("H100", 989e12, 67e12, f"{_NVIDIA}/h100"),
    Accelerator("A100", 312e12, 19.5e12, f"{_NVIDIA}/a100"),
    Accelerator("L40S", 362e12, 91.6e12, f"{_NVIDIA}/l40s"),
    Accelerator("L4", 121e12, 30.3e12, f"{_NVIDIA}/l4"),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s at most of a device as PyTorch names it in fp32, bf16 or fp16; None if not known.

    An L40 is no L4: the name counts as a word.
    """
    for known in ACCELERATORS:
        if re.search(rf"\b{known.name}\b", device_name):
            return known.single_flops if precision == "fp32" else known.half_flops
    return None
