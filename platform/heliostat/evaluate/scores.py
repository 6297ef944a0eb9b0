"""What is counted over a split, and how it is shown: by class, by number, by token."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heliostat.errors import printable
from heliostat.models.tasks import following
from heliostat.signature import Numbers

MAX_MATRIX = 20
MAX_LABEL = 40
TOKEN_SUMS = ("tokens", "bytes", "hits", "loss")


class Scores(Protocol):
    """How a model did on a split."""

    @property
    def metrics(self) -> dict[str, float]:
        """The few numbers that a version is compared by, `loss` among them."""

    def to_json(self) -> dict[str, Any]: ...

    def render(self) -> str:
        """A table for a terminal."""


class Counter(Protocol):
    def add(self, outputs: Tensor, targets: Tensor, loss: float) -> None:
        """Count a batch; `loss` is summed over it."""

    def finish(self) -> Scores:
        """Raises ValueError if nothing was counted."""


def probabilities(logits: Tensor) -> Tensor:
    """(N, classes) from the logits of a classifier; one logit is that of the second of two."""
    if logits.shape[1] == 1:
        second = torch.sigmoid(logits)
        return torch.cat([1 - second, second], dim=1)
    return torch.softmax(logits, dim=1)


def choose(logits: Tensor) -> Tensor:
    """The likeliest class of each row, (N,); probabilities would round small differences away."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


# --- Classes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassScores:
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
    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy}

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

    def render(self) -> str:
        """By class and, up to 20 classes, the confusion matrix; long labels are cut short."""
        labels = [_shorten(label) for label in self.labels]
        width = max(5, *map(len, labels))
        support = self._matrix.sum(axis=1)
        digits = max(5, len(str(support.max())))
        lines = [f"{'class':<{width}}  precision  recall  {'rows':>{digits + 1}}"]
        for label, precision, recall, rows in zip(
            labels, self.precision, self.recall, support, strict=True
        ):
            shares = f"{_cell(precision):>9}  {_cell(recall):>6}"
            lines.append(f"{label:<{width}}  {shares}  {rows:>{digits + 1}}")
        if len(labels) <= MAX_MATRIX:
            lines += ["", "confusion (a row per true class, a column per prediction)"]
            for label, row in zip(labels, self.confusion, strict=True):
                cells = " ".join(f"{count:>{digits}}" for count in row)
                lines.append(f"{label:<{width}}  {cells}")
        totals = f"loss {self.loss:.4f}  accuracy {self.accuracy:.4f}  rows {self.rows:,}"
        return "\n".join([*lines, "", totals])


class ClassCounter:
    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels, self._loss = labels, 0.0
        self._confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)

    def add(self, outputs: Tensor, targets: Tensor, loss: float) -> None:
        predicted = choose(outputs)
        np.add.at(self._confusion, (targets.numpy(), predicted.numpy()), 1)
        self._loss += loss

    def finish(self) -> ClassScores:
        rows = _require(int(self._confusion.sum()))
        confusion = tuple(tuple(map(int, row)) for row in self._confusion)
        return ClassScores(self._labels, self._loss / rows, confusion)


# --- Numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NumberScores:
    """How a regression did: `mae` and `rmse` by name in the unit of the data, `r2` by name.

    `loss` is the mean squared error of the standardised numbers. r2 = 1 - residual / total sum of
    squares; None where all rows have one value.
    """

    names: tuple[str, ...]
    rows: int
    loss: float
    mae: tuple[float, ...]
    rmse: tuple[float, ...]
    r2: tuple[float | None, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """The errors as means over the names."""
        known = [value for value in self.r2 if value is not None]
        means = {"mae": self.mae, "rmse": self.rmse, "r2": known}
        return {"loss": self.loss} | {
            name: sum(values) / len(values) for name, values in means.items() if values
        }

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).__dataclass_fields__}

    def render(self) -> str:
        names = [_shorten(name) for name in self.names]
        width = max(6, *map(len, names))
        lines = [f"{'number':<{width}}  {'mae':>12}  {'rmse':>12}  {'r2':>7}"]
        for name, mae, rmse, r2 in zip(names, self.mae, self.rmse, self.r2, strict=True):
            lines.append(f"{name:<{width}}  {mae:>12.6g}  {rmse:>12.6g}  {_cell(r2):>7}")
        return "\n".join([*lines, "", f"loss {self.loss:.4f}  rows {self.rows:,}"])


class NumberCounter:
    def __init__(self, numbers: Numbers) -> None:
        width = len(numbers.names)
        self._numbers, self._loss = numbers, 0.0
        self._absolute, self._squared = np.zeros(width), np.zeros(width)
        self._spread = Spread(width)

    def add(self, outputs: Tensor, targets: Tensor, loss: float) -> None:
        actual = targets.double().numpy()
        error = outputs.double().numpy() - actual
        self._absolute += np.abs(error).sum(axis=0)
        self._squared += (error**2).sum(axis=0)
        self._spread.add(actual)
        self._loss += loss

    def finish(self) -> NumberScores:
        rows, std = _require(self._spread.rows), np.array(self._numbers.std)
        return NumberScores(
            self._numbers.names,
            rows,
            self._loss / rows / len(self._numbers.names),
            tuple((self._absolute / rows * std).tolist()),
            tuple((np.sqrt(self._squared / rows) * std).tolist()),
            tuple(
                float(1 - squared / total) if total > 0 else None
                for squared, total in zip(self._squared, self._spread.total, strict=True)
            ),
        )


class Spread:
    """`total` (columns,): the squared distances of all `rows` from their mean, added up.

    Batches are merged by the rule of Chan, Golub and LeVeque (1979). All is counted from the first
    row, so that a column of equal numbers has exactly 0, and not what rounding leaves of them.
    """

    def __init__(self, width: int) -> None:
        self.rows, self.total = 0, np.zeros(width)
        self._first, self._mean = np.zeros(width), np.zeros(width)

    def add(self, values: npt.NDArray[np.float64]) -> None:
        if not len(values):
            return
        if not self.rows:
            self._first = values[0]
        moved = values - self._first
        mean, rows = moved.mean(axis=0), self.rows + len(values)
        step = mean - self._mean
        self.total += ((moved - mean) ** 2).sum(axis=0) + step**2 * self.rows * len(values) / rows
        self._mean += step * len(values) / rows
        self.rows = rows


# --- Tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenScores:
    """How a language model did: `loss` in nats per token; `bytes` is the size of those tokens."""

    tokens: int
    bytes: int
    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as perplexity is not."""
        return self.loss * self.tokens / math.log(2) / max(self.bytes, 1)

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
        }

    def to_json(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "bytes": self.bytes, **self.metrics}

    def render(self) -> str:
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.2f}  bits per byte "
            f"{self.bits_per_byte:.4f}  accuracy {self.accuracy:.4f}  tokens {self.tokens:,}"
        )


@dataclass
class TokenCounter:
    """`token_bytes` (vocab,) is how many bytes of text each token stands for."""

    end: int
    token_bytes: Tensor
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TOKEN_SUMS, 0.0))

    def add(self, outputs: Tensor, targets: Tensor, loss: float) -> None:
        following_NT = following(targets, self.end)
        predicted = following_NT[following_NT >= 0]
        self._sums["tokens"] += len(predicted)
        self._sums["bytes"] += int(self.token_bytes[predicted].sum())
        self._sums["hits"] += int((outputs.argmax(dim=2) == following_NT).sum())
        self._sums["loss"] += loss

    def finish(self) -> TokenScores:
        tokens = _require(int(self._sums["tokens"]))
        loss, hits = self._sums["loss"] / tokens, self._sums["hits"] / tokens
        return TokenScores(tokens, int(self._sums["bytes"]), loss, hits)


def _require(count: int) -> int:
    if not count:
        raise ValueError("no rows to score")
    return count


def _shares(hits: npt.NDArray[Any], totals: npt.NDArray[Any]) -> tuple[float | None, ...]:
    return tuple(
        float(hit) / float(total) if total else None
        for hit, total in zip(hits, totals, strict=True)
    )


def _shorten(text: str) -> str:
    """What a user's data calls something, as a cell of a table; no control characters."""
    shown = printable(text).replace("\n", "\\n")
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 1]}…"


def _cell(share: float | None) -> str:
    return "-" if share is None else f"{share:.4f}"
