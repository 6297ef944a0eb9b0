"""Usage: what was flushed is in the bucket once, by day, and adds up."""

from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat import usage
from heliostat.errors import HeliostatError
from heliostat.storage import LocalStore, Store, connect
from heliostat.usage import Meter, Record, Sum, encode, summarise

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0


def make_record(key: str = "k", day: int = 0, rows: int = 1, status: int = 200) -> Record:
    return Record(NOON + day * DAY, key, "digits", 3, "/v1", rows, 5, 7, 0.25, status)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return connect(str(tmp_path))


class Refusing(LocalStore):
    """A bucket that takes nothing while it is full."""

    full = False

    def write(self, key: str, data: bytes) -> str:
        if Refusing.full:
            raise HeliostatError("the bucket is full")
        return super().write(key, data)


def make_meter(store: Store) -> Meter:
    return Meter(store, clock=lambda: 0.0, wall=lambda: NOON)


def list_parts(store: Store) -> list[str]:
    return [entry.key for entry in store.list("usage/day=")]


batches = st.lists(
    st.lists(
        st.builds(
            make_record,
            key=st.sampled_from("abc"),
            day=st.integers(-1, 1),
            rows=st.integers(0, 1000),
            status=st.sampled_from([200, 404, 500]),
        ),
        max_size=8,
    ),
    max_size=6,
)


@given(batches=batches)
@settings(max_examples=25)
def test_whatever_comes_between_flushes_adds_up(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Record]]
) -> None:
    store = connect(str(tmp_path_factory.mktemp("usage")))
    meter = make_meter(store)
    for batch in batches:
        meter.add(batch)
        meter.flush()
    records = [record for batch in batches for record in batch]
    for by in usage.GROUPS:
        sums = summarise(store, by)
        assert sum((one.requests for one in sums.values()), 0) == len(records)
    assert summarise(store, "key") == {
        key: add_up(record for record in records if record.key == key)
        for key in sorted({record.key for record in records})
    }


def add_up(records: Iterable[Record]) -> Sum:
    total = Sum()
    for one in records:
        error = int(one.status >= 400)
        total += Sum(1, error, one.rows, one.tokens_in, one.tokens_out, one.seconds)
    return total


def test_many_flushes_are_one_object_a_day_until_it_is_full(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "PART_RECORDS", 6)
    meter = make_meter(store)
    for _ in range(4):
        meter.add([make_record()] * 2)
        meter.flush()
    assert len(list_parts(store)) == 2
    assert all(key.startswith("usage/day=2026-11-22/") for key in list_parts(store))
    assert summarise(store, "key")["k"].requests == 8


def test_what_the_bucket_refused_is_written_later_and_once(tmp_path: Path) -> None:
    store = Refusing(str(tmp_path))
    meter = make_meter(store)
    meter.add([make_record()])
    Refusing.full = True
    with pytest.raises(HeliostatError):
        meter.flush()
    Refusing.full = False
    meter.flush()
    assert summarise(store, "key")["k"].requests == 1
    assert make_meter(store).count_used("k", "rows", "2026-11") == 1


def test_a_meter_that_was_killed_goes_on_from_its_last_flush(store: Store) -> None:
    killed = make_meter(store)
    killed.add([make_record(rows=4)])
    killed.flush()
    killed.add([make_record(rows=100)])
    meter = make_meter(store)
    meter.add([make_record(rows=2), make_record("other", rows=50)])
    assert meter.count_used("k", "rows", "2026-11") == 6
    assert meter.count_used("k", "tokens", "2026-11") == 24
    assert meter.count_used("k", "rows", "2026-12") == 0


def test_a_day_is_left_out_by_its_name(store: Store) -> None:
    meter = make_meter(store)
    meter.add([make_record(day=-1), make_record(day=0), make_record(day=1)])
    meter.flush()
    found = summarise(store, "day", date(2026, 11, 22))
    assert {day: one.requests for day, one in found.items()} == {"2026-11-22": 1, "2026-11-23": 1}


def test_what_is_pruned_are_whole_days_and_no_budget(store: Store) -> None:
    meter = make_meter(store)
    meter.add([make_record(day=day, rows=3) for day in (-2, -1, 0)])
    meter.flush()
    store.write("usage/day=2026-11-20/notes.txt", b"not a part")
    assert usage.prune(store, date(2026, 11, 22)) == 2
    assert list(summarise(store, "day")) == ["2026-11-22"]
    assert usage.prune(store, date(2026, 11, 22)) == 0
    assert make_meter(store).count_used("k", "rows", "2026-11") == 9
    assert store.stat("usage/day=2026-11-20/notes.txt")


def test_a_bucket_that_takes_nothing_costs_a_bounded_memory(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "PART_RECORDS", 1)
    monkeypatch.setattr(usage, "MAX_PARTS", 3)
    meter = make_meter(store)
    meter.add([make_record()] * 10)
    meter.flush()
    assert summarise(store, "key")["k"].requests == 3


def test_a_part_that_is_damaged_is_named(store: Store) -> None:
    key = "usage/day=2026-11-22/00.parquet"
    store.write(key, encode([make_record()])[:-3])
    store.write("usage/day=2026-11-22/notes.txt", b"not a part")
    with pytest.raises(HeliostatError, match=key):
        summarise(store, "key")
