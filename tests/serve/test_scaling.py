"""How many replicas there are to be, by values, and what a replica measures for that."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ray import cloudpickle
from starlette.types import Message, Receive, Scope, Send

from heliostat.serve import scaling
from heliostat.serve.deploy import plan_configs
from heliostat.serve.load import Load as Meter
from heliostat.serve.scaling import (
    INSIDE,
    LATENCY_MS,
    LEAST_USE,
    REQUESTS,
    Goal,
    Load,
    Policy,
    Report,
    add_up,
    decide,
)
from heliostat.serve.table import Placement, Table
from heliostat.spec import DeploySpec
from heliostat.storage import Store, connect

FREE = Goal(requests=1e9, latency_ms=100)  # a latency alone decides


def queue(replicas: int, busy: float, idle_ms: float) -> Load:
    """What queues of random arrivals show that together have `busy` replicas' worth of work."""
    use = busy / replicas
    return Load(replicas, replicas * use / (1 - use), idle_ms / (1 - use))


def in_time(replicas: int, busy: float, idle_ms: float) -> bool:
    return replicas > busy and queue(replicas, busy, idle_ms).latency_ms <= 100


@given(st.integers(1, 200), st.floats(0.01, 100), st.floats(0.1, 75))
def test_one_decision_finds_the_fewest_replicas_that_answer_in_time(
    replicas: int, busy: float, idle_ms: float
) -> None:
    assume(busy < 0.99 * replicas)
    wanted = decide(queue(replicas, busy, idle_ms), FREE)
    assume(abs(wanted - round(wanted)) > 1e-6)
    fewest = math.ceil(wanted)
    assert in_time(fewest, busy, idle_ms)
    assert not in_time(fewest - 1, busy, idle_ms)


@given(st.integers(1, 200), st.floats(0.01, 100), st.floats(0.1, 1e4))
def test_what_was_decided_is_decided_again(replicas: int, busy: float, idle_ms: float) -> None:
    assume(busy < 0.99 * replicas)
    wanted = math.ceil(decide(queue(replicas, busy, idle_ms), FREE))
    assert decide(queue(wanted, busy, idle_ms), FREE) <= wanted + 1e-6


@given(st.integers(1, 50), st.floats(0, 1000), st.floats(0, 1e6), st.integers(1, 64))
def test_there_are_as_many_as_the_requests_inside_ask_for_and_never_more_for_speed_than_use_allows(
    replicas: int, inside: float, latency_ms: float, requests: int
) -> None:
    load, goal = Load(replicas, inside, latency_ms), Goal(requests, 100)
    by_requests = inside / requests
    assert decide(load, replace(goal, latency_ms=None)) == by_requests
    assert by_requests <= decide(load, goal) <= max(by_requests, inside / LEAST_USE)


@given(st.integers(1, 50), st.floats(0.1, 1000), st.floats(0, 1e4), st.floats(0, 1e4))
def test_later_answers_never_ask_for_fewer(
    replicas: int, inside: float, sooner: float, later: float
) -> None:
    sooner, later = sorted((sooner, later))
    assert decide(Load(replicas, inside, sooner), FREE) <= decide(
        Load(replicas, inside, later), FREE
    )


def test_nothing_inside_asks_for_none() -> None:
    assert decide(Load(3, 0.0, 0.0), FREE) == 0


def test_reports_are_added_up_by_their_requests() -> None:
    quick, slow = Report(2.0, 30, 10.0), Report(4.0, 10, 50.0)
    load = add_up([[quick, quick], [slow, Report(0.0, 0, 0.0)]])
    assert load == Load(2, 4.0, (60 * 10 + 10 * 50) / 70)


class Point(SimpleNamespace):
    """A value as Serve keeps it."""


def context(replicas: int, reported: int, **metrics: float) -> Any:
    raw = {
        name: {replica: [Point(timestamp=1.0, value=value)] for replica in range(reported)}
        for name, value in metrics.items()
    }
    return SimpleNamespace(
        raw_metrics=raw, current_num_replicas=replicas, target_num_replicas=replicas
    )


def test_serve_gets_a_policy_that_needs_nothing_of_this_package() -> None:
    """As the task that builds an application pickles it for the controller."""
    cloudpickle.register_pickle_by_value(scaling)
    try:
        pickled = cloudpickle.dumps(Policy)
    finally:
        cloudpickle.unregister_pickle_by_value(scaling)
    assert b"heliostat.spec" not in pickled
    assert b"heliostat.serve.delivery" not in pickled
    policy = cloudpickle.loads(pickled)(requests=8, latency_ms=None)
    told = {INSIDE: 12.0, REQUESTS: 5.0, LATENCY_MS: 3.0}
    assert policy(context(2, 2, **told)) == (3.0, {})
    assert policy(context(2, 1, **told)) == (2, {})  # one has only just started
    assert policy(context(1, 0)) == (1, {})


def tell_serve(store: Store, deploy: DeploySpec, now: int) -> dict[str, Any]:
    """How Serve is told to scale, which keeps `now` replicas."""
    table = Table(models={"digits": Placement(number=1)}, deploy=deploy)
    app = {
        "deployed_app_config": None,
        "deployments": {"Replica": {"target_num_replicas": now}},
    }
    (config,) = plan_configs(store, table, {"applications": {"heliostat": app}})
    told: dict[str, Any] = config["applications"][0]["deployments"][0]["autoscaling_config"]
    return told


def test_the_spec_says_what_serve_is_told(tmp_path: Path) -> None:
    spec = DeploySpec(
        replicas=(0, 4), target_requests=3, latency_target_ms=50, scale_up_s=5, scale_down_s=60
    )
    told = tell_serve(connect(str(tmp_path)), spec, 0)
    assert (told["min_replicas"], told["initial_replicas"], told["max_replicas"]) == (0, 1, 4)
    assert (told["upscale_delay_s"], told["downscale_delay_s"]) == (5, 60)
    assert told["policy"] == {
        "policy_function": "heliostat.serve.scaling:Policy",
        "policy_kwargs": {"requests": 3, "latency_ms": 50},
    }
    with pytest.raises(ValueError, match=r"give replicas=\[1, 3\], from a fewest to a most"):
        DeploySpec(replicas=2, latency_target_ms=50)


def test_a_new_version_has_the_replicas_that_the_old_one_has(tmp_path: Path) -> None:
    store, spec = connect(str(tmp_path)), DeploySpec(replicas=(0, 4))
    counts = [tell_serve(store, spec, now)["initial_replicas"] for now in (0, 1, 3, 9)]
    assert counts == [1, 1, 3, 4]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measure(*requests: tuple[float, float, float, int]) -> dict[str, float]:
    """Of requests one after another: what passes before the first piece of an answer, until its
    end, and until the next comes; and the status."""
    clock = Clock()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        first, rest, _, status = scope["request"]
        await send({"type": "http.response.start", "status": status})
        clock.now += first
        await send({"type": "http.response.body", "body": b"data: 1", "more_body": True})
        clock.now += rest
        await send({"type": "http.response.body", "body": b"data: 2"})

    async def drop(message: Message) -> None:
        pass

    meter = Meter(app, clock)
    for request in requests:
        asyncio.run(meter({"type": "http", "request": request}, drop, drop))  # type: ignore[arg-type]
        clock.now += request[2]
    told = meter.take()
    assert meter.take()[REQUESTS] == 0
    return told


def test_a_replica_tells_how_many_are_inside_and_how_soon_answers_begin() -> None:
    told = measure((0.1, 1.9, 2.0, 200), (0.1, 1.9, 2.0, 200))
    assert told[INSIDE] == pytest.approx(0.5)
    assert told[REQUESTS] == 2
    assert told[LATENCY_MS] == pytest.approx(100, rel=0.1)


def test_a_refusal_is_inside_but_no_quick_answer() -> None:
    told = measure((1.0, 0.0, 0.0, 200), (0.001, 0.0, 0.0, 429))
    assert told[REQUESTS] == 1
    assert told[LATENCY_MS] == pytest.approx(1000, rel=0.1)
