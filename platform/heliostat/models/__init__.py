"""The model families: one row each, built from a typed section for a signature of the data."""

from collections.abc import Callable
from typing import Any

from torch import nn

from heliostat.errors import HeliostatError
from heliostat.models.cnn import build_cnn
from heliostat.models.custom import build_custom, with_loss
from heliostat.models.encoder import build_encoder
from heliostat.models.gpt import build_gpt
from heliostat.models.mlp import build_mlp
from heliostat.models.recsys import build_recsys
from heliostat.models.rnn import build_rnn
from heliostat.models.tasks import Task, choose_task
from heliostat.signature import Blocks, Input, Interaction, Picture, Series, Signature, Text, Vector
from heliostat.spec import CustomSpec, ModelSpec

__all__ = ["MODELS", "Task", "build", "count_parameters", "task_of"]

# From the family's section, the signature and the width of the head to a network.
MODELS: dict[str, Callable[[Any, Signature, int], nn.Module]] = {
    "mlp": build_mlp,
    "cnn": build_cnn,
    "encoder": build_encoder,
    "gpt": build_gpt,
    "rnn": build_rnn,
    "recsys": build_recsys,
    "custom": build_custom,
}

# The families that take an input, the usual one first; a user's own network takes any.
SUITED: dict[type[Input], tuple[str, ...]] = {
    Vector: ("mlp",),
    Picture: ("cnn", "mlp"),
    Series: ("rnn",),
    Text: ("encoder", "rnn"),
    Blocks: ("gpt",),
    Interaction: ("recsys",),
}

# What makes of the same raw data an input that the family takes.
PREPARED = {
    (Text, "gpt"): "data.task=language",
    (Blocks, "encoder"): "data.task=classification",
    (Blocks, "rnn"): "data.task=classification",
    (Vector, "recsys"): "the users and items in data.columns as id",
    (Interaction, "mlp"): "no column in data.columns as id",
}


def build(model: ModelSpec, signature: Signature) -> nn.Module:
    """The network that `model` describes; it takes the tensors of `signature.input`.

    Raises:
        HeliostatError: the family cannot take such an input or predict such an output.
    """
    suited = SUITED[type(signature.input)]
    if model.kind not in (*suited, "custom"):
        prepared = PREPARED.get((type(signature.input), model.kind))
        raise HeliostatError(
            f"model.kind={model.kind} cannot take {signature.input.describe()}: "
            f"use model.kind={' or '.join(suited)}"
            + f", or prepare the data with {prepared}"
            * (prepared is not None)
        )
    return MODELS[model.kind](model, signature, task_of(model, signature).width)


def task_of(model: ModelSpec, signature: Signature) -> Task:
    """What such a model is trained for on such data.

    Raises:
        HeliostatError: the loss that the model section names does not fit the data, or is not
            found.
    """
    if isinstance(model, CustomSpec):
        return with_loss(model, choose_task(signature))
    try:
        return choose_task(signature, getattr(model, "loss", None) or "auto")
    except ValueError as error:
        raise HeliostatError(str(error)) from error


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
