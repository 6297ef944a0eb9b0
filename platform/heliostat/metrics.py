"""The table of what a training run measures, and the way of its numbers to whoever shows them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heliostat.errors import HeliostatError

# The label that every metric has.
RUN = "run"


@dataclass(frozen=True)
class Metric:
    """A quantity by its name; `unit` is what Grafana calls it.

    One with a `label` has a number for each value of the label, as goodput has for each class.
    """

    name: str
    unit: str
    help: str
    label: str | None = None

    @property
    def exported(self) -> str:
        """Its name at Ray."""
        return f"heliostat_train_{self.name}"

    @property
    def scraped(self) -> str:
        """Its name at Prometheus."""
        return f"ray_{self.exported}"


LOSS = Metric("loss", "none", "Mean loss of the training batches")
SCORE = Metric("score", "none", "What the task counts of the training batches, a mean", "metric")
VALIDATION = Metric("validation", "none", "What a pass over the validation split gave", "metric")
LEARNING_RATE = Metric("learning_rate", "none", "Learning rate of the last step")
GRAD_NORM = Metric("grad_norm", "none", "Norm of the gradient before it was clipped, a mean")
STEP = Metric("step", "none", "Optimiser steps made since the run began")
SAMPLES = Metric("samples_per_second", "none", "Rows trained on in a second, by all workers")
TOKENS = Metric("tokens_per_second", "none", "Tokens trained on in a second, by all workers")
WAIT_SHARE = Metric("data_wait_share", "percentunit", "Share of the time spent waiting for rows")
STALL_SHARE = Metric(
    "checkpoint_stall_share", "percentunit", "Share of the time that checkpoints held up the loop"
)
MFU = Metric("mfu", "percentunit", "Floating point operations of the model, as a share of the peak")
GOODPUT = Metric("goodput", "s", "Seconds of the run, over all its attempts", "class")
GOODPUT_BOUND = Metric(
    "goodput_bound", "percentunit", "Goodput at the best interval between checkpoints"
)

TRAINING = {
    metric.name: metric
    for metric in (
        LOSS,
        SCORE,
        VALIDATION,
        LEARNING_RATE,
        GRAD_NORM,
        STEP,
        SAMPLES,
        TOKENS,
        WAIT_SHARE,
        STALL_SHARE,
        MFU,
        GOODPUT,
        GOODPUT_BOUND,
    )
}


@dataclass(frozen=True)
class Sample:
    """One number of a metric; `at` is the value of its label, if it has one."""

    key: str
    metric: Metric
    at: str | None
    value: float


Sink = Callable[[int, Sequence[Sample]], None]


def emit(step: int, values: Mapping[str, Any], sinks: Iterable[Sink]) -> None:
    """Hand what was measured up to `step` to every sink.

    A key is the name of a metric, or NAME/VALUE where the metric has a label, as
    `validation/accuracy`; any other key names what the task counts, as `accuracy`.

    Raises:
        HeliostatError: a value is not one finite number.
    """
    samples = [_resolve(key, value) for key, value in plain(values).items()]
    for sink in sinks:
        sink(step, samples)


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """`metrics` as Python floats, whatever library the scalars came from.

    Raises:
        HeliostatError: a value is not one finite number; the sentence names its key.
    """
    return {key: _scalar(key, value) for key, value in metrics.items()}


def _resolve(key: str, value: float) -> Sample:
    name, _, at = key.partition("/")
    metric = TRAINING.get(name)
    if metric and (metric.label is not None) == bool(at):
        return Sample(key, metric, at or None, value)
    return Sample(key, SCORE, key, value)


def _scalar(key: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise HeliostatError(
            f"metric {key!r} is a {type(value).__name__}, it must be one number"
        ) from error
    if not math.isfinite(number):
        raise HeliostatError(f"metric {key!r} is {number}, it must be finite")
    return number
