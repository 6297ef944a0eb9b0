"""The decisions of a run: when it ends, when its learning rate drops."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from heliostat.errors import HeliostatError
from heliostat.spec import ScheduleSpec, StopSpec, TrainSpec
from heliostat.train.stop import Status, Trend, decide, follow

LOSSES = st.lists(st.floats(0, 10) | st.just(float("nan")), min_size=1, max_size=30)


def make(**stop: object) -> TrainSpec:
    plateau = ScheduleSpec(kind="plateau", patience=2)
    return TrainSpec(stop=StopSpec.model_validate(stop), schedule=plateau, validate_steps=1)


def follow_all(train: TrainSpec, values: list[float], metric: str = "loss") -> list[Trend]:
    trends = [Trend()]
    for step, value in enumerate(values, start=1):
        trends.append(follow(train, trends[-1], step, {metric: value}))
    return trends[1:]


@given(LOSSES)
def test_the_best_is_the_smallest_loss_and_stale_counts_from_it(losses: list[float]) -> None:
    known = [loss for loss in losses if not math.isnan(loss)]
    trend = follow_all(make(), losses)[-1]
    assert trend.best == (min(known) if known else None)
    first_best = losses.index(min(known)) + 1 if known else 0
    assert (trend.best_step, trend.stale) == (first_best, len(losses) - first_best)


@given(LOSSES)
def test_the_rate_drops_once_for_every_full_patience_without_a_new_best(
    losses: list[float],
) -> None:
    trends = [Trend(), *follow_all(make(), losses)]
    for before, after in pairwise(trends):
        improved = after.stale == 0
        assert after.drops - before.drops == (not improved and before.waited + 1 == 2)


def test_a_metric_where_more_is_better_is_read_so() -> None:
    train = make(metric="accuracy", target=0.9, patience=2)
    trend = follow_all(train, [0.5, 0.8, 0.7], "accuracy")[-1]
    assert (trend.best, trend.stale) == (0.8, 1)
    assert decide(train, Status(3, 0, 0, {"accuracy": 0.89}, trend)) is None
    assert "reached 0.9" in str(decide(train, Status(3, 0, 0, {"accuracy": 0.91}, trend)))


def test_a_gain_below_the_least_one_is_none() -> None:
    train = make(patience=2, min_delta=0.1)
    trend = follow_all(train, [1.0, 0.95, 0.91])[-1]
    assert trend.stale == 2
    assert "since step 1" in str(decide(train, Status(3, 0, 0, {}, trend)))


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        ({"tokens": 100}, Status(1, 100, 0, {}, Trend())),
        ({"seconds": 5.0}, Status(1, 0, 5.5, {}, Trend())),
        ({"metric": "mae", "target": 0.5}, Status(1, 0, 0, {"mae": 0.5}, Trend())),
    ],
)
def test_each_limit_ends_the_run_when_it_is_met(stop: dict[str, object], status: Status) -> None:
    assert decide(make(**stop), status)
    assert decide(make(), status) is None
    assert decide(make(**stop), Status(1, 99, 4.9, {"mae": 0.51}, Trend())) is None


def test_patience_can_be_of_any_metric() -> None:
    train = make(metric="accuracy", patience=2)
    trend = follow_all(train, [0.8, 0.7, 0.79], "accuracy")[-1]
    assert "accuracy has not improved 2 times" in str(decide(train, Status(3, 0, 0, {}, trend)))


@pytest.mark.parametrize("stop", [{"metric": "accuracy"}, {"target": 0.5}])
def test_what_would_end_nothing_is_refused(stop: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="set "):
        make(**stop)


def test_a_metric_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(HeliostatError, match="f1 is not a metric of this task: use one of loss"):
        follow(make(metric="f1", target=1.0), Trend(), 1, {"loss": 1.0})
