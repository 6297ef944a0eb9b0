"""A model and data to scores: loss, accuracy, precision and recall by class, confusion matrix."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from heliostat import registry, spec
from heliostat.data import features as feature
from heliostat.models import build
from heliostat.storage import Store

Columns = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Scores:
    """How a classifier did; `confusion[actual][predicted]` counts rows, loss is in nats per row."""

    labels: tuple[str, ...]
    loss: float
    confusion: tuple[tuple[int, ...], ...]

    @cached_property
    def _matrix(self) -> npt.NDArray[np.int64]:
        return np.array(self.confusion, dtype=np.int64)

    @property
    def rows(self) -> int:
        return int(self._matrix.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self._matrix)) / max(self.rows, 1)

    @property
    def precision(self) -> tuple[float | None, ...]:
        """By class; None where the class was never predicted."""
        return _shares(np.diag(self._matrix), self._matrix.sum(axis=0))

    @property
    def recall(self) -> tuple[float | None, ...]:
        """By class; None where the class has no row."""
        return _shares(np.diag(self._matrix), self._matrix.sum(axis=1))

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "loss": self.loss,
            "accuracy": self.accuracy,
            "labels": list(self.labels),
            "precision": list(self.precision),
            "recall": list(self.recall),
            "confusion": [list(row) for row in self.confusion],
        }


def load_model(store: Store, version: registry.Version) -> nn.Module:
    """The network of a version in inference mode, its weights verified by SHA-256.

    Raises:
        HeliostatError: the weights are missing or are not those that were registered.
    """
    run = spec.parse(version.spec, origin=version.ref)
    shape = feature.input_shape(feature.features_from_json(version.features))
    model = build(run.model, shape, len(version.labels))
    model.load_state_dict(safetensors.torch.load(registry.load_weights(store, version)))
    return model.eval()


def predict_probabilities(
    model: nn.Module, features: feature.Features, columns: Columns
) -> npt.NDArray[np.float32]:
    """Probabilities (N, classes) for `columns` as the shards store them."""
    return torch.softmax(_logits(model, features, columns), dim=1).numpy()


def score(
    model: nn.Module,
    features: feature.Features,
    labels: tuple[str, ...],
    batches: Iterable[Columns],
) -> Scores:
    """Run `model` over `batches` (columns as stored, with `label`) and count.

    Raises:
        ValueError: there is no row in `batches`.
    """
    classes, loss_sum, rows = len(labels), 0.0, 0
    confusion = np.zeros((classes, classes), dtype=np.int64)
    for columns in batches:
        actual = np.asarray(columns["label"], dtype=np.int64)
        logits = _logits(model, features, columns)
        loss_sum += functional.cross_entropy(
            logits, torch.from_numpy(actual), reduction="sum"
        ).item()
        np.add.at(confusion, (actual, logits.argmax(dim=1).numpy()), 1)
        rows += len(actual)
    if rows == 0:
        raise ValueError("no rows to score")
    return Scores(labels, loss_sum / rows, tuple(tuple(map(int, row)) for row in confusion))


def render(scores: Scores) -> str:
    """A table by class and, up to 20 classes, the confusion matrix; long labels are cut short."""
    printable = (text if text.isprintable() else ascii(text)[1:-1] for text in scores.labels)
    labels = [text if len(text) <= 40 else f"{text[:39]}…" for text in printable]
    width = max(5, *map(len, labels))
    support = np.array(scores.confusion).sum(axis=1)
    digits = max(5, len(str(support.max())))
    lines = [f"{'class':<{width}}  precision  recall  {'rows':>{digits + 1}}"]
    for label, precision, recall, rows in zip(
        labels, scores.precision, scores.recall, support, strict=True
    ):
        shares = f"{_cell(precision):>9}  {_cell(recall):>6}"
        lines.append(f"{label:<{width}}  {shares}  {rows:>{digits + 1}}")
    if len(labels) <= 20:
        lines += ["", "confusion (a row per true class, a column per prediction)"]
        for label, row in zip(labels, scores.confusion, strict=True):
            lines.append(f"{label:<{width}}  " + " ".join(f"{count:>{digits}}" for count in row))
    lines += ["", f"loss {scores.loss:.4f}  accuracy {scores.accuracy:.4f}  rows {scores.rows:,}"]
    return "\n".join(lines)


@torch.inference_mode()
def _logits(model: nn.Module, features: feature.Features, columns: Columns) -> torch.Tensor:
    logits: torch.Tensor = model(torch.from_numpy(feature.encode(features, dict(columns))))
    return logits


def _shares(hits: npt.NDArray[Any], totals: npt.NDArray[Any]) -> tuple[float | None, ...]:
    return tuple(
        float(hit) / float(total) if total else None
        for hit, total in zip(hits, totals, strict=True)
    )


def _cell(share: float | None) -> str:
    return "-" if share is None else f"{share:.4f}"
