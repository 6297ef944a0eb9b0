"""Limits over all replicas: never more than the limit and a lease each, and never less for good."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.keys import Allowance, Unit
from heliostat.serve.ledger import (
    LEASE_SHARE,
    SEEN_SECONDS,
    Answer,
    Ask,
    Ledger,
    Office,
    Want,
    find_lease,
    seconds_to_next_month,
)
from heliostat.usage import Record

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
ROUNDING = 1e-6


def make_allowance(unit: Unit, units: float, seconds: float | None) -> Allowance:
    return Allowance("k", f"{unit}_{seconds}", unit, units, seconds)


def make_record(rows: int) -> Record:
    return Record(NOON, "k", "digits", 1, "/", rows, 0, 0, 0.0, 200)


@dataclass
class World:
    """An office, its clock, and what each replica holds of one allowance."""

    allowance: Allowance
    now: float = 100.0
    used: int = 0
    left: dict[int, float] = field(default_factory=dict)
    spent: dict[int, list[Record]] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A new office, as after the old one was killed: what it was told stays in the bucket."""
        ledger = Ledger(
            clock=lambda: self.now,
            wall=lambda: NOON + self.now,
            born=self.now,
            used=lambda key, unit, month: self.used,
        )
        self.office = Office(ledger, self._take)

    def ask(self, replica: int) -> Answer:
        self.number += 1
        records = tuple(self.spent.pop(replica, ()))
        want = Want(self.allowance, self.left.get(replica, 0.0))
        answer = self.office.answer(Ask(str(replica), (want,), self.number, records))
        self.left[replica] = want.left + answer.grants[0].units
        return answer

    def request(self, replica: int, cost: int = 1) -> float | None:
        """None if it is let in, else the seconds to wait."""
        if self.left.get(replica, 0.0) < 1 - ROUNDING:
            answer = self.ask(replica)
            if self.left[replica] < 1 - ROUNDING:
                return answer.grants[0].wait
        self.left[replica] -= cost
        self.spent.setdefault(replica, []).append(make_record(cost))
        return None

    def _take(self, records: object) -> None:
        self.used += sum(one.rows for one in records)  # type: ignore[attr-defined]


replicas = st.integers(0, 2)
limits = st.floats(0.1, 500)
steps = st.lists(
    st.tuples(st.sampled_from([0.0, 0.01, 0.3, 2.0, 70.0]), replicas, st.integers(1, 40)),
    max_size=25,
)


@given(units=limits, seconds=st.sampled_from([1.0, 60.0]), steps=steps, restart=st.integers(0, 40))
def test_no_window_lets_in_more_than_the_limit_and_a_lease_each(
    units: float, seconds: float, steps: list[tuple[float, int, int]], restart: int
) -> None:
    world = World(make_allowance("requests", units, seconds))
    admitted: list[tuple[float, int]] = []
    for number, (passed, replica, tries) in enumerate(steps):
        world.now += passed
        if number == restart:
            world.start()
        count = sum(world.request(replica) is None for _ in range(tries))
        admitted.append((world.now, count))
    size, leases = max(1.0, units), 3 * find_lease(world.allowance)
    for first, last in combinations(range(len(admitted) + 1), 2):
        window = admitted[first:last]
        seconds_between = window[-1][0] - window[0][0]
        most = size + units / seconds * seconds_between + leases
        assert sum(count for _, count in window) <= most + ROUNDING


def test_an_office_that_was_killed_gives_nothing_twice() -> None:
    world = World(make_allowance("tokens", 60, 60.0), now=100.0)
    world.now += 600
    assert [world.request(0) for _ in range(60)] == [None] * 60
    world.start()
    assert world.request(0) == pytest.approx(1.0)
    world.now += 30
    assert [world.request(0) is None for _ in range(40)].count(True) == 30


@given(units=limits, seconds=st.sampled_from([1.0, 60.0]), steps=steps)
def test_who_waits_as_long_as_told_is_let_in(
    units: float, seconds: float, steps: list[tuple[float, int, int]]
) -> None:
    world = World(make_allowance("tokens", units, seconds))
    for passed, replica, cost in steps:
        world.now += passed
        world.request(replica, cost)
        wait = world.request(replica, cost)
        if wait is not None:
            assert wait > 0
            world.now += wait + ROUNDING
            assert world.request(replica, cost) is None


@given(units=limits, cost=st.integers(1, 50))
def test_a_steady_client_gets_its_limit_and_no_more(units: float, cost: int) -> None:
    """Costs are known when a request ends; in the long run they are paid all the same."""
    world = World(make_allowance("tokens", units, 1.0))
    began, spent = world.now, 0
    for turn in range(200):
        wait = world.request(turn % 2, cost)
        if wait is None:
            spent += cost
        else:
            world.now += wait + ROUNDING
    rate = units * (world.now - began)
    assert spent <= max(1.0, units) + rate + 2 * (find_lease(world.allowance) + cost)
    if world.now - began > 10 * cost / units:
        assert spent >= rate * 0.5


@given(budget=st.integers(1, 3000), steps=steps, restart=st.integers(0, 40))
def test_a_months_budget_is_overrun_by_leases_and_last_requests_only(
    budget: int, steps: list[tuple[float, int, int]], restart: int
) -> None:
    world = World(make_allowance("rows", budget, None))
    spent = 0
    for number, (passed, replica, cost) in enumerate(steps * 4):
        world.now += passed
        if number == restart:
            world.start()
        spent += cost if world.request(replica, cost) is None else 0
    leases = 3 * find_lease(world.allowance)
    assert spent <= budget + 3 * 39 + leases + ROUNDING


def test_a_budget_is_used_up_to_its_last_unit() -> None:
    world = World(make_allowance("rows", 50, None))
    assert [world.request(turn % 2) for turn in range(50)] == [None] * 50
    assert world.request(0) is not None


def test_a_new_month_is_a_new_budget() -> None:
    used = {"2026-11": 10.0}
    now = [NOON]
    ledger = Ledger(
        clock=lambda: 0.0,
        wall=lambda: now[0],
        born=0.0,
        used=lambda key, unit, month: used.get(month, 0.0),
    )
    want = Want(make_allowance("rows", 10, None), 0.0)
    refused = ledger.grant("a", want)
    assert refused.units == 0
    now[0] += refused.wait
    assert ledger.grant("a", want).units == 1
    assert datetime.fromtimestamp(now[0], UTC) == datetime(2026, 12, 1, tzinfo=UTC)


def test_what_a_killed_replica_held_of_a_budget_comes_back() -> None:
    world = World(make_allowance("rows", 10_000, None))
    world.used = 9_990
    assert world.request(0) is None
    assert world.left[0] == pytest.approx(10_000 * LEASE_SHARE - 1)
    assert world.request(1) is not None
    world.now += SEEN_SECONDS + 1
    assert world.request(1) is None


def test_a_batch_that_is_sent_twice_is_taken_once() -> None:
    world = World(make_allowance("rows", 10, None))
    batch = Ask("a", (), 1, (make_record(3),))
    assert [world.office.answer(batch).replicas for _ in range(2)] == [1, 1]
    world.office.answer(Ask("b", (), 1, (make_record(4),)))
    assert world.used == 7


@given(second=st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1)))
def test_the_next_month_begins_on_its_first_day(second: datetime) -> None:
    now = second.replace(tzinfo=UTC).timestamp()
    begins = datetime.fromtimestamp(now + seconds_to_next_month(now), UTC)
    assert (begins.day, begins.hour, begins.minute) == (1, 0, 0)
    assert begins.month == second.month % 12 + 1
