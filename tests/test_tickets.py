"""The board of the queue under racing writers, dead ones and clocks that nobody sets."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from heliostat import storage
from heliostat.queue import Amount, Room, Run, Ticket, Wait, Yield
from heliostat.storage import LocalStore, Store
from heliostat.tickets import DEAD_SECONDS, Board, Stand, read_board

CLUSTER = "session_1"
ROOM = Room((Amount(8),))


def measure(_: Board) -> Room:
    return ROOM


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def make(name: str, workers: int = 1, priority: int = 0) -> Ticket:
    return Ticket(name, 0, name, Amount(1), fewest=workers, most=workers, priority=priority)


def stand(store: Store, ticket: Ticket, clock: Clock | None = None) -> Stand:
    return Stand(store, CLUSTER, ticket, clock or Clock())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(str(tmp_path))


def test_of_fifty_racing_writers_as_many_are_admitted_as_there_is_room_for(bucket: str) -> None:
    """On a real S3 server, each with a connection of its own."""
    start = threading.Barrier(50)

    def race(index: int) -> bool:
        one = Stand(storage.connect(bucket), CLUSTER, make(f"t{index}"))
        start.wait()
        return isinstance(one.look(measure), Run)

    with ThreadPoolExecutor(50) as threads:
        admitted = sum(threads.map(race, range(50)))
    board = read_board(storage.connect(bucket), CLUSTER)
    assert admitted == sum(one.held for one in board.tickets) == 8
    assert sorted(one.arrival for one in board.tickets) == list(range(50))


def test_places_are_given_back_and_taken_in_the_order_of_arrival(store: Store) -> None:
    first, second, third = (stand(store, make(name, 8)) for name in "abc")
    assert first.look(measure) == Run(8)
    assert isinstance(second.look(measure), Wait)
    assert isinstance(third.look(measure), Wait)
    first.leave()
    assert isinstance(third.look(measure), Wait)
    assert second.look(measure) == Run(8)
    assert {one.id for one in read_board(store, CLUSTER).tickets} == {"b", "c"}


def test_one_that_yields_waits_in_its_old_place(store: Store) -> None:
    low, high = stand(store, make("low", 8)), stand(store, make("high", 8, priority=1))
    assert low.look(measure) == Run(8)
    assert isinstance(high.look(measure), Wait)
    assert isinstance(low.look(measure), Yield)
    assert isinstance(high.look(measure), Wait)  # it is asked, and has not done it yet
    low.hold(0)
    assert high.look(measure) == Run(8)
    later = stand(store, make("later", 8))
    high.leave()
    assert isinstance(later.look(measure), Wait)
    assert low.look(measure) == Run(8)


def test_a_dead_one_loses_its_place_after_a_while_and_a_live_one_never(store: Store) -> None:
    """By the watcher's own clock alone: whoever looks first has to watch for as long."""
    dead, alive = stand(store, make("dead", 4)), stand(store, make("alive", 4))
    assert dead.look(measure) == Run(4)
    assert alive.look(measure) == Run(4)
    clock = Clock()
    waits = stand(store, make("waits", 4), clock)
    assert isinstance(waits.look(measure), Wait)
    for _ in range(3):
        clock.seconds += DEAD_SECONDS / 3 - 0.1
        alive.renew()
        assert isinstance(waits.look(measure), Wait)
    clock.seconds += 1
    assert waits.look(measure) == Run(4)
    assert {one.id for one in read_board(store, CLUSTER).tickets} == {"alive", "waits"}


def test_one_that_was_taken_for_dead_and_lives_stands_there_again(store: Store) -> None:
    slept, other = stand(store, make("slept", 8)), stand(store, make("other", 8))
    assert slept.look(measure) == Run(8)
    assert isinstance(other.look(measure), Wait)
    other._change(lambda board: board.remove("slept"))
    assert other.look(measure) == Run(8)
    assert isinstance(slept.look(measure), Run | Yield)
    assert {one.id for one in read_board(store, CLUSTER).tickets} == {"slept", "other"}


def test_where_there_is_room_nobody_is_listed(store: Store) -> None:
    """What a job adds to its start where there is room: no list, no wait."""
    asked: list[str] = []

    class Counting(LocalStore):
        def stat(self, key: str) -> storage.Entry | None:
            asked.append("stat")
            return super().stat(key)

        def list(self, prefix: str = ""):  # type: ignore[no-untyped-def]
            asked.append("list")
            return super().list(prefix)

    assert stand(Counting(store.uri), make("a")).look(measure) == Run(1)
    assert asked == ["stat"]


def test_who_looks_and_finds_nothing_new_writes_nothing(store: Store) -> None:
    first, second, third = (stand(store, make(name, 4)) for name in "abc")
    for one in (first, second, third):
        one.look(measure)
    before = list(store.list("queue/"))
    assert first.look(measure) == second.look(measure) == Run(4)
    assert isinstance(third.look(measure), Wait)
    assert list(store.list("queue/")) == before


@pytest.mark.parametrize("left", [0, 1, 40])
def test_a_damaged_board_is_stood_on_again_in_the_order_of_arrival(store: Store, left: int) -> None:
    runs, waits = stand(store, make("runs", 8)), stand(store, make("waits", 8))
    assert runs.look(measure) == Run(8)
    assert isinstance(waits.look(measure), Wait)
    key = f"queue/{CLUSTER}/board.json"
    store.write(key, store.read(key)[:left])
    assert runs.look(measure) == Run(8)
    assert isinstance(waits.look(measure), Wait)
    assert isinstance(stand(store, make("late", 8)).look(measure), Wait)
    runs.leave()
    assert waits.look(measure) == Run(8)
