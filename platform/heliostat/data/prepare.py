"""Prepare a data set: raw objects to shuffled, checksummed shards and the manifest that names them.

A survey looks at every object and settles sizes, columns and labels. Then one Ray Data pipeline
reads and cleans the rows, sorts them by a hash of their ids and writes a shard per range of it.
"""

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

from heliostat.data import images, series, tables, text
from heliostat.data.manifest import (
    SPLITS,
    Manifest,
    Shard,
    check_shards,
    content_version,
    data_key,
    holds,
    load_manifest,
    shard_from_json,
)
from heliostat.data.measure import (
    measure,
    measure_numbers,
    settle_features,
    settle_numbers,
    unigram_nats,
)
from heliostat.data.raw import (
    Form,
    Found,
    Layout,
    Source,
    Survey,
    TextLayout,
    Unit,
    find_source,
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
from heliostat.data.waiting import say_if_waiting
from heliostat.errors import HeliostatError
from heliostat.signature import Classes, NextToken, Numbers, Output
from heliostat.spec import DataSpec, RunSpec, digest
from heliostat.storage import Missing, Store, connect, probe

FORMS: dict[str, Form] = {
    "images": images.FILES,
    "idx": images.IDX,
    "csv": tables.CSV,
    "parquet": tables.PARQUET,
    "series": series.SERIES_FILES,
    "text": text.TEXTS,
}
CODE_FORMAT = 2
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


def prepare(spec: RunSpec) -> Manifest:
    """Turn the raw objects of `spec.data` into a version of the data set `spec.name`.

    The same objects and the same `spec.data` give the same version, and nothing is written then.

    Raises:
        HeliostatError: the source is empty, mixed, has one class, or more rows that cannot be
            used than `data.max_bad_rows`; or the root cannot be written.
    """
    store = connect(spec.root)
    probe(store)
    source = find_source(spec.data)
    _check_apart(source, store)
    _check_task(source.form, spec.data)
    print(f"{source.uri}: {source.form} - {source.reason}", flush=True)
    fingerprint = _fingerprint(source, spec.data)
    if manifest := _find_prepared(store, spec.name, fingerprint):
        print(f"already prepared: {manifest.name}@{manifest.version}", flush=True)
        return manifest
    say_if_waiting(cpus=1)
    with _ray_data():
        survey = _learn(store, source, _survey(source, spec.data), spec.data)
        outcomes = _write_shards(store, source, survey, spec)
    report = _report(source, survey, outcomes)
    _refuse(store, spec, report, data_key(spec.name, "inputs", f"{fingerprint}.refused.json"))
    manifest = _assemble(spec, source, survey, outcomes, report)
    _publish(store, manifest, report | {"notes": manifest.report["notes"]}, fingerprint)
    return manifest


def require_prepared(spec: RunSpec) -> Manifest:
    """The version that `prepare` made of the objects that are there now; shards are not checked.

    Raises:
        HeliostatError: these objects were not prepared with this `spec.data`.
    """
    store, source = connect(spec.root), find_source(spec.data)
    try:
        return _load_pointed(store, spec.name, _fingerprint(source, spec.data))
    except Missing as error:
        raise HeliostatError(
            f"{source.uri} was not prepared as {spec.name} with this data section, or was "
            "changed since: run the prepare job first"
        ) from error


def summarise(manifest: Manifest) -> str:
    """What was prepared, as lines for a terminal."""
    lines = [f"{'split':<12}{'rows':>12}{'shards':>8}{'MiB':>10}"]
    for split in SPLITS:
        shards = manifest.shards_of(split)
        size = sum(shard.bytes for shard in shards) / MIB
        lines.append(f"{split:<12}{manifest.rows[split]:>12,}{len(shards):>8,}{size:>10.1f}")
    report = manifest.report
    lines.append(_describe_output(manifest.output))
    lines.append(f"{report['rows_bad']:,} bad rows of {report['rows_read']:,}")
    return "\n".join(lines)


def _describe_output(output: Output) -> str:
    match output:
        case Classes(labels):
            return f"{len(labels)} classes: {', '.join(labels[:20])}" + ", ..." * (len(labels) > 20)
        case Numbers(names):
            return f"{len(names)} numbers: {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
        case _:
            return "the next token"


def _check_apart(source: Source, store: Store) -> None:
    if f"{store.uri}/".startswith(f"{source.uri}/"):
        raise HeliostatError(
            f"root {store.uri} lies inside data.source {source.uri}, so prepared data would "
            "be read as raw data: choose another root, or a source beside it"
        )


def _check_task(form: str, data: DataSpec) -> None:
    tasks = FORMS[form].tasks
    if data.task not in ("auto", *tasks):
        raise HeliostatError(
            f"data.task is {data.task}, but the labels of {form} are for {' or '.join(tasks)}"
        )


def _fingerprint(source: Source, data: DataSpec) -> str:
    """The same for the same objects, the same data section and the same code."""
    listing = [[entry.key, entry.size, entry.etag] for entry in source.entries]
    parts = [CODE_FORMAT, data.model_dump(mode="json"), listing]
    if source.form == "text" and data.text.tokenizer:
        parts.append(text.read_vocabulary(data.text.tokenizer)[1].sha256)
    return digest(parts)


def _find_prepared(store: Store, name: str, fingerprint: str) -> Manifest | None:
    try:
        manifest = _load_pointed(store, name, fingerprint)
        check_shards(store, manifest)
    except HeliostatError:
        return None
    return manifest


def _load_pointed(store: Store, name: str, fingerprint: str) -> Manifest:
    """The version that these inputs were prepared to; Missing if no sound pointer names one."""
    key = data_key(name, "inputs", f"{fingerprint}.json")
    try:
        version = str(json.loads(store.read(key))["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise Missing(f"{store.uri}/{key} names no version") from error
    return load_manifest(store, name, version)


# --- The pipeline --------------------------------------------------------------------------------


@contextmanager
def _ray_data() -> Iterator[None]:
    """Ray Data for a job: quiet, and with a shuffle that gives exactly one block per range.

    The default shuffle may cut a range in two and starts new processes for every sort: 10 s where
    this one takes 1.
    """
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    with DataContext.current(context):
        yield


def _from_units(units: list[Unit]) -> ray.data.Dataset:
    items = [{"unit": json.dumps(unit)} for unit in units]
    return ray.data.from_items(items, override_num_blocks=len(items))


def _survey(source: Source, data: DataSpec) -> Survey:
    form = FORMS[source.form]
    survey = form.settle(source, _ask(source, partial(_survey_unit, source.form, data)), data)
    for note in survey.notes:
        print(note, flush=True)
    return survey


def _survey_unit(form: str, data: DataSpec, source: Store, unit: Unit) -> Found:
    return FORMS[form].survey(source, unit, data)


def _learn(store: Store, source: Source, survey: Survey, data: DataSpec) -> Survey:
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


def _write_shards(store: Store, source: Source, survey: Survey, spec: RunSpec) -> list[Outcome]:
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


# --- The result ----------------------------------------------------------------------------------


def _report(source: Source, survey: Survey, outcomes: list[Outcome]) -> dict[str, Any]:
    """What was read and what could not be used."""
    kept = sum(outcome["read"] for outcome in outcomes if "shard" in outcome)
    rejected = [outcome for outcome in outcomes if "bad" in outcome]
    bad = sum((Counter(outcome["bad"]) for outcome in rejected), Counter[str]())
    return {
        "source": source.uri,
        "format": source.form,
        "objects": len(source.entries),
        "objects_ignored": source.ignored,
        "rows_read": kept + bad.total(),
        "rows_bad": bad.total(),
        "problems": dict(bad),
        "examples": [example for outcome in rejected for example in outcome["examples"]],
        "rows_by_split": _count_splits(outcomes),
        "rows_by_class": _count_classes(survey, outcomes),
    }


def _count_splits(outcomes: list[Outcome]) -> dict[str, int]:
    shards = [outcome["shard"] for outcome in outcomes if "shard" in outcome]
    return {
        split: sum(shard["rows"] for shard in shards if shard["split"] == split) for split in SPLITS
    }


def _count_classes(survey: Survey, outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    counts = {label: dict.fromkeys(SPLITS, 0) for label in survey.labels}
    for outcome in outcomes:
        for label, rows in outcome.get("labels", {}).items():
            counts[survey.labels[int(label)]][outcome["shard"]["split"]] += rows
    return counts


def _refuse(store: Store, spec: RunSpec, report: dict[str, Any], key: str) -> None:
    """Refuse data with too many bad rows, whose report then lies at `key`, or without a use."""
    if report["rows_bad"] > spec.data.max_bad_rows:
        store.write(key, _to_bytes(report))
        examples = report["examples"]
        named = "; ".join(f"{row}: {problem}" for row, problem in examples[:3])
        share = "all" if len(examples) == report["rows_bad"] else f"the first {len(examples):,}"
        raise HeliostatError(
            f"{report['rows_bad']:,} of {report['rows_read']:,} rows under {report['source']} "
            f"cannot be used and data.max_bad_rows is {spec.data.max_bad_rows}: {named} "
            f"({share} are named in {store.uri}/{key})"
        )
    unseen = [label for label, rows in report["rows_by_class"].items() if not any(rows.values())]
    if unseen:
        raise HeliostatError(
            f"the class {unseen[0]!r} under {report['source']} has no row that can be used: "
            "mend or remove it"
        )
    if not report["rows_by_split"]["train"]:
        raise HeliostatError(
            f"of {report['rows_read']:,} rows under {report['source']} none fell into the training "
            "split: give more rows, or lower data.split.validation and data.split.test"
        )


def _assemble(
    spec: RunSpec, source: Source, survey: Survey, outcomes: list[Outcome], report: dict[str, Any]
) -> Manifest:
    written = [outcome for outcome in outcomes if "shard" in outcome]
    shards = tuple(shard_from_json(outcome["shard"]) for outcome in written)
    statistics = [outcome["statistics"] for outcome in written if outcome["statistics"]]
    features, notes = settle_features(survey.layout, statistics, spec.data)
    nats = unigram_nats(survey.layout, statistics)
    output, label_notes = _settle_output(survey, written, report)
    notes += label_notes
    for note in notes:
        print(note, flush=True)
    unversioned = Manifest(
        name=spec.name,
        version="",
        source=source.uri,
        format=source.form,
        schema=written[0]["schema"],
        output=output,
        rows=report["rows_by_split"],
        features=features,
        shards=shards,
        spec=spec.data.model_dump(mode="json"),
        report={name: report[name] for name in ("rows_read", "rows_bad", "objects_ignored")}
        | {"notes": [*survey.notes, *notes]}
        | ({"unigram_nats": nats} if nats is not None else {}),
    )
    return replace(unversioned, version=content_version(unversioned))


def _settle_output(
    survey: Survey, written: list[Outcome], report: dict[str, Any]
) -> tuple[Output, list[str]]:
    if targets := survey.layout.targets:
        return settle_numbers(targets, [o["targets"] for o in written if o["targets"]])
    unseen = [label for label, rows in report["rows_by_class"].items() if not rows["train"]]
    notes = [f"classes without a training row: {', '.join(unseen)}"] if unseen else []
    if not survey.labels:
        return NextToken(), notes
    return Classes(survey.labels), notes


def _publish(store: Store, manifest: Manifest, report: dict[str, Any], fingerprint: str) -> None:
    """Write what is not there yet, the manifest after all that it names."""
    folder = data_key(manifest.name, manifest.version)
    if not _is_published(store, manifest):
        store.write(f"{folder}/report.json", _to_bytes(report))
        store.write(f"{folder}/manifest.json", _to_bytes(manifest.to_json()))
    pointer = _to_bytes({"version": manifest.version})
    store.write(data_key(manifest.name, "inputs", f"{fingerprint}.json"), pointer)


def _is_published(store: Store, manifest: Manifest) -> bool:
    try:
        return load_manifest(store, manifest.name, manifest.version).version == manifest.version
    except HeliostatError:
        return False


def _to_bytes(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode()
