"""The multilayer perceptron: a vector or a picture, flattened, through fully connected layers."""

from itertools import pairwise

from torch import nn

from heliostat.models.dropout import Dropout
from heliostat.signature import Picture, Signature, Vector
from heliostat.spec import MlpSpec


def build_mlp(spec: MlpSpec, signature: Signature, width: int) -> nn.Module:
    """Layers of `spec.hidden` and one of `width` outputs."""
    of = signature.input
    assert isinstance(of, Vector | Picture)
    inputs = of.width if isinstance(of, Vector) else of.channels * of.height * of.width
    return nn.Sequential(nn.Flatten(), *stack_layers((inputs, *spec.hidden, width), spec.dropout))


def stack_layers(widths: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Fully connected layers between `widths`; after all but the last a ReLU and dropout."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
