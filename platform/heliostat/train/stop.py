"""When a run ends before its last step, and when its learning rate drops: pure decisions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from heliostat.errors import HeliostatError
from heliostat.spec import TrainSpec

HIGHER_IS_BETTER = frozenset({"accuracy", "r2"})


@dataclass(frozen=True)
class Trend:
    """What the validations so far say: `stale` of them in a row did not improve on `best`.

    `drops` is how often the learning rate fell on a plateau, `waited` how many stale ones there
    were since the last drop.
    """

    best: float | None = None
    best_step: int = 0
    stale: int = 0
    drops: int = 0
    waited: int = 0

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Status:
    """Where a run is: `metrics` are those of the validation at this step, if there was one."""

    step: int
    tokens: int
    seconds: float
    metrics: Mapping[str, float]
    trend: Trend


def watched(train: TrainSpec) -> str:
    """The metric of the validation split that the run is steered by."""
    return train.stop.metric or "loss"


def find_metric(train: TrainSpec, metrics: Mapping[str, float]) -> float:
    """The value of the watched metric.

    Raises:
        HeliostatError: the validation has no such metric.
    """
    name = watched(train)
    if name not in metrics:
        raise HeliostatError(
            f"train.stop.metric={name} is not a metric of this task: use one of "
            f"{', '.join(metrics)}"
        )
    return metrics[name]


def follow(train: TrainSpec, trend: Trend, step: int, metrics: Mapping[str, float]) -> Trend:
    """The trend with one more validation. A value that is not a number never is the best."""
    value = find_metric(train, metrics)
    if _improves(train, value, trend.best):
        return replace(trend, best=value, best_step=step, stale=0, waited=0)
    trend = replace(trend, stale=trend.stale + 1, waited=trend.waited + 1)
    if train.schedule.kind == "plateau" and trend.waited >= train.schedule.patience:
        return replace(trend, drops=trend.drops + 1, waited=0)
    return trend


def decide(train: TrainSpec, status: Status) -> str | None:
    """Why the run should end now, or None."""
    stop = train.stop
    if stop.tokens is not None and status.tokens >= stop.tokens:
        return f"{status.tokens:,} tokens seen, train.stop.tokens is {stop.tokens:,}"
    if stop.seconds is not None and status.seconds >= stop.seconds:
        return f"{status.seconds:.0f} s passed, train.stop.seconds is {stop.seconds:g}"
    if stop.target is not None and status.metrics:
        value = find_metric(train, status.metrics)
        if _reaches(watched(train), value, stop.target):
            return f"validation {watched(train)} {value:.4g} reached {stop.target:g}"
    if stop.patience is not None and status.trend.stale >= stop.patience:
        return (
            f"validation {watched(train)} has not improved {status.trend.stale} times in a row "
            f"since step {status.trend.best_step:,}"
        )
    return None


def _improves(train: TrainSpec, value: float, best: float | None) -> bool:
    if math.isnan(value):
        return False
    if best is None:
        return True
    gain = value - best if watched(train) in HIGHER_IS_BETTER else best - value
    return gain > train.stop.min_delta


def _reaches(metric: str, value: float, target: float) -> bool:
    return value >= target if metric in HIGHER_IS_BETTER else value <= target
