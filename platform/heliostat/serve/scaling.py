"""How many replicas there should be: a pure function of what they were asked of late.

Ray Serve's controller runs `Policy` and gets this module by value, so it imports nothing of this
package.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What replicas report; each value is of the time since the one before.
INSIDE, REQUESTS, LATENCY_MS = "inside", "requests", "latency_ms"

LEAST_USE = 0.25  # of a replica's time, below which more of them are not made for speed


@dataclass(frozen=True)
class Goal:
    """The requests that may be inside a replica on average, and the ms within which 95 % of the
    answers should begin, if that is wanted."""

    requests: float
    latency_ms: float | None = None


@dataclass(frozen=True)
class Load:
    """So many requests were inside all replicas together on average, and 95 % of the answers began
    within `latency_ms`."""

    replicas: int
    inside: float
    latency_ms: float


def decide(load: Load, goal: Goal) -> float:
    """The replicas that `load` asks for, as a number that is still to be rounded up.

    A replica is taken for a queue of random arrivals (M/M/1): with q requests inside it is busy for
    q / (1 + q) of the time, and answers take 1 + q times as long as of an idle one. So the busy
    time of all and an idle one's latency follow from what was measured, and from these the fewest
    replicas whose answers are in time. An idle one may be too slow by itself: then their number is
    what LEAST_USE leaves.
    """
    by_requests = load.inside / goal.requests
    if goal.latency_ms is None:
        return by_requests
    slowness = 1 + load.inside / load.replicas
    busy, idle_ms = load.inside / slowness, load.latency_ms / slowness
    return max(by_requests, busy / max(1 - idle_ms / goal.latency_ms, LEAST_USE))


@dataclass(frozen=True)
class Report:
    """What a replica told at one time."""

    inside: float
    requests: float
    latency_ms: float


def add_up(reports: Sequence[Sequence[Report]]) -> Load:
    """The load of replicas by the last reports of each, of which there is at least one."""
    inside = sum(sum(one.inside for one in of) / len(of) for of in reports)
    told = [one for of in reports for one in of]
    requests = sum(one.requests for one in told)
    weighted = sum(one.requests * one.latency_ms for one in told)
    return Load(len(reports), inside, weighted / requests if requests else 0.0)


def read_reports(raw: Mapping[str, Mapping[Any, Sequence[Any]]]) -> list[list[Report]]:
    """The reports of each replica among what Serve keeps: metric, replica, values by time."""
    columns = [raw.get(name, {}) for name in (INSIDE, REQUESTS, LATENCY_MS)]
    replicas = [
        [
            Report(*(point.value for point in points))
            for points in zip(*(column.get(replica, ()) for column in columns), strict=False)
        ]
        for replica in columns[0]
    ]
    return [reports for reports in replicas if reports]


class Policy:
    """The policy as Ray Serve calls it: replicas that have not reported yet change nothing."""

    def __init__(self, requests: float, latency_ms: float | None) -> None:
        self._goal = Goal(requests, latency_ms)

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        reports = read_reports(context.raw_metrics)
        if len(reports) < context.current_num_replicas or not reports:
            return context.target_num_replicas, {}
        return decide(add_up(reports), self._goal), {}
