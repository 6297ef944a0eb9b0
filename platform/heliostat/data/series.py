"""Series as raw data: .ts files as sktime has them, a case a row, with any number of channels.

A header of lines `@key value` ends with `@data`. A case is a line: its channels divided by ':', the
values of a channel by ',', '?' where one is missing, and last its label. A missing value is stored
as NaN and encoded as the mean of its channel, as in a table. Steps at a case's end that miss every
channel only pad it to the length of others, and are cut.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from heliostat.data.cells import clean_text, parse_number, shorten_number
from heliostat.data.features import SERIES
from heliostat.data.instances import MAX_FLOAT32
from heliostat.data.raw import (
    SURROGATES,
    Form,
    Found,
    SeriesLayout,
    Source,
    Survey,
    Unit,
    Unusable,
    open_raw,
    raw_rows,
    sort_labels,
    tell_unusable,
)
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec
from heliostat.storage import Store

BATCH_ROWS = 512
CLASS, TARGET = "class", "target"


def _split_files(source: Source) -> list[Unit]:
    return [{"key": entry.key} for entry in source.entries]


def _survey_file(store: Store, unit: Unit, data: DataSpec) -> Found:
    """How many cases there are, how long they are, and their labels."""
    rows, steps, longest, channels, labels = 0, 0, 0, 0, set[str]()
    unusable = Unusable()
    with _open_cases(store, unit["key"]) as (cases, kind):
        for case in cases:
            texts, label = _split_case(case)
            channels = channels or len(texts)
            values, problem = _parse_case(texts, channels)
            unusable.add(f"{unit['key']}#{rows}", problem)
            rows += 1
            if not problem:
                steps += len(values)
                longest = max(longest, len(values))
            if label and data.task != "regression":
                labels.add(label)
    return {
        "key": unit["key"],
        "rows": rows,
        "steps": steps,
        "longest": longest,
        "channels": channels,
        "labels": sorted(labels),
        "unusable": unusable.count,
        "example": unusable.example,
        "kind": kind,
    }


def _settle_files(source: Source, found: list[Found], data: DataSpec) -> Survey:
    by_channels = {part["channels"]: part["key"] for part in found if part["rows"]}
    if len(by_channels) > 1:
        listed = ", ".join(f"{key} has {count}" for count, key in sorted(by_channels.items()))
        raise HeliostatError(f"the files under {source.store.uri} differ in channels: {listed}")
    length = max(part["longest"] for part in found)
    unusable = tell_unusable(found, source.store.uri)
    if not length:
        raise HeliostatError(unusable or f"no case under {source.store.uri}")
    (channels,) = by_channels
    rows, steps = (sum(part[name] for part in found) for name in ("rows", "steps"))
    labels = {label for part in found for label in part["labels"]}
    is_regression, why_task = _choose_task(found, data)
    return Survey(
        SeriesLayout(length, channels, (TARGET,) if is_regression else ()),
        () if is_regression else sort_labels(labels, source.store.uri, unusable),
        rows,
        4 * channels * steps / rows,
        (
            *why_task,
            f"series of up to {length:,} steps - the longest of {rows:,}",
            f"channels {channels}",
        ),
    )


def _choose_task(found: list[Found], data: DataSpec) -> tuple[bool, list[str]]:
    """Whether numbers are predicted, and why if only the headers say so."""
    if data.task != "auto" or any(part["kind"] != TARGET for part in found):
        return data.task == "regression", []
    return True, ["task regression - @targetLabel is true"]


def _read_file(store: Store, unit: Unit, layout: SeriesLayout) -> Iterator[pa.Table]:
    key, first = unit["key"], 0
    with _open_cases(store, key, layout.labelled) as (cases, kind):
        while batch := list(islice(cases, BATCH_ROWS)):
            ids = [f"{key}#{first + row}" for row in range(len(batch))]
            first += len(batch)
            split = [_split_case(case, kind is not None) for case in batch]
            parsed = [_parse_case(texts, layout.channels) for texts, _ in split]
            labels = [label for _, label in split]
            problems = [
                problem or _find_problem(len(values), label, layout)
                for (values, problem), label in zip(parsed, labels, strict=True)
            ]
            payload = {SERIES: pa.array([v.ravel() for v, _ in parsed], layout.fields[SERIES])}
            targets = map(_to_number, labels) if layout.targets else labels
            yield raw_rows(layout, ids, [key] * len(ids), list(targets), problems, payload)


@contextmanager
def _open_cases(
    store: Store, key: str, labelled: bool = True
) -> Iterator[tuple[Iterator[str], str | None]]:
    """The lines of a file below its header, and the kind of their labels, None without."""
    with open_raw(store, key) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
        lines = (line.strip() for line in text)
        content = (line for line in lines if line and not line.startswith("#"))
        place = f"{store.uri}/{key}"
        kind = _read_header(content, place)
        if labelled and kind is None:
            raise HeliostatError(
                f"{place} has no labels: @classLabel or @targetLabel must be true, and the last "
                "field of a case its label"
            )
        yield content, kind


def _read_header(lines: Iterator[str], place: str) -> str | None:
    """CLASS or TARGET if the last field of a case is its label."""
    header: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(" ")
        header[key.lower()] = value.strip().lower()
        if key.lower() == "@data":
            break
        if not key.startswith("@"):
            raise HeliostatError(
                f"{place} is not a .ts file of series: it has {line[:40]!r} "
                "where a line @key or @data is expected"
            )
    if "@data" not in header:
        raise HeliostatError(f"{place} is not a .ts file of series: it has no line @data")
    if header.get("@timestamps", "false") != "false":
        raise HeliostatError(f"{place} has time stamps: give values at equal steps without them")
    keys = {CLASS: "@classlabel", TARGET: "@targetlabel"}
    said = (kind for kind, key in keys.items() if header.get(key, "").startswith("true"))
    return next(said, None)


def _split_case(case: str, has_label: bool = True) -> tuple[list[str], str | None]:
    """The texts of the channels and the label, None if it is missing or not UTF-8 text."""
    *texts, label = case.split(":") if has_label else (*case.split(":"), "")
    text = None if SURROGATES.search(label) else clean_text(label)
    return texts, text and shorten_number(text)


def _parse_case(texts: list[str], channels: int) -> tuple[NDArray[np.float32], str | None]:
    """(steps, channels) with NaN where missing, or what is wrong with it."""
    nothing = np.empty((0, channels), np.float32)
    if len(texts) != channels:
        return nothing, f"{len(texts)} channels instead of {channels}"
    if any("_" in text for text in texts):  # which numpy takes for nothing
        return nothing, "a value is not a number"
    try:
        parsed = [np.array(text.replace("?", "nan").split(","), np.float64) for text in texts]
    except ValueError:
        return nothing, "a value is not a number"
    if len({len(values) for values in parsed}) > 1:
        return nothing, "channels of different lengths"
    values = np.stack(parsed, axis=1)
    if (abs(values) > MAX_FLOAT32).any():
        return nothing, f"a value is not a number of at most {MAX_FLOAT32:g}"
    known = np.flatnonzero(~np.isnan(values).all(axis=1))
    if not len(known):
        return nothing, "no values"
    return values[: known[-1] + 1].astype(np.float32), None


def _find_problem(steps: int, label: str | None, layout: SeriesLayout) -> str | None:
    if steps > layout.length:
        return f"{steps:,} steps, the model reads {layout.length:,}"
    if not layout.labelled:
        return None
    if label is None:
        return "the label is missing or not UTF-8 text"
    if layout.targets and parse_number(label) is None:
        return "the label is not a number"
    return None


def _to_number(label: str | None) -> float | None:
    return None if label is None else parse_number(label)


TASKS = ("classification", "regression")
SERIES_FILES = Form(_split_files, _survey_file, _settle_files, _read_file, TASKS)
