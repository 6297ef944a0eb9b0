"""The convolutional network: stages that halve the image, then fully connected layers."""

from itertools import pairwise

from torch import Tensor, nn

from heliostat.errors import HeliostatError
from heliostat.models.dropout import Dropout
from heliostat.signature import Picture, Signature
from heliostat.spec import CnnSpec

NORM_GROUPS = 8


def build_cnn(spec: CnnSpec, signature: Signature, width: int) -> nn.Module:
    """One stage for each of `spec.channels`: a block, plain or residual, and a halving.

    Raises:
        HeliostatError: the image is too small for that many stages.
    """
    picture = signature.input
    assert isinstance(picture, Picture)
    height, image_width = picture.height, picture.width
    layers: list[nn.Module] = []
    for stage, (channels_in, channels_out) in enumerate(
        pairwise((picture.channels, *spec.channels))
    ):
        height, image_width = (_halve(size, spec) for size in (height, image_width))
        if min(height, image_width) < 1:
            raise HeliostatError(
                f"model.channels has {len(spec.channels)} stages, each halves the image, and "
                f"{picture.height}x{picture.width} becomes empty: use at most {stage} stages "
                "or a larger data.image_size"
            )
        layers += [_build_block(spec, channels_in, channels_out), nn.MaxPool2d(2)]
    widths = (spec.channels[-1] * height * image_width, *spec.hidden)
    layers += [nn.Flatten(), Dropout(spec.dropout)]
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], width))


def _halve(size: int, spec: CnnSpec) -> int:
    """The height or width after a stage; below 1 where nothing is left."""
    lost = spec.kernel - 1 if spec.padding == "valid" else 0
    return (size - lost) // 2


def _build_block(spec: CnnSpec, channels_in: int, channels_out: int) -> nn.Module:
    if spec.block == "residual":
        return Residual(channels_in, channels_out, spec.kernel)
    convolution = nn.Conv2d(channels_in, channels_out, spec.kernel, padding=spec.padding)
    return nn.Sequential(convolution, nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015), in pre-activation order.

    Group norm instead of batch norm: a sample's result never depends on its batch or its worker.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            _norm(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, kernel, padding="same", bias=False),
            _norm(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, kernel, padding="same"),
        )
        self.shortcut = (
            nn.Identity()
            if channels_in == channels_out
            else nn.Conv2d(channels_in, channels_out, 1, bias=False)
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        residual: Tensor = self.shortcut(x_NCHW) + self.convolutions(x_NCHW)
        return residual


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in range(min(NORM_GROUPS, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)
