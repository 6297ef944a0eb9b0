"""Tables as raw data: their columns are numbers, categories, ids or labels."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.data.cells import MAX_NUMBER, are_quantities, are_ratings
from heliostat.data.columns import CATEGORY_OR_NUMERIC, to_names, to_numbers, to_texts
from heliostat.data.features import COLUMN_PREFIX, NUMBERS
from heliostat.data.raw import (
    Found,
    Source,
    Survey,
    TableLayout,
    Unit,
    choose_kind,
    raw_rows,
    sort_labels,
    tell_unusable,
)
from heliostat.data.shards import pack_rows
from heliostat.data.tally import Tally
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec

BATCH_ROWS = 4096
MAX_LISTED = 20
MAX_SHOWN = 40
NULL = "null"
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
TASKS = ("classification", "regression")


@dataclass(frozen=True)
class Batch:
    """Rows of one object: their numbers in it, their problems so far, their columns as found."""

    rows: list[int]
    problems: list[str | None]
    columns: dict[str, pa.Array]


def split_tables(source: Source) -> list[Unit]:
    return [{"key": entry.key} for entry in source.entries]


def settle(
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


def check_label(names: list[str], data: DataSpec, place: str) -> list[str]:
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
        if name not in ("", *labels) and not is_index(name, data)
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


def is_index(name: str, data: DataSpec) -> bool:
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
        if is_index(name, data):
            yield f"the column {name} is ignored, as it is the index of pandas"


def check_names(names: list[str], place: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise HeliostatError(f"{place} names the column {twice} twice: rename one")


def clean(batch: Batch, key: str, layout: TableLayout) -> pa.Table:
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
        write = to_names if layout.kinds[name] == "id" else to_texts
        payload[COLUMN_PREFIX + name] = write(batch.columns[name])
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


def check_present(layout: TableLayout, names: list[str], place: str) -> None:
    for name in layout.kinds:
        if name not in names:
            raise HeliostatError(f"{place} has no column {name}, it has {_list_names(names)}")


def _clean_numbers(
    column: pa.Array, place: str, problems: list[str | None], advice: str = ""
) -> NDArray[np.float64]:
    """Numbers, NaN where missing; what else is there is shown in a problem, with the `advice`."""
    values, wrong = to_numbers(column)
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
