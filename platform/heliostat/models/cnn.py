"""The convolutional network: 3x3 convolutions, each followed by a halving, one hidden layer."""

from itertools import pairwise

from torch import nn

from heliostat.errors import HeliostatError
from heliostat.spec import CnnSpec


def build_cnn(spec: CnnSpec, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Input (N, C, H, W); every entry of `spec.channels` halves H and W.

    Raises:
        HeliostatError: the input is not an image, or too small for that many halvings.
    """
    if len(input_shape) != 3:
        raise HeliostatError(
            f"model.kind=cnn needs images, the data set has rows of {input_shape[0]} numbers: "
            "use model.kind=mlp"
        )
    channels, height, width = input_shape
    stages = len(spec.channels)
    if min(height, width) < 2**stages:
        raise HeliostatError(
            f"model.channels has {stages} stages, each halves the image, and {height}x{width} "
            f"becomes empty: use at most {min(height, width).bit_length() - 1} stages "
            "or a larger data.image_size"
        )
    layers: list[nn.Module] = []
    for channels_in, channels_out in pairwise((channels, *spec.channels)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    flat = spec.channels[-1] * (height >> stages) * (width >> stages)
    head = [nn.Flatten(), nn.Dropout(spec.dropout), nn.Linear(flat, spec.hidden), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(spec.hidden, num_classes))
