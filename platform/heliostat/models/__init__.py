"""The model families: one row each, built from a typed section for an input shape and classes."""

from collections.abc import Callable
from typing import Any

from torch import nn

from heliostat.models.cnn import build_cnn
from heliostat.models.mlp import build_mlp
from heliostat.spec import ModelSpec

MODELS: dict[str, Callable[[Any, tuple[int, ...], int], nn.Module]] = {
    "mlp": build_mlp,
    "cnn": build_cnn,
}


def build(model: ModelSpec, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network that `model` describes: float32 (N, *input_shape) in, logits (N, classes) out.

    Raises:
        HeliostatError: the family cannot take an input of this shape.
    """
    return MODELS[model.kind](model, input_shape, num_classes)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
