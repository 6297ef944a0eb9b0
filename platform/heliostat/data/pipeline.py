"""The Ray Data pipeline of `prepare`: survey, read, clean, shuffle and write all rows."""

import hashlib
import json
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from ray.data.context import DataContext, ShuffleStrategy
from ray.exceptions import OutOfDiskError

from heliostat import pools
from heliostat.data import delimited, images, parquet, series, text
from heliostat.data.manifest import Shard, data_key, holds
from heliostat.data.measure import measure, measure_numbers
from heliostat.data.raw import (
    Form,
    Found,
    Layout,
    Source,
    Survey,
    TextLayout,
    Unit,
    label_type,
    raw_schema,
)
from heliostat.data.shards import (
    REJECTED,
    cut_points,
    is_test_file,
    label_values,
    order_of,
    split_at,
    write_shard,
)
from heliostat.data.tokens import store_tokenizer
from heliostat.errors import HeliostatError, printable
from heliostat.spec import DataSpec, RunSpec
from heliostat.storage import Store

FORMS: dict[str, Form] = {
    "images": images.FILES,
    "idx": images.IDX,
    "csv": delimited.CSV,
    "parquet": parquet.PARQUET,
    "series": series.SERIES_FILES,
    "text": text.TEXTS,
}
MIB = 1024 * 1024
PROGRESS_SECONDS = 5.0
MAX_EXAMPLES = 1000
FAILED = REJECTED + 1

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """All that a worker needs to read, place and write rows."""

    source: Store
    form: str
    layout: Layout
    labels: tuple[str, ...]
    store: Store
    name: str
    data: DataSpec


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Ray Data for a job: quiet, and with a shuffle that gives exactly one block per range.

    The default shuffle may cut a range in two and starts new processes for every sort: 10 s where
    this one takes 1.

    Raises:
        HeliostatError: what does not fit the object stores does not fit a node's disk either.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    context.execution_options.label_selector = pools.select("data") or None
    try:
        with DataContext.current(context):
            yield
    except OutOfDiskError as error:
        raise HeliostatError(
            "the disk of a node is full, to which Ray moves what does not fit its object store: "
            "free space there, or use nodes with more memory or larger disks"
        ) from error


def _from_units(units: list[Unit]) -> ray.data.Dataset:
    items = [{"unit": json.dumps(unit)} for unit in units]
    return ray.data.from_items(items, override_num_blocks=len(items))


def take_survey(source: Source, data: DataSpec) -> Survey:
    """What all objects have in common: sizes, columns, labels, rows; its notes are printed."""
    form = FORMS[source.form]
    survey = form.settle(source, _ask(source, partial(_survey_unit, source.form, data)), data)
    for note in survey.notes:
        print(printable(note), flush=True)
    return survey


def _survey_unit(form: str, data: DataSpec, source: Store, unit: Unit) -> Found:
    return FORMS[form].survey(source, unit, data)


def learn(store: Store, source: Source, survey: Survey, data: DataSpec) -> Survey:
    """The survey of texts with their vocabulary, whose tokenizer is stored; any other as it is."""
    layout = survey.layout
    if not isinstance(layout, TextLayout):
        return survey
    if data.text.tokenizer:
        written, vocabulary, note = text.read_vocabulary(data.text.tokenizer)
    else:
        found = _ask(source, partial(text.sample_unit, data, layout))
        written, vocabulary, note = text.learn_vocabulary(found, layout, data)
    store_tokenizer(store, written)
    print(note, flush=True)
    known = replace(layout, vocabulary=vocabulary)
    return replace(survey, layout=known, notes=(*survey.notes, note))


def _ask(source: Source, question: Callable[[Store, Unit], Found]) -> list[Found]:
    """What `question` finds in each unit of the source, in an order that is always the same."""
    units = _from_units(FORMS[source.form].split(source))
    answers = units.map_batches(partial(_answer, source.store, question), batch_size=None)
    found = [(row["found"], _checked(row["found"])) for row in answers.iter_rows()]
    return [result for _, result in sorted(found, key=itemgetter(0))]


def _answer(
    source: Store, question: Callable[[Store, Unit], Found], batch: dict[str, Any]
) -> dict[str, list[str]]:
    return {"found": [_answer_unit(source, question, json.loads(unit)) for unit in batch["unit"]]}


def _answer_unit(source: Store, question: Callable[[Store, Unit], Found], unit: Unit) -> str:
    try:
        return json.dumps(question(source, unit))
    except HeliostatError as error:
        return json.dumps({"error": str(error)})


def _checked(result: str) -> dict[str, Any]:
    """A task's result; its error, which Ray would wrap and print with a traceback, is raised."""
    value: dict[str, Any] = json.loads(result)
    if "error" in value:
        raise HeliostatError(value["error"])
    return value


def write_shards(store: Store, source: Source, survey: Survey, spec: RunSpec) -> list[Outcome]:
    """Read, shuffle and write all rows; what became of them, shard by shard in their order."""
    plan = Plan(
        source.store, source.form, survey.layout, survey.labels, store, spec.name, spec.data
    )
    cuts = cut_points(_num_shards(source, survey, spec.data))
    outcomes: list[Outcome] = []
    with _progress(survey.rows) as tally:
        written = (
            _from_units(FORMS[source.form].split(source))
            .map_batches(partial(_read_units, plan, tally), batch_size=1)
            .sort(["order", "id"], boundaries=cuts[1:])
            .map_batches(partial(_write_block, plan), batch_size=None, batch_format="pyarrow")
        )
        for row in written.iter_rows():
            outcomes.append(_checked(row["outcome"]))
            if "shard" in outcomes[-1]:
                print(_describe_shard(outcomes[-1]["shard"]), flush=True)
    return sorted(outcomes, key=itemgetter("first"))


def _num_shards(source: Source, survey: Survey, data: DataSpec) -> dict[str, int]:
    """By split, so that a shard holds about `shard_mib`: from the listing and the survey alone."""
    stored = sum(entry.size for entry in source.entries)
    tested = sum(entry.size for entry in source.entries if is_test_file(entry.key, data.split))
    test = data.split.test if data.split.test_files is None else tested / max(stored, 1)
    validation = data.split.validation * (1 - (test if data.split.test_files else 0))
    shares = {"train": 1 - validation - test, "validation": validation, "test": test}
    shards = survey.rows * survey.row_bytes / (data.shard_mib * MIB)
    return {split: max(1, math.ceil(shards * share)) for split, share in shares.items()}


def _read_units(plan: Plan, tally: Any, batch: dict[str, Any]) -> Iterator[pa.Table]:
    read = FORMS[plan.form].read
    for unit in batch["unit"]:
        try:
            for rows in read(plan.source, json.loads(unit), plan.layout):
                yield _place(plan, rows)
                tally.add.remote(rows.num_rows)
        except HeliostatError as error:
            yield _place_failure(plan, str(error))


def _place(plan: Plan, rows: pa.Table) -> pa.Table:
    """Rows with their place in the order and the number of their label."""
    seed, split = plan.data.seed, plan.data.split
    orders = [
        order_of(row_id, key, seed, split) if problem is None else REJECTED
        for row_id, key, problem in zip(
            *(rows[name].to_pylist() for name in ("id", "object", "problem")), strict=True
        )
    ]
    if plan.layout.targets:
        return _with_order(rows, orders, rows["label"])
    labels = pc.index_in(rows["label"], pa.array(plan.labels, pa.string()))
    return _with_order(rows, orders, labels)


def _place_failure(plan: Plan, sentence: str) -> pa.Table:
    schema = raw_schema(plan.layout)
    row = {"id": sentence, "problem": sentence}
    rows = pa.table({field.name: pa.array([row.get(field.name)], field.type) for field in schema})
    targets = plan.layout.targets
    label = label_type(targets) if targets else pa.int32()
    return _with_order(rows, [FAILED], pa.array([None], label))


def _with_order(rows: pa.Table, orders: list[int], labels: pa.Array) -> pa.Table:
    label = rows.schema.get_field_index("label")
    placed = rows.set_column(label, pa.field("label", labels.type), labels)
    return placed.drop_columns(["object"]).append_column("order", pa.array(orders, pa.int64()))


def _write_block(plan: Plan, block: pa.Table) -> pa.Table:
    outcomes = []
    if block.num_rows:
        first = block["order"][0].as_py()
        try:
            outcome = (_reject if first >= REJECTED else _write)(plan, block)
        except HeliostatError as error:
            outcome = {"error": str(error)}
        outcomes.append(json.dumps(outcome | {"first": first}))
    return pa.table({"outcome": pa.array(outcomes, pa.string())})


def _reject(plan: Plan, block: pa.Table) -> Outcome:
    """The count of bad rows by kind of problem, and the first of them by name."""
    *_, last = block["order"].to_pylist()
    if last == FAILED:
        raise HeliostatError(block["problem"][-1].as_py())
    problems = block["problem"].to_pylist()
    named = zip(block["id"].to_pylist(), problems, strict=True)
    return {
        "bad": Counter(problem.partition(":")[0] for problem in problems),
        "examples": [[row, problem] for row, problem in islice(named, MAX_EXAMPLES)],
    }


def _write(plan: Plan, block: pa.Table) -> Outcome:
    """Write the shard of these rows if it is not there; its description and what it counts."""
    split = split_at(block["order"][0].as_py())
    read = block.drop_columns(["order", "problem"]).combine_chunks()
    if plan.labels and read["label"].null_count:
        raise HeliostatError(f"{plan.source.uri} was changed while it was read: prepare it again")
    rows = FORMS[plan.form].finish(plan.store, plan.layout, read)
    data, footer, groups = write_shard(rows, plan.data.rows_per_group)
    sha256 = hashlib.sha256(data).hexdigest()
    key = data_key(plan.name, "shards", f"{sha256}.parquet")
    stored = plan.store.stat(key)
    sound = stored is not None and stored.size == len(data) and holds(plan.store, key, sha256)
    etag = stored.etag if stored and sound else plan.store.write(key, data)
    shard = Shard(key, split, rows.num_rows, len(data), sha256, footer, groups, etag)
    is_class, is_training = not plan.layout.targets, split == "train"
    return {
        "shard": asdict(shard),
        "schema": {field.name: str(field.type) for field in rows.schema},
        "read": read.num_rows,
        "labels": Counter(read["label"].drop_null().to_pylist()) if is_class else {},
        "targets": measure_numbers(_targets(read)) if is_training and not is_class else [],
        "statistics": measure(plan.layout, rows) if is_training else None,
    }


def _targets(rows: pa.Table) -> NDArray[np.float64]:
    return label_values(rows["label"]).reshape(rows.num_rows, -1)


def _describe_shard(shard: dict[str, Any]) -> str:
    size = shard["bytes"] / MIB
    return (
        f"shard {shard['sha256'][:8]}: {shard['rows']:,} rows of {shard['split']}, {size:.1f} MiB"
    )


class _Tally:
    """Rows that tasks have read so far."""

    def __init__(self) -> None:
        self._rows = 0

    def add(self, rows: int) -> None:
        self._rows += rows

    def total(self) -> int:
        return self._rows


@contextmanager
def _progress(rows: int) -> Iterator[Any]:
    """A tally for tasks to add to; while it is used, a line every few seconds tells its total."""
    tally = ray.remote(_Tally).options(num_cpus=0).remote()
    stopped = threading.Event()

    def report() -> None:
        shown = 0
        while not stopped.wait(PROGRESS_SECONDS):
            total = ray.get(tally.total.remote())
            if total > shown:
                print(f"rows read: {total:,} of {rows:,}", flush=True)
            shown = total

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield tally
    finally:
        stopped.set()
        thread.join()
        ray.kill(tally)
