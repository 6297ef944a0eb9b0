"""Batch prediction: a version over every row below a prefix, each row exactly once.

The source is cut into units of whole files. A worker turns a unit into a Parquet file of
predictions and, where rows cannot be used, one of problems; the record of the unit, written last,
makes them count. A run that finds records does only what is missing.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from heliostat import registry
from heliostat.data.features import (
    NUMBERS,
    TEXT,
    CategoryColumn,
    Columns,
    Features,
    ImageFeatures,
    NumericColumn,
    SeriesFeatures,
    TableFeatures,
    TextFeatures,
    features_from_json,
)
from heliostat.data.pipeline import FORMS, quiet_ray_data
from heliostat.data.raw import (
    ImageLayout,
    Layout,
    SeriesLayout,
    Source,
    TableLayout,
    TextLayout,
    Unit,
    find_source,
)
from heliostat.data.shards import to_columns
from heliostat.data.waiting import say_if_waiting
from heliostat.errors import HeliostatError, printable
from heliostat.evaluate import Predictor, load_predictor, predict
from heliostat.signature import Classes, Numbers, Output
from heliostat.spec import DataSpec, RunSpec, SplitSpec, digest, parse, reference
from heliostat.storage import Store, connect
from heliostat.storage.documents import Damaged, read_document

FORMAT = 2
SUITED = {
    ImageFeatures: ("images", "idx"),
    SeriesFeatures: ("series",),
    TableFeatures: ("csv", "parquet"),
    TextFeatures: ("text",),
}
PROBLEMS = pa.schema({"source": pa.string(), "row": pa.int64(), "problem": pa.string()})
TOO_FAR = "too far outside the range of the training data"


@dataclass(frozen=True)
class Plan:
    """All that a worker needs; `prefix` is where its files go."""

    store: Store
    source: Store
    form: str
    layout: Layout
    version: registry.Version
    prefix: str
    batch: int


@dataclass(frozen=True)
class Piece:
    """What became of a unit: its file of predictions, and how many rows are in it and bad."""

    number: int
    key: str
    rows: int
    bad: int
    bytes: int
    sha256: str
    example: str | None


def predict_all(spec: RunSpec) -> str:
    """Run `spec.predict` and return the URI below which predictions and manifest.json lie.

    Raises:
        HeliostatError: the source has nothing that the version can take, was changed meanwhile, or
            has a larger share of bad rows than `predict.max_bad`.
    """
    store = connect(spec.root)
    version = registry.resolve(store, reference(spec.name, spec.predict.version))
    source, plan = make_plan(store, version, spec)
    place = f"{store.uri}/{plan.prefix}"
    manifest_key = f"{plan.prefix}/manifest.json"
    if store.stat(manifest_key):
        print(f"already predicted: {place}", flush=True)
        return place
    units = list(enumerate(list_units(source)))
    done = find_done(plan)
    told = f"{version.ref} over {source.uri}: {source.form} - {source.reason}"
    print(printable(f"{told}; {len(done):,} of {len(units):,} parts are done"), flush=True)
    missing = [unit for unit in units if unit[0] not in done]
    for piece in _run(plan, missing, spec.predict.workers):
        done[piece.number] = piece
        print(
            f"part {len(done):,} of {len(units):,}: {piece.rows:,} rows, {piece.bad:,} bad",
            flush=True,
        )
    pieces = [done[number] for number, _ in units]
    check_bad(pieces, spec.predict.max_bad, place)
    store.write(manifest_key, json.dumps(describe(plan, source, pieces), indent=1).encode())
    return place


def make_plan(store: Store, version: registry.Version, spec: RunSpec) -> tuple[Source, Plan]:
    """What is to be done; the same objects and version give the same `prefix`.

    Raises:
        HeliostatError: there is no source, or it has another form than the version takes.
    """
    features = features_from_json(version.features)
    data = _as_source(version, features, spec)
    forms = SUITED.get(type(features), ())
    if not forms:
        raise HeliostatError(
            f"{version.ref} cannot be run over a bucket: a language model answers no rows"
        )
    source = find_source(data)
    if source.form not in forms:
        raise HeliostatError(
            f"{source.uri} holds {source.form}, but {version.ref} takes {' or '.join(forms)}: "
            "set predict.format if the names of the objects mislead"
        )
    listing = [[entry.key, entry.size, entry.etag] for entry in source.entries]
    inputs = [FORMAT, version.ref, version.weights_sha256, source.uri, source.form, listing]
    name = digest([*inputs, data.text.column, *data.header])[:16]
    prefix = f"predictions/{version.name}/{version.number}/{name}"
    layout = _lay_out(features, data)
    return source, Plan(
        store, source.store, source.form, layout, version, prefix, spec.predict.batch
    )


def list_units(source: Source) -> list[Unit]:
    """Whole files, with the etags that the listing has of them."""
    etags = {entry.key: entry.etag for entry in source.entries}
    form = FORMS[source.form]
    return [
        {**unit, "etags": {key: etags[key] for key in _keys(unit)}}
        for unit in (form.split_plain or form.split)(source)
    ]


def find_done(plan: Plan) -> dict[int, Piece]:
    """The pieces whose record is there and whole, and their predictions with it."""
    entries = {entry.key: entry.size for entry in plan.store.list(f"{plan.prefix}/")}
    done = {}
    for key in entries:
        if key.startswith(f"{plan.prefix}/part-") and key.endswith(".json"):
            with suppress(Damaged):
                piece = read_document(plan.store, key, Piece)
                if entries.get(piece.key) == piece.bytes:
                    done[piece.number] = piece
    return done


def predict_unit(plan: Plan, predictor: Predictor, number: int, unit: Unit) -> Piece:
    """Write the predictions for the rows of a unit, then its record.

    Raises:
        HeliostatError: an object cannot be read, or is not the one that was listed.
    """
    stem = f"{plan.prefix}/part-{number:05}"
    tables = FORMS[plan.form].read(plan.source, unit, plan.layout)
    rows = bad = 0
    example = None
    with tempfile.TemporaryDirectory(prefix="heliostat-predict-") as folder:
        path, problems = Path(folder) / "predictions", Path(folder) / "problems"
        with (
            pq.ParquetWriter(path, schema_of(predictor.output)) as good_file,
            pq.ParquetWriter(problems, PROBLEMS) as bad_file,
        ):
            for table in tables:
                good, wrong = predict_table(predictor, table, plan.batch)
                good_file.write_table(good)
                bad_file.write_table(wrong)
                rows, bad = rows + good.num_rows, bad + wrong.num_rows
                if example is None and wrong.num_rows:
                    first = wrong.slice(0, 1).to_pylist()[0]
                    example = f"{first['source']}, row {first['row']:,}: {first['problem']}"
        _check_unchanged(plan.source, unit)
        if bad:
            plan.store.upload(f"{stem}.bad.parquet", problems)
        plan.store.upload(f"{stem}.parquet", path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    piece = Piece(number, f"{stem}.parquet", rows, bad, size, sha256, example)
    plan.store.write(f"{stem}.json", json.dumps(asdict(piece)).encode())
    return piece


def predict_table(predictor: Predictor, table: pa.Table, batch: int) -> tuple[pa.Table, pa.Table]:
    """Predictions for the rows that can be used, and the problems of the others."""
    problems: NDArray[Any] = np.array(table["problem"].to_pylist(), object)
    good = _find_good(problems)
    columns = _to_columns(predictor.features, table.take(good))
    for name, missing in _find_missing(predictor.features, columns):
        problems[good[missing]] = f"column {name} is missing, and training saw no row without it"
    kept = _find_good(problems[good])
    parts = [
        predict(predictor, {name: values[rows] for name, values in columns.items()})
        for rows in (kept[start : start + batch] for start in range(0, len(kept), batch))
    ]
    values = np.concatenate(parts) if parts else np.empty((0, _width(predictor.output)), np.float32)
    finite = np.isfinite(values).all(axis=1)
    problems[good[kept[~finite]]] = TOO_FAR
    places = good[kept[finite]]
    sources, numbers = _locate(table)
    predicted = _render(predictor.output, values[finite])
    wrong = np.setdiff1d(np.arange(len(problems)), _find_good(problems))
    return (
        pa.table(
            {"source": sources.take(places), "row": numbers[places], **predicted},
            schema=schema_of(predictor.output),
        ),
        pa.table(
            {"source": sources.take(wrong), "row": numbers[wrong], "problem": problems[wrong]},
            schema=PROBLEMS,
        ),
    )


def schema_of(output: Output) -> pa.Schema:
    """Where a row comes from, and what is predicted for it."""
    place = {"source": pa.string(), "row": pa.int64()}
    if isinstance(output, Classes):
        return pa.schema(
            {
                **place,
                "class": pa.string(),
                "probability": pa.float32(),
                "probabilities": pa.list_(pa.float32(), len(output.labels)),
            }
        )
    assert isinstance(output, Numbers)
    return pa.schema({**place, **{f"y.{name}": pa.float32() for name in output.names}})


def check_bad(pieces: list[Piece], most: float, place: str) -> None:
    """Raises HeliostatError if a larger share of the rows than `most` could not be used."""
    bad, rows = sum(piece.bad for piece in pieces), sum(piece.rows for piece in pieces)
    if bad > most * (bad + rows):
        example = next(piece.example for piece in pieces if piece.example)
        raise HeliostatError(
            f"{bad:,} of {bad + rows:,} rows cannot be used, such as {example}; predict.max_bad is "
            f"{most:g}: the others are predicted and the problems listed in {place}/*.bad.parquet, "
            "raise predict.max_bad to have the manifest too"
        )


def describe(plan: Plan, source: Source, pieces: list[Piece]) -> dict[str, Any]:
    """The manifest: which rows of what were answered by which version."""
    return {
        "version": plan.version.ref,
        "weights_sha256": plan.version.weights_sha256,
        "source": source.uri,
        "form": source.form,
        "output": plan.version.output,
        "rows": sum(piece.rows for piece in pieces),
        "bad": sum(piece.bad for piece in pieces),
        "parts": [asdict(piece) for piece in pieces],
    }


class Worker:
    """The body of one actor: it loads the version once and works unit by unit."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._predictor: Predictor | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"outcome": [self._answer(*json.loads(unit)) for unit in batch["unit"]]}

    def _answer(self, number: int, unit: Unit) -> str:
        """A piece, or the sentence of what failed: Ray keeps only the text of an exception."""
        try:
            if self._predictor is None:
                self._predictor = load_predictor(self._plan.store, self._plan.version)
            return json.dumps(asdict(predict_unit(self._plan, self._predictor, number, unit)))
        except HeliostatError as error:
            return json.dumps({"error": str(error)})


def _run(plan: Plan, units: list[tuple[int, Unit]], workers: int) -> Iterator[Piece]:
    if not units:
        return
    say_if_waiting(cpus=1)
    items = [{"unit": json.dumps(unit)} for unit in units]
    with quiet_ray_data():
        outcomes = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Worker,
            fn_constructor_args=(plan,),
            batch_size=1,
            num_cpus=1,
            concurrency=(1, min(workers, len(units))),
        )
        for row in outcomes.iter_rows():
            outcome = json.loads(row["outcome"])
            if "error" in outcome:
                raise HeliostatError(outcome["error"])
            yield Piece(**outcome)


def _as_source(version: registry.Version, features: Features, spec: RunSpec) -> DataSpec:
    """The data section that the version was trained with, over the rows to predict."""
    if spec.predict.source is None:
        raise HeliostatError("predict.source is required: the objects whose rows are predicted")
    given = spec.predict.format
    trained = parse(version.spec, origin=version.ref).data
    return trained.model_copy(
        update={
            "source": spec.predict.source,
            "format": "text" if isinstance(features, TextFeatures) else given,
            "header": spec.predict.header,
            "split": SplitSpec(),
        }
    )


def _lay_out(features: Features, data: DataSpec) -> Layout:
    """How rows without a label are read for such features."""
    match features:
        case ImageFeatures(height, width, channels):
            return ImageLayout(height, width, channels, labelled=False)
        case SeriesFeatures(length, channels):
            return SeriesLayout(length, channels, labelled=False)
        case TextFeatures(length=length):
            return TextLayout(True, length, data.text.column, None)
        case TableFeatures(columns):
            kinds = {column.name: _kind_of(column) for column in columns}
            return TableLayout((), kinds, data.header)
    raise TypeError("such rows are not read")


def _kind_of(column: object) -> str:
    if isinstance(column, NumericColumn):
        return "numeric"
    return "category" if isinstance(column, CategoryColumn) else "id"


def _to_columns(features: Features, table: pa.Table) -> Columns:
    match features:
        case TextFeatures():
            return {TEXT: np.array(table[TEXT].to_pylist(), object)}
        case TableFeatures():  # read were the columns in use, and no other
            return to_columns(replace(features, unused=()), table)
    return to_columns(features, table)


def _find_good(problems: NDArray[Any]) -> NDArray[np.intp]:
    return np.flatnonzero([problem is None for problem in problems])


def _find_missing(features: Features, columns: Columns) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The rows that lack a number of a column that always has one."""
    if isinstance(features, TableFeatures):
        for place, column in enumerate(features.numeric):
            if not column.has_missing:
                yield column.name, np.isnan(columns[NUMBERS][:, place])


def _locate(table: pa.Table) -> tuple[pa.Array, NDArray[np.int64]]:
    """The object that each row comes from, and its number there; a file that is a row has one."""
    objects = table["object"].combine_chunks()
    pairs = zip(table["id"].to_pylist(), objects.to_pylist(), strict=True)
    numbers = [int(row_id[len(key) + 1 :] or 0) for row_id, key in pairs]
    return objects, np.array(numbers, np.int64)


def _render(output: Output, values: NDArray[np.float32]) -> dict[str, Any]:
    if isinstance(output, Classes):
        best = values.argmax(axis=1)
        return {
            "class": np.array(output.labels, object)[best],
            "probability": values[np.arange(len(values)), best],
            "probabilities": pa.FixedSizeListArray.from_arrays(
                pa.array(values.ravel()), values.shape[1]
            ),
        }
    assert isinstance(output, Numbers)
    return {f"y.{name}": values[:, place] for place, name in enumerate(output.names)}


def _width(output: Output) -> int:
    assert isinstance(output, Classes | Numbers)
    return len(output.labels if isinstance(output, Classes) else output.names)


def _keys(unit: Unit) -> list[str]:
    if "files" in unit:
        return [key for key, _ in unit["files"]]
    return [unit["key"] if "key" in unit else unit["images"]]


def _check_unchanged(source: Store, unit: Unit) -> None:
    for key, etag in unit["etags"].items():
        entry = source.stat(key)
        if entry is None or entry.etag != etag:
            raise HeliostatError(f"{source.uri}/{key} was changed while it was read: run again")
