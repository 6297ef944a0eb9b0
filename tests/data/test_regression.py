"""Labels that are numbers: standardised by the training split, named where they are missing."""

import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.data.encoding import encode, encode_targets
from heliostat.data.features import NumericColumn, TableFeatures, input_of
from heliostat.data.instances import parse_instances
from heliostat.data.manifest import load_manifest
from heliostat.data.measure import measure, measure_numbers, settle_features, settle_numbers
from heliostat.data.prepare import prepare, summarise
from heliostat.data.shards import label_values, read_group, to_columns, write_shard
from heliostat.data.stream import read_split
from heliostat.data.tables import label_of
from heliostat.errors import HeliostatError
from heliostat.signature import Interaction, Numbers, Vector
from heliostat.spec import DataSpec, parse
from heliostat.storage import connect

Read = Callable[..., Any]
REASON = (
    "task regression - the labels in y are numbers, and some are fractions; set data.task to "
    "classification to take each for a class"
)
ROWS = st.lists(
    st.tuples(*[st.floats(-1e9, 1e9).map(lambda x: round(x, 3))] * 2), min_size=2, max_size=40
)


def settle(*shards: np.ndarray) -> tuple[Numbers, list[str]]:
    parts = [json.loads(json.dumps(measure_numbers(shard))) for shard in shards]
    return settle_numbers(("a", "b"), parts)


@given(ROWS, st.integers(0, 1000))
def test_targets_have_mean_0_and_deviation_1_however_they_are_cut_into_shards(
    rows: list[tuple[float, float]], cut: int
) -> None:
    labels = np.array(rows)
    cut %= len(rows)
    numbers, notes = settle(labels[:cut], labels[cut:])
    constant = [name for name, part in zip("ab", labels.T, strict=True) if len(set(part)) == 1]
    assert [note.split()[1] for note in notes] == constant
    targets = encode_targets(numbers, {"label": labels})
    assert targets.shape == labels.shape
    assert targets.dtype == np.float32
    for name, std, part in zip("ab", numbers.std, targets.T, strict=True):
        if name in constant:
            assert std == 1
            assert not part.any()
    whole, _ = settle(labels)
    for ours, theirs in ((numbers.mean, labels.mean(axis=0)), (whole.mean, labels.mean(axis=0))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-5)
    spread = [1.0 if n in constant else s for n, s in zip("ab", labels.std(axis=0), strict=True)]
    np.testing.assert_allclose(numbers.std, spread, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_labels_come_back_from_a_shard_as_they_were(count: int) -> None:
    labels = np.random.default_rng(0).standard_normal((50, count))
    flat = pa.array(labels.ravel())
    column = flat if count == 1 else pa.FixedSizeListArray.from_arrays(flat, count)
    data, _, _ = write_shard(pa.table({"label": column}), 16)
    stored = pq.read_table(io.BytesIO(data))
    for start in (0, 13):
        back = label_values(stored["label"].slice(start))
        names = tuple(f"y{i}" for i in range(count))
        numbers = Numbers(names, (0.0,) * count, (1.0,) * count)
        targets = encode_targets(numbers, {"label": back})
        assert (targets == labels[start:].astype(np.float32)).all()
    assert encode_targets(numbers, {"label": label_values(stored["label"].slice(50))}).size == 0


def test_rows_without_a_number_for_a_label_are_named(read: Read) -> None:
    csv = b"n,y,z\n1,2,3\n4,?,5\n6,7,abc\n8,inf,9\n10,11,\n12,1e1,14\n"
    survey, rows = read({"t.csv": csv}, label=["y", "z"])
    assert survey.layout.targets == ("y", "z")
    assert survey.layout.kinds == {"n": "numeric"}
    assert survey.labels == ()
    problems = dict(zip(rows["id"].to_pylist(), rows["problem"].to_pylist(), strict=True))
    assert problems == {
        "t.csv#0": None,
        "t.csv#1": "label y is missing",
        "t.csv#2": "label z is not a number of at most 1e+100: 'abc'",
        "t.csv#3": "label y is not a number of at most 1e+100: 'inf'",
        "t.csv#4": "label z is missing",
        "t.csv#5": None,
    }
    good = rows.filter(rows["problem"].is_null())
    assert label_values(good["label"]).tolist() == [[2, 3], [10, 14]]


def test_parquet_labels_are_numbers_of_any_type(read: Read) -> None:
    file = io.BytesIO()
    columns = {"x": [1.0, 2.0], "i": pa.array([3, None], pa.int8()), "t": ["1.5", "2"]}
    pq.write_table(pa.table(columns), file)
    for label, expected in (("i", [3.0, None]), ("t", [1.5, 2.0])):
        _, rows = read(
            {"t.parquet": file.getvalue()},
            label=label,
            task="regression",
            columns={"it".replace(label, ""): "ignore"},
        )
        assert rows["label"].type == pa.float64()
        np.testing.assert_array_equal(label_values(rows["label"]), np.array(expected, float))


def test_one_column_is_of_classes_unless_the_task_says_otherwise() -> None:
    def label(**section: Any) -> Any:
        return label_of(DataSpec(source="raw", **section))

    assert label(label="y") == label(label=["y"]) == "y"
    assert label(label="y", task="regression") == ("y",)
    assert label(label=["y", "z"]) == ("y", "z")
    with pytest.raises(HeliostatError, match=r"classes are one column, set data\.task"):
        label(label=["y", "z"], task="classification")
    with pytest.raises(HeliostatError, match="name each column once"):
        label(label=["y", "y"])


@pytest.mark.parametrize(
    ("labels", "is_regression"),
    [
        (["0.5", "1", "2.25"], True),
        (["-1e-3", "7", "8"], True),
        ([f"{n}.5" for n in range(1500)], True),
        (["1", "2", "3.0"], False),
        (["1.5", "3"], False),
        (["0.5", "1.5", "none"], False),
        (["0.5", "1.5", "inf"], False),
        (["a", "b", "c"], False),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_fractions_are_numbers_unless_the_task_says_otherwise(
    read: Read, form: str, labels: list[str], is_regression: bool
) -> None:
    rows = {"n": list(range(len(labels))), "y": labels}
    if form == "csv":
        lines = zip(*rows.values(), strict=True)
        files = {"t.csv": "\n".join(["n,y", *(f"{n},{y}" for n, y in lines)]).encode()}
    else:
        file = io.BytesIO()
        is_number = all(label.replace("inf", "1").strip("-.e0123456789") == "" for label in labels)
        column = pa.array(map(float, labels)) if is_number else pa.array(labels)
        pq.write_table(pa.table(rows | {"y": column}), file)
        files = {"t.parquet": file.getvalue()}
    survey, read_rows = read(files, label="y")
    assert survey.layout.targets == (("y",) if is_regression else ())
    assert [n for n in survey.notes if n.startswith("task")] == ([REASON] if is_regression else [])
    if is_regression:
        assert survey.labels == ()
        assert read_rows["label"].to_pylist() == list(map(float, labels))
    if len(labels) < 1000:
        told, _ = read(files, label="y", task="classification")
        assert told.layout.targets == ()
        assert len(told.labels) == len(labels)


def test_ratings_are_numbers_unless_they_are_two_or_words(read: Read) -> None:
    def targets(*ratings: str, **section: Any) -> tuple[str, ...]:
        rows = "".join(f"u{i % 3},{i},{rating}\n" for i, rating in enumerate(ratings))
        files = {"t.csv": f"user,item,stars\n{rows}".encode()}
        columns = {"user": "id", "item": "id"}
        survey, _ = read(files, label="stars", columns=columns, **section)
        reasons = [note for note in survey.notes if note.startswith("task regression")]
        assert bool(reasons) == bool(survey.layout.targets)
        return survey.layout.targets  # type: ignore[no-any-return]

    assert targets("1", "5", "3") == ("stars",)
    assert targets("0", "1", "1") == ()
    assert targets("good", "bad", "3") == ()
    assert targets("1", "5", "3", task="classification") == ()


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({}, "data.label is None: .* one of a, y"),
        ({"label": "z"}, "data.label is 'z': .* one of a, y"),
        ({"label": ["y", "z"]}, "data.label is 'y, z': .* one of a, y"),
        ({"label": ["a", "y"]}, "no column beside a, y"),
    ],
)
def test_labels_that_are_not_there_are_refused(read: Read, section: Any, sentence: str) -> None:
    with pytest.raises(HeliostatError) as caught:
        read({"t.csv": b"a,y\n1,2\n"}, task="regression", **section)
    assert re.search(sentence, str(caught.value))


def test_a_thousand_columns_are_encoded_as_each_alone() -> None:
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((7, 1000))
    rows[draw.random(rows.shape) < 0.1] = np.nan
    columns = tuple(
        NumericColumn(f"c{i}", i / 7, 1 + i / 3, bool(np.isnan(part).any()))
        for i, part in enumerate(rows.T)
    )
    (inputs,) = encode(TableFeatures(columns), {"numbers": rows})
    first = 0
    for column, part in zip(columns, rows.T, strict=True):
        expected = np.nan_to_num((part - column.mean) / column.std).astype(np.float32)
        assert (inputs[:, first] == expected).all()
        if column.has_missing:
            assert (inputs[:, first + 1] == np.isnan(part)).all()
        first += 1 + column.has_missing
    assert inputs.shape[1] == first


def test_a_column_without_a_value_is_left_out_of_the_numbers_of_a_row(read: Read) -> None:
    survey, rows = read(
        {"t.csv": b"a,b,c,y\n1,,3,5\n2,,5,6\n"},
        label="y",
        task="regression",
        columns={"b": "numeric"},
    )
    data = DataSpec(source="raw")
    features, notes = settle_features(survey.layout, [measure(survey.layout, rows)], data)
    assert notes == ["column b is dropped: it has no value in the training rows"]
    (stored,) = encode(features, to_columns(features, rows))
    (asked,) = encode(features, parse_instances(features, [{"a": 1, "c": 3}, {"a": 2, "c": 5}]))
    assert stored.tolist() == asked.tolist() == [[-1, -1], [1, 1]]


@pytest.mark.cluster
def test_ratings_are_prepared_end_to_end(cluster: object, bucket: str) -> None:
    draw = np.random.default_rng(0)
    users, items, ages = draw.integers(0, 30, 600), draw.integers(0, 40, 600), draw.random(600)
    stars = np.round(draw.random(600) * 4 + 1, 2)
    lines = [
        f"{user},{item}.0,{age:.3f},{star}"
        for user, item, age, star in zip(users, items, ages, stars, strict=True)
    ]
    source = f"{bucket}-raw"
    connect(source).write("r.csv", "\n".join(["user,item,age,stars", *lines]).encode())
    kinds = {"user": "id", "item": "id"}
    data = {"source": source, "label": "stars", "task": "regression", "columns": kinds}
    manifest = prepare(parse({"name": "r", "root": bucket, "data": data, "model": {"kind": "mlp"}}))
    store = connect(bucket)
    assert load_manifest(store, "r", manifest.version) == manifest
    assert "1 numbers: stars" in summarise(manifest)
    assert sum(manifest.rows.values()) == 600
    train = pa.concat_tables(
        read_group(store, shard, index)
        for shard in manifest.shards_of("train")
        for index in range(len(shard.groups))
    )
    rows = [int(row.partition("#")[2]) for row in train["id"].to_pylist()]
    assert train["label"].to_pylist() == stars[rows].tolist()
    output = manifest.output
    assert isinstance(output, Numbers)
    assert output.names == ("stars",)
    assert (output.mean[0], output.std[0]) == pytest.approx((stars[rows].mean(), stars[rows].std()))
    network_input = input_of(manifest.features)
    assert network_input == Interaction((1 + len(set(users[rows])), 1 + len(set(items[rows]))), 1)
    for columns in read_split(store, manifest, "train", 256):
        ids, others = encode(manifest.features, dict(columns))
        assert ids.dtype == np.int64
        assert ids.min() > 0
        assert others.shape == (len(ids), 1)
        assert encode_targets(output, dict(columns)).shape == (len(ids), 1)

    wide = {"source": source, "label": ["age", "stars"], "seed": 1}
    second = prepare(parse({"name": "w", "root": bucket, "data": wide, "model": {"kind": "mlp"}}))
    assert input_of(second.features) == Vector(2)
    (columns,) = read_split(store, second, "test", 1000)
    assert encode_targets(second.output, dict(columns)).shape == (second.rows["test"], 2)
