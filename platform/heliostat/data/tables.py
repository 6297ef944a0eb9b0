"""Tables as raw data: CSV and Parquet, whose columns are numbers, categories, ids or labels."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import partial
from itertools import chain, islice
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heliostat.data.cells import (
    MAX_NUMBER,
    are_quantities,
    are_ratings,
    parse_number,
    shorten_number,
    strip_text,
    write_number,
)
from heliostat.data.features import COLUMN_PREFIX, NUMBERS
from heliostat.data.ranged import RangedFile
from heliostat.data.raw import (
    MAX_LABELS,
    SURROGATES,
    Form,
    Found,
    Source,
    Survey,
    TableLayout,
    Unit,
    Unusable,
    choose_kind,
    open_raw,
    raw_rows,
    sort_labels,
    tell_unusable,
)
from heliostat.data.records import Record, read_records
from heliostat.data.shards import pack_rows
from heliostat.data.tally import Tally, add_up, drop_words
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec
from heliostat.storage import Store

BATCH_ROWS = 4096
DELIMITERS = (",", ";", "\t", "|", "::")
MAX_LISTED = 20
MAX_SHOWN = 40
NUMBER_TYPES = ("is_integer", "is_floating", "is_decimal")
NUMERIC_TYPES = (*NUMBER_TYPES, "is_timestamp", "is_date")
TEXT_TYPES = ("is_string", "is_large_string", "is_string_view")
CATEGORY_OR_NUMERIC = ("numeric", "category")
NULL = "null"
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
CATEGORY_TYPES = (*TEXT_TYPES, "is_boolean", "is_null")


@dataclass(frozen=True)
class Batch:
    """Rows of one object: their numbers in it, their problems so far, their columns as found."""

    rows: list[int]
    problems: list[str | None]
    columns: dict[str, pa.Array]


def _split_tables(source: Source) -> list[Unit]:
    return [{"key": entry.key} for entry in source.entries]


def _settle(
    source: Source,
    found: list[Found],
    kinds: dict[str, str],
    data: DataSpec,
    tallies: dict[str, Tally] | None = None,
) -> Survey:
    """What follows from the surveys of all files and the kind of each column by its content."""
    _check_same_columns(source.store.uri, found)
    kept = _keep_columns(kinds, data)
    rows = sum(part["rows"] for part in found)
    if not rows:
        raise HeliostatError(
            f"the tables under {source.store.uri} have names of columns but no row below them"
        )
    labels = {label for part in found for label in part["labels"]}
    label, why_task = _choose_target(data, labels)
    place = f"the column {label} of {source.store.uri}"
    layout = TableLayout(label, kept, data.header)
    read_otherwise = list(_describe_texts(layout, tallies or {}, data))
    why_not = "; ".join(filter(None, (tell_unusable(found, source.store.uri), *read_otherwise[:1])))
    return Survey(
        layout,
        sort_labels(labels, place, why_not) if isinstance(label, str) else (),
        rows,
        sum(entry.size for entry in source.entries) / max(rows, 1),
        (*why_task, *_describe_columns(kinds, kept, data), *read_otherwise),
    )


def _describe_texts(
    layout: TableLayout, tallies: dict[str, Tally], data: DataSpec
) -> Iterator[str]:
    """What may be meant otherwise than it is read, first of all in the label."""
    for name in (layout.label, *layout.texts) if isinstance(layout.label, str) else layout.texts:
        tally = tallies.get(name, Tally())
        if tally.words:
            yield tally.tell_words(name)
        if tally.has_commas and name in layout.texts and name not in data.columns:
            yield tally.tell_commas(name)


def _choose_target(data: DataSpec, labels: set[str]) -> tuple[str | tuple[str, ...], list[str]]:
    """What `label_of` says, or numbers where `labels` are no classes, and then why."""
    label = label_of(data)
    if data.task != "auto" or not isinstance(label, str):
        return label, []
    if "id" in data.columns.values() and are_ratings(labels):
        why = "of rows with ids are more than two numbers"
    elif are_quantities(labels):
        why = "are numbers, and some are fractions"
    else:
        return label, []
    return (label,), [
        f"task regression - the labels in {label} {why}; set data.task to classification to take "
        "each for a class"
    ]


def label_of(data: DataSpec) -> str | tuple[str, ...]:
    """The column of classes, or the columns of numbers.

    Whole numbers in one column are classes as often as they are quantities (0 and 1, the digits, a
    postal code), and nothing in them tells which: task auto takes one column for classes, until a
    survey finds fractions there or ratings, and several for numbers, since classes can only be one.

    Raises:
        HeliostatError: several columns cannot be classes.
    """
    names = (data.label,) if isinstance(data.label, str) else data.label or ()
    if len(set(names)) < len(names):
        raise HeliostatError(f"data.label is {', '.join(names)}: name each column once")
    if data.task == "regression" or (data.task == "auto" and len(names) > 1):
        return names
    if len(names) > 1:
        raise HeliostatError(
            f"data.label is {', '.join(names)}: classes are one column, set data.task=regression "
            "if these are numbers"
        )
    return names[0] if names else ""


def _check_label(names: list[str], data: DataSpec, place: str) -> list[str]:
    """The columns of the label, which must be among `names`."""
    label = label_of(data)
    wanted = [label] if isinstance(label, str) else list(label)
    if wanted and all(name and name in names for name in wanted):
        return wanted
    given = ", ".join(wanted) if data.label else None
    raise HeliostatError(
        f"data.label is {given!r}: set it to the column of {place} that is to be predicted, "
        f"one of {_list_names(list(filter(None, names)))}{_find_folder(wanted, place)}, or "
        "data.source to one file of several"
    )


def _find_folder(wanted: list[str], place: str) -> str:
    """A hint where a folder has the name of a column, as in partitioned data sets."""
    for folder in place.split("/"):
        name, is_partition, _ = folder.partition("=")
        if is_partition and name in wanted:
            return f"; {folder} is only the name of a folder: write {name} into the files"
    return ""


def _list_names(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + ", ..." * (len(names) > MAX_LISTED)


def _check_same_columns(uri: str, found: list[Found]) -> None:
    """Raises HeliostatError unless all have the same columns, each of one family or null."""
    first = found[0]
    typed: dict[str, Found] = {}  # the first part in which a column is not null
    for part in found:
        if part is not first and part["types"] == first["types"]:
            continue
        if different := part["types"].keys() ^ first["types"].keys():
            raise _differ(uri, first, part, different)
        for name, (family, _) in part["types"].items():
            other = typed.setdefault(name, part) if family != NULL else part
            if family != other["types"][name][0]:
                raise _differ(uri, other, part, {name})


def _differ(uri: str, one: Found, other: Found, names: set[str]) -> HeliostatError:
    return HeliostatError(
        f"the tables under {uri} differ: {one['key']} has {_list_types(one, names)} "
        f"where {other['key']} has {_list_types(other, names)}"
    )


def _list_types(part: Found, names: set[str]) -> str:
    types = sorted((name, kind) for name, (_, kind) in part["types"].items() if name in names)
    return ", ".join(f"{name} ({kind})" for name, kind in types) or "nothing"


def _keep_columns(kinds: dict[str, str], data: DataSpec) -> dict[str, str]:
    label = label_of(data)
    labels = (label,) if isinstance(label, str) else label
    features = {
        name: kind
        for name, kind in kinds.items()
        if name not in ("", *labels) and not _is_index(name, data)
    }
    if unknown := data.columns.keys() - features.keys():
        raise HeliostatError(
            f"data.columns names {', '.join(sorted(unknown))}, but the columns beside the label "
            f"are {_list_names(list(features))}"
        )
    chosen = features | data.columns
    kept = _order_ids({name: kind for name, kind in chosen.items() if kind != "ignore"}, data)
    for name in kept:
        if features[name] not in CATEGORY_OR_NUMERIC:
            raise HeliostatError(
                f"the column {name} has the type {features[name]}, which is neither a number nor "
                f"a text: set {choose_kind(name, 'ignore')}"
            )
    if not kept:
        raise HeliostatError(
            f"{data.source} has no column beside {', '.join(labels)} to learn from"
        )
    return kept


def _order_ids(kept: dict[str, str], data: DataSpec) -> dict[str, str]:
    """The id columns as data.columns lists them, users first, in the places that the files give."""
    ids = iter([name for name in data.columns if kept.get(name) == "id"])
    return dict((next(ids), kind) if kind == "id" else (name, kind) for name, kind in kept.items())


def _is_index(name: str, data: DataSpec) -> bool:
    """Whether pandas wrote the numbers of its rows there, and nobody asked for them."""
    return PANDAS_INDEX.fullmatch(name) is not None and name not in data.columns


def _describe_columns(kinds: dict[str, str], kept: dict[str, str], data: DataSpec) -> Iterator[str]:
    for kind in (*CATEGORY_OR_NUMERIC, "id"):
        names = [name for name in kept if kept[name] == kind]
        if names:
            yield f"{kind} columns: {_list_names(names)}; set data.columns to change it"
    if "" in kinds:
        yield "a column without a name is ignored"
    for name in kinds:
        if _is_index(name, data):
            yield f"the column {name} is ignored, as it is the index of pandas"


# --- Cleaning ------------------------------------------------------------------------------------


def _clean(batch: Batch, key: str, layout: TableLayout) -> pa.Table:
    """The rows of a batch in their final types; what cannot be used is named as a problem."""
    problems = list(batch.problems)
    labels = _clean_labels(batch, layout, problems)
    numbers = np.empty((len(batch.rows), len(layout.numeric)), "<f8")
    for place, name in enumerate(layout.numeric):
        advice = f", mend it or set {choose_kind(name, 'category')}" if layout.label else ""
        column = batch.columns[name]
        numbers[:, place] = _clean_numbers(column, f"column {name}", problems, advice)
    payload = {NUMBERS: pack_rows(numbers)} if layout.numeric else {}
    for name in layout.texts:
        to_texts = to_names if layout.kinds[name] == "id" else _to_texts
        payload[COLUMN_PREFIX + name] = to_texts(batch.columns[name])
    ids = [f"{key}#{row}" for row in batch.rows]
    return raw_rows(layout, ids, [key] * len(ids), labels, problems, payload)


def _clean_labels(batch: Batch, layout: TableLayout, problems: list[str | None]) -> pa.Array:
    if not layout.label:
        return pa.nulls(len(batch.rows), pa.string())
    if isinstance(layout.label, str):
        labels = to_names(batch.columns[layout.label])
        _mark(problems, _where_null(labels), "the label is missing")
        return labels
    numbers = np.empty((len(batch.rows), len(layout.label)))
    advice = ", mend it or set data.task=classification if these are classes"
    advice = advice if len(layout.label) == 1 else ""
    for place, name in enumerate(layout.label):
        column = batch.columns[name]
        numbers[:, place] = _clean_numbers(column, f"label {name}", problems, advice)
        _mark(problems, np.isnan(numbers[:, place]), f"label {name} is missing")
    flat = pa.array(numbers.ravel())
    return (
        flat
        if len(layout.label) == 1
        else pa.FixedSizeListArray.from_arrays(flat, len(layout.label))
    )


def _check_present(layout: TableLayout, names: list[str], place: str) -> None:
    for name in layout.kinds:
        if name not in names:
            raise HeliostatError(f"{place} has no column {name}, it has {_list_names(names)}")


def _clean_numbers(
    column: pa.Array, place: str, problems: list[str | None], advice: str = ""
) -> NDArray[np.float64]:
    """Numbers, NaN where missing; what else is there is shown in a problem, with the `advice`."""
    values, wrong = _to_numbers(column)
    for index in np.flatnonzero(_to_mask(wrong)):
        shown = repr(str(column[index].as_py())[:MAX_SHOWN])
        problem = f"{place} is not a number of at most {MAX_NUMBER:g}: {shown}{advice}"
        problems[index] = problems[index] or problem
    return cast(NDArray[np.float64], values.to_numpy(zero_copy_only=False))


def _where_null(column: pa.Array) -> NDArray[np.bool_]:
    return _to_mask(column.is_null())


def _to_mask(column: pa.Array) -> NDArray[np.bool_]:
    return cast(NDArray[np.bool_], column.to_numpy(zero_copy_only=False))


def _mark(problems: list[str | None], where: NDArray[np.bool_], problem: str) -> None:
    for index in np.flatnonzero(where):
        problems[index] = problems[index] or problem


def _to_texts(column: pa.Array) -> pa.Array:
    """Strings, null where missing."""
    if pa.types.is_floating(column.type):
        texts = [_number_text(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string())
    if pa.types.is_decimal(column.type):
        texts = [_decimal_text(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string())
    if not _is_one_of(column.type, TEXT_TYPES):
        return column.cast(pa.string())
    stripped = [value if value is None else strip_text(value) for value in column.to_pylist()]
    return pa.array(stripped, pa.string())


def _number_text(value: float | None) -> str | None:
    if value is None or math.isnan(value):
        return None
    return write_number(value)


def _decimal_text(value: Decimal | None) -> str | None:
    """As that of the same number in another type."""
    if value is None:
        return None
    whole, point, part = f"{value:f}".partition(".")
    return whole + (point + part).rstrip("0").rstrip(".")


def to_names(column: pa.Array) -> pa.Array:
    """Texts in which a whole number is written without a decimal point: of labels and ids."""
    texts = _to_texts(column).to_pylist()
    return pa.array([text and shorten_number(text) for text in texts], pa.string())


def _to_numbers(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Numbers, null where missing, and where there is something that is no finite number."""
    if _is_one_of(column.type, TEXT_TYPES):
        texts = drop_words(_to_texts(column))
        parsed = [text if text is None else parse_number(text) for text in texts.to_pylist()]
        numbers = pa.array(parsed, pa.float64())
        return numbers, pc.and_(texts.is_valid(), numbers.is_null())
    numbers = _cast_numbers(column)
    numbers = pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
    return numbers, pc.fill_null(pc.greater(pc.abs(numbers), MAX_NUMBER), False)


def _cast_numbers(column: pa.Array) -> pa.Array:
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        microseconds = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        return pc.divide(microseconds.cast(pa.float64(), safe=False), 1e6)
    return column.cast(pa.float64(), safe=False)


def _is_one_of(kind: pa.DataType, predicates: tuple[str, ...]) -> bool:
    return any(getattr(pa.types, predicate)(kind) for predicate in predicates)


def _distinct(labels: set[str], column: pa.Array) -> set[str]:
    """`labels` and those in `column`; it stops growing where they cannot be classes any more."""
    if len(labels) > MAX_LABELS:
        return labels
    return labels | set(filter(None, pc.unique(to_names(column)).to_pylist()))


# --- CSV -----------------------------------------------------------------------------------------


def _survey_csv(store: Store, unit: Unit, data: DataSpec) -> Found:
    """How many values of each column there are, and how many of them are numbers."""
    rows, labels, unusable = 0, set[str](), Unusable()
    with open_csv(store, unit["key"], data.header) as (header, batches):
        _check_label(header, data, f"{store.uri}/{unit['key']}")
        label = label_of(data)
        tallies = {name: Tally() for name in header}
        for batch in batches:
            rows += len(batch.rows)
            for row, problem in zip(batch.rows, batch.problems, strict=True):
                unusable.add(f"{unit['key']}#{row}", problem)
            for name, column in batch.columns.items():
                tallies[name].add(column, *_to_numbers(column))
            if isinstance(label, str):
                labels = _distinct(labels, drop_words(batch.columns[label]))
    return {
        "key": unit["key"],
        "types": dict.fromkeys(header, ("text", "text")),
        "tallies": {name: asdict(tally) for name, tally in tallies.items()},
        "labels": sorted(labels),
        "rows": rows,
        "unusable": unusable.count,
        "example": unusable.example,
    }


def _settle_csv(source: Source, found: list[Found], data: DataSpec) -> Survey:
    tallies = {
        name: add_up(part["tallies"][name] for part in found if name in part["tallies"])
        for name in found[0]["types"]
    }
    kinds = {name: tally.kind for name, tally in tallies.items()}
    return _settle(source, found, kinds, data, tallies)


def _read_csv(store: Store, unit: Unit, layout: TableLayout) -> Iterator[pa.Table]:
    with open_csv(store, unit["key"], layout.header) as (header, batches):
        _check_present(layout, header, f"{store.uri}/{unit['key']}")
        for batch in batches:
            columns = batch.columns
            if layout.label:  # a model that was trained knows which words are values
                columns = {name: drop_words(column) for name, column in columns.items()}
            yield _clean(replace(batch, columns=columns), unit["key"], layout)


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
    _check_names(names, place)
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


# --- Parquet -------------------------------------------------------------------------------------


def _survey_parquet(store: Store, unit: Unit, data: DataSpec) -> Found:
    """Names and types of the columns; only the label's values are read."""
    with open_parquet(store, unit["key"]) as file:
        types = {field.name: _plain_type(field.type) for field in file.schema_arrow}
        place = f"{store.uri}/{unit['key']}"
        _check_names(file.schema_arrow.names, place)
        for name in _check_label(list(types), data, place):
            if _kind_of(types[name]) not in CATEGORY_OR_NUMERIC:
                raise HeliostatError(f"the label {name} of {place} is neither a number nor a text")
        labels = set[str]()
        if isinstance(label := label_of(data), str):
            for batch in file.iter_batches(BATCH_ROWS, columns=[label]):
                labels = _distinct(labels, plain(batch.column(label)))
    return {
        "key": unit["key"],
        "types": {
            name: (_family_of(kind), str(kind))
            for name, kind in types.items()
            if not _is_index(name, data)
        },
        "kinds": {name: _kind_of(kind) for name, kind in types.items()},
        "labels": sorted(labels),
        "rows": file.metadata.num_rows,
        "unusable": 0,
        "example": "",
    }


def _check_names(names: list[str], place: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise HeliostatError(f"{place} names the column {twice} twice: rename one")


def _settle_parquet(source: Source, found: list[Found], data: DataSpec) -> Survey:
    kinds: dict[str, str] = {}
    for part in found:
        kinds |= {
            name: kind
            for name, kind in part["kinds"].items()
            if name not in kinds or part["types"].get(name, (NULL,))[0] != NULL
        }
    return _settle(source, found, kinds, data)


def _read_parquet(store: Store, unit: Unit, layout: TableLayout) -> Iterator[pa.Table]:
    labels = [layout.label] if isinstance(layout.label, str) else layout.label
    names = [*labels, *layout.kinds]
    start = 0
    with open_parquet(store, unit["key"]) as file:
        _check_present(layout, file.schema_arrow.names, f"{store.uri}/{unit['key']}")
        for batch in file.iter_batches(BATCH_ROWS, columns=names):
            rows = list(range(start, start := start + batch.num_rows))
            columns = {name: plain(batch.column(name)) for name in names}
            yield _clean(Batch(rows, [None] * len(rows), columns), unit["key"], layout)


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


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def plain(column: pa.Array) -> pa.Array:
    """The values themselves; raises ArrowInvalid if one says that it is a text and is not UTF-8."""
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values.validate(full=True)
    return values


def _family_of(kind: pa.DataType) -> str:
    """The same for types whose values mean the same in a table."""
    if _is_one_of(kind, NUMBER_TYPES):
        return "number"
    return "text" if _is_one_of(kind, TEXT_TYPES) else str(kind)


def _kind_of(kind: pa.DataType) -> str:
    """numeric, category, or the name of a type that is neither."""
    if _is_one_of(kind, NUMERIC_TYPES):
        return "numeric"
    return "category" if _is_one_of(kind, CATEGORY_TYPES) else str(kind)


TASKS = ("classification", "regression")
CSV = Form(_split_tables, _survey_csv, _settle_csv, _read_csv, TASKS)
PARQUET = Form(_split_tables, _survey_parquet, _settle_parquet, _read_parquet, TASKS)
