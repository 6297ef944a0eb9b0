"""The multilayer perceptron: any input, flattened, through fully connected layers."""

import math
from itertools import pairwise

from torch import nn

from heliostat.spec import MlpSpec


def build_mlp(spec: MlpSpec, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    widths = (math.prod(input_shape), *spec.hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(spec.dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
