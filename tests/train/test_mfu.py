"""Utilisation by the published formula, and the peaks that it is a share of."""

import pytest

from heliostat.hardware import peak_flops
from heliostat.train.mfu import count_token_flops, mfu


def test_the_published_figure_of_palm_comes_out() -> None:
    """540 B parameters on 6,144 TPU v4 at 238.3 K tokens/s: 46.2% (PaLM, appendix B)."""
    token_flops = count_token_flops(540_350_000_000, layers=118, width=48 * 256, length=2048)
    assert mfu(238_300 * token_flops, 1.0, 6144, 275e12) == pytest.approx(0.462, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "precision", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("cpu", "fp32", None),
    ],
)
def test_a_device_is_known_by_the_name_pytorch_gives_it(
    name: str, precision: str, flops: float | None
) -> None:
    assert peak_flops(name, precision) == flops
