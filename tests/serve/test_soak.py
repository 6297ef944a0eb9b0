"""A served model under load for an hour, to which something happens every minute."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain

import psutil
import pytest
from ray.util.state import list_actors

from deploying import Wait, count_failed, deploy, make_spec, steady_load
from heliostat.local import Cluster, processes
from heliostat.serve.table import read_table
from heliostat.storage import Store

pytestmark = [pytest.mark.cluster, pytest.mark.soak]

SECONDS = float(os.environ.get("HELIOSTAT_SOAK_SECONDS", "3600"))
SEED = int(os.environ.get("HELIOSTAT_SOAK_SEED", "0"))
EVERY_SECONDS = 60.0
SUCCESS = 0.999

Fault = Callable[[Cluster, Store], None]


def kill_actor(class_name: str) -> Fault:
    def kill(cluster: Cluster, store: Store) -> None:
        found = [actor for actor in list_actors(limit=1000) if actor.state == "ALIVE"]
        named = [actor for actor in found if class_name in actor.class_name]
        psutil.Process(random.choice(named).pid).kill()

    return kill


def kill_haproxy(part: str) -> Fault:
    def kill(cluster: Cluster, store: Store) -> None:
        for process in processes.find(cluster.state.marker(part)):
            if process.info["name"] == "haproxy":
                process.kill()

    return kill


def update(cluster: Cluster, store: Store) -> None:
    version = read_table(store).models["digits"].number
    deploy(make_spec(store.uri, version=3 - version, replicas=2))


FAULTS: dict[str, Fault] = {
    "a replica killed": kill_actor("Replica"),
    "the controller killed": kill_actor("ServeController"),
    "the proxy killed": kill_haproxy("ray"),
    "the proxy's keeper killed": kill_actor("HAProxyManager"),
    "the spare proxy killed": kill_actor("ProxyActor"),
    "the office killed": kill_actor("Clerk"),
    "the edge killed": kill_haproxy("edge"),
    "an update": update,
}


def test_nearly_every_request_is_answered_whatever_happens(
    cluster: Cluster, store: Store, digits: str, wait_until: Wait
) -> None:
    deploy(make_spec(store.uri, version=1, replicas=2))
    marker = cluster.state.marker("ray")
    plan = plan_faults(int(SECONDS / EVERY_SECONDS))
    began = time.monotonic()
    with steady_load(digits, 3, every_s=0.05) as answered:
        for number, name in enumerate(plan):
            before = Counter(answered)
            FAULTS[name](cluster, store)
            until = began + EVERY_SECONDS * (number + 1)
            wait_until(lambda until=until: time.monotonic() >= until, 2 * EVERY_SECONDS)
            print(f"{time.monotonic() - began:5.0f} s, {name}: {dict(answered - before)}")
    total, failed = answered.total(), count_failed(answered)
    print(f"G-19: {failed} failed of {total:,} requests, {len(plan)} faults")
    assert failed <= (1 - SUCCESS) * total, answered
    wait_until(lambda: count_haproxies(marker) == 1, 60)


def plan_faults(count: int) -> list[str]:
    """In a random order, none twice before all others."""
    drawn = random.Random(SEED)
    rounds = (drawn.sample(list(FAULTS), len(FAULTS)) for _ in range(count))
    return list(chain.from_iterable(rounds))[:count]


def count_haproxies(marker: str) -> int:
    return sum(process.info["name"] == "haproxy" for process in processes.find(marker))
