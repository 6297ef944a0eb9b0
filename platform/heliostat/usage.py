"""What was used: a record per request, kept in the bucket as Parquet by day, and its sums."""

import io
import json
import logging
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from heliostat.errors import HeliostatError
from heliostat.storage import Missing, Store

logger = logging.getLogger(__name__)

PREFIX = "usage/"
PART_KEY = re.compile(rf"{PREFIX}day=(\d{{4}}-\d\d-\d\d)/[0-9a-f]+\.parquet")
PART_SECONDS = 600.0  # a part is written again with each flush until it is so old
PART_RECORDS = 20_000  # or holds so many
MAX_PARTS = 100  # that wait for a bucket which takes none; the oldest is lost above that
# By unit of an allowance: what of a record is counted against it.
UNITS: Mapping[str, tuple[str, ...]] = {"rows": ("rows",), "tokens": ("tokens_in", "tokens_out")}
SCHEMA = pa.schema(
    [
        ("time", pa.timestamp("us", "UTC")),
        ("key", pa.string()),
        ("model", pa.string()),
        ("version", pa.int64()),
        ("route", pa.string()),
        ("rows", pa.int64()),
        ("tokens_in", pa.int64()),
        ("tokens_out", pa.int64()),
        ("seconds", pa.float64()),
        ("status", pa.int64()),
    ]
)
GROUPS = ("key", "model", "day")


class Record(NamedTuple):
    """One request: when it came (Unix seconds), whose it was, what it took and how it ended.

    `version` is 0 and `model` empty where the request ended before they were known.
    """

    time: float
    key: str
    model: str
    version: int
    route: str
    rows: int
    tokens_in: int
    tokens_out: int
    seconds: float
    status: int


@dataclass(frozen=True)
class Sum:
    """Requests added up; an error is a status of 400 and above."""

    requests: int = 0
    errors: int = 0
    rows: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Sum") -> "Sum":
        names = (one.name for one in fields(Sum))
        return Sum(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass
class Part:
    """The records of one object; those that came since it was written last are not there yet."""

    key: str
    began: float
    records: list[Record] = field(default_factory=list)
    written: int = 0

    @property
    def is_behind(self) -> bool:
        return self.written < len(self.records)


class Meter:
    """Takes records and brings them to the bucket: what a flush has written is there to stay.

    A part is written again until it is full or old, so that a flush every few seconds does not
    leave thousands of small objects. `clock` is monotonic, `wall` the time of day, both in seconds.
    The sums of the months are kept beside, for a budget goes on where the last process was killed.
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._open: dict[str, Part] = {}
        self._parts: list[Part] = []
        self._months = {month: _read_month(store, month) for month in _find_months(wall())}
        self._changed: set[str] = set()

    def add(self, records: Iterable[Record]) -> None:
        with self._lock:
            for record in records:
                day = day_of(record.time)
                self._find_part(day).records.append(record)
                totals = self._months.setdefault(day[:7], Counter())
                for unit in UNITS:
                    totals[f"{record.key}/{unit}"] += count(record, unit)
                self._changed.add(day[:7])

    def count_used(self, key: str, unit: str, month: str) -> int:
        """What has been used of a unit in a month (`2026-11`)."""
        return self._months.get(month, Counter())[f"{key}/{unit}"]

    def flush(self) -> None:
        """Write what was added; safe beside `add` of another thread.

        Raises:
            HeliostatError: the bucket does not take it; it is kept for the next time.
        """
        with self._lock:
            behind = [(part, part.records[:]) for part in self._parts if part.is_behind]
            months = {month: dict(self._months[month]) for month in self._changed}
            self._changed = set()
        try:
            for part, records in behind:
                self._store.write(part.key, encode(records))
                part.written = len(records)
            for month, totals in months.items():
                self._store.write(_month_key(month), json.dumps(totals).encode())
        except HeliostatError:
            with self._lock:
                self._changed |= months.keys()
            raise
        with self._lock:
            self._parts = [
                part
                for part in self._parts
                if part.is_behind or any(part is one for one in self._open.values())
            ]

    def _find_part(self, day: str) -> Part:
        """The part that a record of `day` goes into; one that is full or old takes none more."""
        part = self._open.get(day)
        if (
            part is None
            or len(part.records) >= PART_RECORDS
            or self._clock() - part.began >= PART_SECONDS
        ):
            part = Part(f"{PREFIX}day={day}/{secrets.token_hex(8)}.parquet", self._clock())
            self._open[day] = part
            self._parts.append(part)
            if len(self._parts) > MAX_PARTS:
                lost = self._parts.pop(0)
                logger.error("%d records of usage are lost", len(lost.records) - lost.written)
        return part


def summarise(store: Store, by: str, since: date | None = None) -> dict[str, Sum]:
    """The sums by `key`, `model` or `day`, sorted, from the day `since` on.

    One part is in memory at a time.

    Raises:
        HeliostatError: a part is damaged.
    """
    sums: dict[str, Sum] = {}
    for day, table in _read_parts(store, since):
        for name, found in _sum_up(table, by, day):
            sums[name] = sums.get(name, Sum()) + found
    return dict(sorted(sums.items()))


def prune(store: Store, before: date) -> int:
    """Delete the records of the days before `before`; how many objects that were.

    The sums of the months stay, which budgets are counted by.
    """
    old = [
        entry.key
        for entry in store.list(f"{PREFIX}day=")
        if (match := PART_KEY.fullmatch(entry.key)) and match[1] < before.isoformat()
    ]
    for key in old:
        store.delete(key)
    return len(old)


def encode(records: list[Record]) -> bytes:
    """Parquet of `SCHEMA`."""
    columns = dict(zip(Record._fields, zip(*records, strict=True), strict=True))
    micros = [round(second * 1e6) for second in columns["time"]]
    arrays = [
        pa.array(micros if one.name == "time" else columns[one.name], one.type) for one in SCHEMA
    ]
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), buffer)
    return buffer.getvalue()


def count(record: Record, unit: str) -> int:
    return sum(getattr(record, name) for name in UNITS[unit])


def day_of(seconds: float) -> str:
    """`2026-11-22`, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _read_parts(store: Store, since: date | None) -> Iterator[tuple[str, pa.Table]]:
    for entry in store.list(f"{PREFIX}day="):
        match = PART_KEY.fullmatch(entry.key)
        if match and (since is None or match[1] >= since.isoformat()):
            try:
                yield match[1], parquet.read_table(io.BytesIO(store.read(entry.key)))
            except pa.ArrowInvalid as error:
                raise HeliostatError(
                    f"{store.uri}/{entry.key} is not a part of the usage: delete or restore it"
                ) from error


def _sum_up(table: pa.Table, by: str, day: str) -> Iterator[tuple[str, Sum]]:
    names = pa.array([day] * len(table)) if by == "day" else table[by]
    is_error = pc.cast(pc.greater_equal(table["status"], 400), pa.int64())
    counted = table.append_column("name", names).append_column("errors", is_error)
    summed = [one.name for one in fields(Sum) if one.name != "requests"]
    grouped = counted.group_by("name").aggregate(
        [("time", "count"), *((name, "sum") for name in summed)]
    )
    for row in grouped.to_pylist():
        yield row["name"], Sum(row["time_count"], **{name: row[f"{name}_sum"] for name in summed})


def _find_months(now: float) -> tuple[str, str]:
    """This month and the one before, whose last records may still come."""
    today = datetime.fromtimestamp(now, UTC)
    return day_of(now)[:7], (today.replace(day=1) - timedelta(days=1)).strftime("%Y-%m")


def _read_month(store: Store, month: str) -> Counter[str]:
    try:
        return Counter(json.loads(store.read(_month_key(month))))
    except Missing:
        return Counter()
    except (ValueError, TypeError) as error:
        raise HeliostatError(
            f"{store.uri}/{_month_key(month)} is not the sums of a month: delete it, and budgets "
            "of the month begin anew"
        ) from error


def _month_key(month: str) -> str:
    return f"{PREFIX}months/{month}.json"
