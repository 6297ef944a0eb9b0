"""The divisor of MFU: the data sheet's figure for a known device, a measured one for others."""

import pytest
import torch

from heliostat.hardware import ACCELERATORS, Accelerator, find_accelerator, peak_flops
from heliostat.train.peak import DTYPES, Peak, find_peak


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 80GB HBM3", "fp16", 989),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
    ],
)
def test_a_known_device_has_the_figure_of_its_data_sheet(
    name: str, precision: str, tflops: float
) -> None:
    assert peak_flops(name, precision) == tflops * 1e12


@pytest.mark.parametrize(("flops", "told"), [(989e12, "989 TFLOP/s"), (33.4e9, "33.4 GFLOP/s")])
def test_a_peak_is_told_with_its_device_and_source(flops: float, told: str) -> None:
    assert Peak("CPU", "fp32", flops, "measured").render() == f"CPU, fp32: {told} (measured)"


@pytest.mark.parametrize("known", ACCELERATORS, ids=lambda known: known.name)
def test_no_row_hides_one_after_it(known: Accelerator) -> None:
    assert find_accelerator(known.name) is known


@pytest.mark.parametrize("precision", DTYPES)
def test_an_unknown_device_is_measured_and_says_so(precision: str) -> None:
    peak = find_peak(torch.device("cpu"), precision)
    assert peak.flops > 0
    assert peak.render().startswith(f"CPU, {precision}: ")
    assert peak.render().endswith("FLOP/s (a matrix product, measured)")
    for name in ("CPU", "NVIDIA L40", "NVIDIA GH200 480GB"):
        assert peak_flops(name, precision) is None
