"""A model and data to predictions and scores, by task."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from heliostat import registry, spec
from heliostat.data import features as feature
from heliostat.data.features import Features
from heliostat.evaluate.scores import (
    ClassCounter,
    Counter,
    NumberCounter,
    Scores,
    probabilities,
)
from heliostat.models import Task, build, task_of
from heliostat.signature import Classes, Numbers, Output, Signature, output_from_json
from heliostat.spec import ModelSpec
from heliostat.storage import Store

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Predictor:
    """A network in inference mode, with what it takes and what it was trained for."""

    network: nn.Module
    task: Task
    features: Features
    output: Output


def load_predictor(store: Store, version: registry.Version) -> Predictor:
    """The network of a version, its weights verified by SHA-256.

    Raises:
        HeliostatError: the weights are missing or are not those that were registered.
    """
    model = spec.parse(version.spec, origin=version.ref).model
    features = feature.features_from_json(version.features)
    weights = registry.load_weights(store, version)
    return make_predictor(model, features, output_from_json(version.output), weights)


def make_predictor(
    model: ModelSpec, features: Features, output: Output, weights: bytes
) -> Predictor:
    """The network that `model` describes, with `weights` as safetensors bytes."""
    signature = Signature(feature.input_of(features), output)
    network = build(model, signature)
    network.load_state_dict(safetensors.torch.load(weights))
    return Predictor(network.eval(), task_of(model, signature), features, output)


def predict(predictor: Predictor, columns: Columns) -> npt.NDArray[np.float32]:
    """Probabilities (N, classes), or numbers (N, names) as they stand in the data.

    `columns` are those that the shards store.
    """
    outputs = _run(predictor, columns).float()
    match predictor.output:
        case Classes():
            return probabilities(outputs).numpy()
        case Numbers(_, mean, std):
            return (outputs.double() * torch.tensor(std) + torch.tensor(mean)).float().numpy()
        case _:
            raise TypeError("a language model has no answer per row")


def score(predictor: Predictor, batches: Iterable[Columns]) -> Scores:
    """Run the network over `batches` (columns as stored, with `label`) and count.

    Raises:
        ValueError: there is no row in `batches`.
    """
    counter = _counter(predictor)
    for columns in batches:
        outputs = _run(predictor, columns).float()
        targets = torch.from_numpy(feature.encode_targets(predictor.output, dict(columns)))
        counter.add(outputs, targets, predictor.task.loss(outputs, targets).item())
    return counter.finish()


def _counter(predictor: Predictor) -> Counter:
    match predictor.output:
        case Classes(labels):
            return ClassCounter(labels)
        case Numbers() as numbers:
            return NumberCounter(numbers)
        case _:
            raise NotImplementedError


@torch.inference_mode()
def _run(predictor: Predictor, columns: Columns) -> Tensor:
    arrays = feature.encode(predictor.features, dict(columns))
    outputs: Tensor = predictor.network(*map(torch.from_numpy, arrays))
    return outputs
