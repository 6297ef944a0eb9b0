"""The multilayer perceptron: a vector or a picture, flattened, through fully connected layers."""

from itertools import pairwise

from torch import nn

from heliostat.errors import HeliostatError
from heliostat.models.dropout import Dropout
from heliostat.signature import Picture, Signature, Vector
from heliostat.spec import MlpSpec


def build_mlp(spec: MlpSpec, signature: Signature, width: int) -> nn.Module:
    """Layers of `spec.hidden` and one of `width` outputs.

    Raises:
        HeliostatError: the input is neither a vector nor a picture.
    """
    match signature.input:
        case Vector(inputs):
            flat = inputs
        case Picture(channels, image_height, image_width):
            flat = channels * image_height * image_width
        case other:
            raise HeliostatError(
                f"model.kind=mlp needs images or numbers, the data is {other.describe()}"
            )
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in pairwise((flat, *spec.hidden)):
        layers += [nn.Linear(width_in, width_out), nn.ReLU(), Dropout(spec.dropout)]
    return nn.Sequential(*layers, nn.Linear((flat, *spec.hidden)[-1], width))
