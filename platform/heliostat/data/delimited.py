"""CSV as raw data: rows of texts, whose columns are numbers where most of their values are."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, islice

import pyarrow as pa

from heliostat.data.cells import parse_number
from heliostat.data.columns import add_labels, to_numbers
from heliostat.data.raw import (
    SURROGATES,
    Form,
    Found,
    Source,
    Survey,
    TableLayout,
    Unit,
    Unusable,
    open_raw,
)
from heliostat.data.records import Record, read_records
from heliostat.data.tables import (
    BATCH_ROWS,
    TASKS,
    Batch,
    check_label,
    check_names,
    check_present,
    clean,
    label_of,
    settle,
    split_tables,
)
from heliostat.data.tally import Tally, add_up, drop_words
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec
from heliostat.storage import Store

DELIMITERS = (",", ";", "\t", "|", "::")


def _survey(store: Store, unit: Unit, data: DataSpec) -> Found:
    """How many values of each column there are, and how many of them are numbers."""
    rows, labels, unusable = 0, set[str](), Unusable()
    with open_csv(store, unit["key"], data.header) as (header, batches):
        check_label(header, data, f"{store.uri}/{unit['key']}")
        label = label_of(data)
        tallies = {name: Tally() for name in header}
        for batch in batches:
            rows += len(batch.rows)
            for row, problem in zip(batch.rows, batch.problems, strict=True):
                unusable.add(f"{unit['key']}#{row}", problem)
            for name, column in batch.columns.items():
                tallies[name].add(column, *to_numbers(column))
            if isinstance(label, str):
                labels = add_labels(labels, drop_words(batch.columns[label]))
    return {
        "key": unit["key"],
        "types": dict.fromkeys(header, ("text", "text")),
        "tallies": {name: asdict(tally) for name, tally in tallies.items()},
        "labels": sorted(labels),
        "rows": rows,
        "unusable": unusable.count,
        "example": unusable.example,
    }


def _settle(source: Source, found: list[Found], data: DataSpec) -> Survey:
    tallies = {
        name: add_up(part["tallies"][name] for part in found if name in part["tallies"])
        for name in found[0]["types"]
    }
    kinds = {name: tally.kind for name, tally in tallies.items()}
    return settle(source, found, kinds, data, tallies)


def _read(store: Store, unit: Unit, layout: TableLayout) -> Iterator[pa.Table]:
    with open_csv(store, unit["key"], layout.header) as (header, batches):
        check_present(layout, header, f"{store.uri}/{unit['key']}")
        for batch in batches:
            columns = batch.columns
            if layout.label:  # a model that was trained knows which words are values
                columns = {name: drop_words(column) for name, column in columns.items()}
            yield clean(replace(batch, columns=columns), unit["key"], layout)


@contextmanager
def open_csv(
    store: Store, key: str, names: Sequence[str] = ()
) -> Iterator[tuple[list[str], Iterator[Batch]]]:
    """The names of the columns, those given or those of the first line, and the rows as text."""
    with open_raw(store, key) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        line = text.readline()
        delimiter = max(DELIMITERS, key=line.count)
        records = read_records(chain([line], text), delimiter, len(names))
        header = list(names) or _read_header(records, f"{store.uri}/{key}")
        _check_header(header, f"{store.uri}/{key}")
        yield header, _batches(header, records)


def _read_header(records: Iterator[Record], place: str) -> list[str]:
    first = next(records, Record([]))
    if first.problem:
        raise HeliostatError(f"the names of the columns of {place}: {first.problem}")
    return [name.strip() for name in first.cells]


def _check_header(header: list[str], place: str) -> None:
    names = [name for name in header if name]
    if not names:
        raise HeliostatError(f"{place} is empty: its first line must name the columns")
    if any(SURROGATES.search(name) or "\0" in name for name in names):
        raise HeliostatError(f"{place} is not UTF-8 text: save it as UTF-8")
    check_names(names, place)
    if all(parse_number(name) is not None for name in names):
        raise HeliostatError(
            f"{place} begins with {names[0]}: its first line must name the columns, or "
            "data.header in its place"
        )


def _batches(header: list[str], records: Iterator[Record]) -> Iterator[Batch]:
    numbered = enumerate(record for record in records if record.cells or record.problem)
    while batch := list(islice(numbered, BATCH_ROWS)):
        problems = [_find_problem(record, len(header)) for _, record in batch]
        blank = [""] * len(header)
        cells = [
            blank if problem else record.cells
            for (_, record), problem in zip(batch, problems, strict=True)
        ]
        columns = map(pa.array, zip(*cells, strict=True))
        rows = [row for row, _ in batch]
        yield Batch(rows, problems, dict(zip(header, columns, strict=True)))


def _find_problem(record: Record, fields: int) -> str | None:
    if record.problem:
        return record.problem
    if len(record.cells) != fields:
        return f"{len(record.cells)} fields instead of {fields}"
    return "not UTF-8 text" if SURROGATES.search("".join(record.cells)) else None


CSV = Form(split_tables, _survey, _settle, _read, TASKS)
