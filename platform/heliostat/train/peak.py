"""What a device could do at best, the divisor of MFU, and the most memory that was taken of it."""

import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.hardware import peak_flops

TRIES = 5
WIDTHS = {"cpu": 512, "cuda": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Peak:
    """Floating point operations a second of one device, and where the figure comes from."""

    device: str
    precision: str
    flops: float
    source: str

    def render(self) -> str:
        """`NVIDIA H100 80GB HBM3, bf16: 989 TFLOP/s (data sheet)`."""
        unit, scale = ("TFLOP/s", 1e12) if self.flops >= 1e12 else ("GFLOP/s", 1e9)
        return f"{self.device}, {self.precision}: {self.flops / scale:,.3g} {unit} ({self.source})"


def find_peak(device: torch.device, precision: str) -> Peak:
    """The peak of `device` for `precision` (fp32, bf16 or fp16).

    Of a device without a data sheet, as a CPU, it is the best of a few matrix products, which take
    some hundredths of a second.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if published := peak_flops(name, precision):
        return Peak(name, precision, published, "data sheet")
    return Peak(name, precision, _measure(device, DTYPES[precision]), "a matrix product, measured")


def measure_memory(device: torch.device) -> int:
    """Bytes at the peak of this process: of the GPU, with what CUDA takes itself, or resident."""
    if device.type != "cuda":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    free, total = torch.cuda.mem_get_info(device)
    context = max(0, total - free - torch.cuda.memory_reserved(device))
    return torch.cuda.max_memory_reserved(device) + context


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    width = WIDTHS[device.type]
    matrix = torch.randn(width, width, device=device, dtype=dtype)
    seconds = min(_time_product(matrix) for _ in range(TRIES))
    return 2 * width**3 / seconds


def _time_product(matrix: Tensor) -> float:
    began = time.perf_counter()
    # Reading one number waits for a device that works on its own.
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - began
