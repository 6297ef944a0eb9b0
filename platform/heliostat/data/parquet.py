"""Parquet tables as raw data: the files say which columns are numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.data.columns import (
    CATEGORY_OR_NUMERIC,
    add_labels,
    family_of,
    kind_of,
    plain,
    plain_type,
)
from heliostat.data.ranged import RangedFile
from heliostat.data.raw import Form, Found, Source, Survey, TableLayout, Unit
from heliostat.data.tables import (
    BATCH_ROWS,
    NULL,
    TASKS,
    Batch,
    check_label,
    check_names,
    check_present,
    clean,
    is_index,
    label_of,
    settle,
    split_tables,
)
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec
from heliostat.storage import Store


def _survey(store: Store, unit: Unit, data: DataSpec) -> Found:
    """Names and types of the columns; only the label's values are read."""
    with open_parquet(store, unit["key"]) as file:
        types = {field.name: plain_type(field.type) for field in file.schema_arrow}
        place = f"{store.uri}/{unit['key']}"
        check_names(file.schema_arrow.names, place)
        for name in check_label(list(types), data, place):
            if kind_of(types[name]) not in CATEGORY_OR_NUMERIC:
                raise HeliostatError(f"the label {name} of {place} is neither a number nor a text")
        labels = set[str]()
        if isinstance(label := label_of(data), str):
            for batch in file.iter_batches(BATCH_ROWS, columns=[label]):
                labels = add_labels(labels, plain(batch.column(label)))
    return {
        "key": unit["key"],
        "types": {
            name: (family_of(kind), str(kind))
            for name, kind in types.items()
            if not is_index(name, data)
        },
        "kinds": {name: kind_of(kind) for name, kind in types.items()},
        "labels": sorted(labels),
        "rows": file.metadata.num_rows,
        "unusable": 0,
        "example": "",
    }


def _settle(source: Source, found: list[Found], data: DataSpec) -> Survey:
    kinds: dict[str, str] = {}
    for part in found:
        kinds |= {
            name: kind
            for name, kind in part["kinds"].items()
            if name not in kinds or part["types"].get(name, (NULL,))[0] != NULL
        }
    return settle(source, found, kinds, data)


def _read(store: Store, unit: Unit, layout: TableLayout) -> Iterator[pa.Table]:
    labels = [layout.label] if isinstance(layout.label, str) else layout.label
    names = [*labels, *layout.kinds]
    start = 0
    with open_parquet(store, unit["key"]) as file:
        check_present(layout, file.schema_arrow.names, f"{store.uri}/{unit['key']}")
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            rows = list(range(start, start := start + batch.num_rows))
            columns = {name: plain(batch.column(name)) for name in names}
            yield clean(Batch(rows, [None] * len(rows), columns), unit["key"], layout)


@contextmanager
def open_parquet(store: Store, key: str) -> Iterator[pq.ParquetFile]:
    entry = store.stat(key)
    try:
        stream = RangedFile(entry.size if entry else 0, partial(store.read_range, key))
        with pq.ParquetFile(stream, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise HeliostatError(
            f"{store.uri}/{key} is not a readable Parquet file: {error}"
        ) from error


PARQUET = Form(split_tables, _survey, _settle, _read, TASKS)
