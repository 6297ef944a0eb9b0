"""A model and data to predictions and scores, by task."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from heliostat import registry, spec
from heliostat.data.encoding import encode, encode_targets
from heliostat.data.features import (
    TEXT,
    TOKENS,
    BlockFeatures,
    Features,
    TextFeatures,
    features_from_json,
    input_of,
)
from heliostat.data.tokens import encode_texts, load_tokenizer
from heliostat.evaluate.scores import (
    ClassCounter,
    Counter,
    NumberCounter,
    Scores,
    TokenCounter,
    probabilities,
)
from heliostat.models import Task, build, task_of
from heliostat.models.encoder import Encoder
from heliostat.signature import Classes, Numbers, Output, Signature, output_from_json
from heliostat.spec import ModelSpec
from heliostat.storage import Store

MAX_OUTPUTS = 2**26  # numbers of one batch, 256 MiB

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Predictor:
    """A network in inference mode, with what it takes and what it was trained for."""

    network: nn.Module
    task: Task
    features: Features
    output: Output
    tokenizer: Any = None  # of a model of texts: it makes `tokens` of the column `text`


def load_predictor(store: Store, version: registry.Version) -> Predictor:
    """The network of a version, its weights verified by SHA-256.

    Raises:
        HeliostatError: the weights, or the tokenizer of a model of texts, are missing or are not
            those that were registered.
    """
    model = spec.parse(version.spec, origin=version.ref).model
    features = features_from_json(version.features)
    weights = registry.load_weights(store, version)
    predictor = make_predictor(model, features, output_from_json(version.output), weights)
    if isinstance(features, TextFeatures):
        return replace(predictor, tokenizer=load_tokenizer(store, features.tokenizer))
    return predictor


def make_predictor(
    model: ModelSpec, features: Features, output: Output, weights: bytes
) -> Predictor:
    """The network that `model` describes, with `weights` as safetensors bytes."""
    signature = Signature(input_of(features), output)
    network = build(model, signature)
    network.load_state_dict(safetensors.torch.load(weights))
    return Predictor(network.eval(), task_of(model, signature), features, output)


def predict(predictor: Predictor, columns: Columns) -> npt.NDArray[np.float32]:
    """Probabilities (N, classes), or numbers (N, names) as they stand in the data.

    `columns` are those that the shards store, or `text` instead of `tokens`.
    """
    if TEXT in columns and isinstance(predictor.features, TextFeatures):
        ids = encode_texts(predictor.tokenizer, columns[TEXT].tolist(), predictor.features.length)
        columns = {TOKENS: np.fromiter(ids, dtype=object, count=len(ids))}
    outputs = _run(predictor, columns).float()
    match predictor.output:
        case Classes():
            return probabilities(outputs).numpy()
        case Numbers(_, mean, std):
            return (outputs.double() * torch.tensor(std) + torch.tensor(mean)).float().numpy()
        case _:
            raise TypeError("a language model has no answer per row")


@torch.inference_mode()
def embed(predictor: Predictor, columns: Columns) -> npt.NDArray[np.float32]:
    """Vectors (N, width) of the `tokens` of texts, of a network that is an encoder."""
    assert isinstance(predictor.network, Encoder)
    ids_NT, lengths_N = encode(predictor.features, dict(columns))
    vectors_ND = predictor.network.embed(torch.from_numpy(ids_NT), torch.from_numpy(lengths_N))
    return vectors_ND.float().numpy()


def score(predictor: Predictor, batches: Iterable[Columns]) -> Scores:
    """Run the network over `batches` (columns as stored, with `label`) and count.

    Raises:
        ValueError: there is no row in `batches`.
    """
    counter = _counter(predictor)
    for columns in _pieces(predictor, batches):
        outputs = _run(predictor, columns).float()
        targets = torch.from_numpy(encode_targets(predictor.output, dict(columns)))
        counter.add(outputs, targets, predictor.task.loss(outputs, targets).item())
    return counter.finish()


def _pieces(predictor: Predictor, batches: Iterable[Columns]) -> Iterator[Columns]:
    """The batches, those of blocks in parts whose outputs, a vocabulary per token, fit memory."""
    features = predictor.features
    if not isinstance(features, BlockFeatures):
        yield from batches
        return
    rows = max(1, MAX_OUTPUTS // (features.length * features.vocab))
    for columns in batches:
        for start in range(0, len(columns[TOKENS]), rows):
            yield {name: column[start : start + rows] for name, column in columns.items()}


def _counter(predictor: Predictor) -> Counter:
    match predictor.output, predictor.features:
        case Classes(labels), _:
            return ClassCounter(labels)
        case Numbers() as numbers, _:
            return NumberCounter(numbers)
        case _, BlockFeatures(end=end, token_bytes=token_bytes):
            return TokenCounter(end, torch.tensor(token_bytes))
    raise TypeError("there is no score for such an output")


@torch.inference_mode()
def _run(predictor: Predictor, columns: Columns) -> Tensor:
    arrays = encode(predictor.features, dict(columns))
    outputs: Tensor = predictor.network(*map(torch.from_numpy, arrays))
    return outputs
