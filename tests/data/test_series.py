"""Series from .ts files: every case once, what cannot be used by name, zero where nothing is."""

import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.data.encoding import encode, stack_series
from heliostat.data.features import SeriesFeatures, features_from_json, features_to_json, input_of
from heliostat.data.instances import FieldError, parse_instances
from heliostat.data.measure import measure, settle_features
from heliostat.data.raw import SeriesLayout
from heliostat.data.shards import series_values, to_columns, write_shard
from heliostat.errors import HeliostatError
from heliostat.signature import Series
from heliostat.spec import DataSpec

Read = Callable[..., Any]
HEADER = "# a comment\n@problemName p\n@timeStamps false\n@classLabel true a b\n@data\n"
FEATURES = SeriesFeatures(4, 2, (1.0, 10.0), (2.0, 5.0))
SERIES = st.lists(
    st.lists(
        st.lists(st.none() | st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=8,
)


def make_ts(*cases: str, header: str = HEADER) -> dict[str, bytes]:
    return {"p_TRAIN.ts": (header + "\n".join(cases) + "\n").encode()}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_cases_are_read_step_by_step(read: Read, pack: Callable[[bytes], bytes]) -> None:
    files = make_ts("1,2,3:4,5,6:b", "", "7,?:8,9:a", "1.5e1,1,?,NaN:2,?,?,?: a ")
    survey, rows = read({key: pack(data) for key, data in files.items()})
    assert survey.layout == SeriesLayout(3, 2)
    assert survey.labels == ("a", "b")
    assert rows["id"].to_pylist() == [f"p_TRAIN.ts#{row}" for row in range(3)]
    assert rows["label"].to_pylist() == ["b", "a", "a"]
    assert rows["problem"].to_pylist() == [None] * 3
    first, second, third = series_values(rows, 2)
    assert first.tolist() == [[1, 4], [2, 5], [3, 6]]
    np.testing.assert_array_equal(second, [[7, 8], [np.nan, 9]])
    np.testing.assert_array_equal(third, [[15, 2], [1, np.nan]])


def test_cases_that_cannot_be_used_are_named(read: Read) -> None:
    cases = ["1:2:a", "1:a", "1,2:3:a", "1:x:a", "1:inf:a", "1:1e39:b", "?:?:b", "1:2:?", "1::b"]
    cases += ["9_0:1:a", "1:1_0,2_0:b"]
    survey, rows = read(make_ts(*cases))
    assert survey.rows == len(cases)
    assert rows["problem"].to_pylist() == [
        None,
        "1 channels instead of 2",
        "channels of different lengths",
        "a value is not a number",
        "a value is not a number of at most 3.40282e+38",
        "a value is not a number of at most 3.40282e+38",
        "no values",
        "the label is missing or not UTF-8 text",
        *["a value is not a number"] * 3,
    ]


def test_labels_can_be_numbers(read: Read) -> None:
    header = HEADER.replace("@classLabel true a b", "@targetlabel true")
    survey, rows = read(make_ts("1,2:0.5", "3:7", "4:x", header=header), task="regression")
    assert survey.layout == SeriesLayout(2, 1, ("target",))
    assert rows["label"].to_pylist() == [0.5, 7.0, None]
    assert rows["problem"].to_pylist() == [None, None, "the label is not a number"]


def test_the_header_says_what_labels_are_for(read: Read) -> None:
    files = make_ts("1,2:0.5", "3:7", header="@timeStamps false\n@targetLabel true\n@data\n")
    survey, rows = read(files)
    assert (survey.layout.targets, survey.labels) == (("target",), ())
    assert rows["label"].to_pylist() == [0.5, 7.0]
    (note,) = (note for note in survey.notes if note.startswith("task"))
    assert note == "task regression - @targetLabel is true"
    survey, _ = read(files, task="classification")
    assert (survey.layout.targets, survey.labels) == ((), ("0.5", "7"))
    survey, _ = read(make_ts("1,2:0.5", "3:7"))
    assert (survey.layout.targets, survey.labels) == ((), ("0.5", "7"))
    survey, _ = read(files | {"q.ts": f"{HEADER}1:7\n".encode()})
    assert survey.layout.targets == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no line @data"),
        ("1,2:a\n", "is not a .ts file of series: it has '1,2:a'"),
        ("@timeStamps true\n@classLabel true\n@data\n(0,1):a\n", "has time stamps"),
        ("@classLabel false\n@data\n1,2\n", "has no labels"),
        (f"{HEADER}?:a\n1:2:b\n", r"2 of 2 rows under .* such as p\.ts#0: no values"),
        (f"{HEADER}1:2,3:a\n4:5,6:b\n", r"2 of 2 rows .* p\.ts#0: channels of different lengths"),
        (HEADER, "no case under"),
        (f"{HEADER}1:a\n2:a\n", "only the class 'a'"),
    ],
)
def test_files_that_cannot_be_a_data_set_are_refused(read: Read, text: str, sentence: str) -> None:
    with pytest.raises(HeliostatError, match=sentence):
        read({"p.ts": text.encode()})


def test_files_of_different_channels_are_refused(read: Read) -> None:
    files = {"a.ts": f"{HEADER}1:a\n".encode(), "b.ts": f"{HEADER}1:2:b\n".encode()}
    with pytest.raises(HeliostatError, match=r"a\.ts has 1, b\.ts has 2"):
        read(files)


@given(SERIES)
def test_requests_and_shards_give_the_same_inputs(instances: Any) -> None:
    asked = parse_instances(FEATURES, instances)
    rows = stack_series([np.array(row, np.float32).reshape(-1, 2) for row in instances])
    flat = [row.ravel() for row in rows]
    table = pa.table({"series": pa.array(flat, SeriesLayout(4, 2).fields["series"])})
    data, _, _ = write_shard(table, 3)
    stored = to_columns(FEATURES, pq.read_table(io.BytesIO(data)))
    inputs, lengths = encode(FEATURES, asked)
    for ours, theirs in zip(encode(FEATURES, stored), (inputs, lengths), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert lengths.tolist() == [len(row) for row in instances]
    assert inputs.shape == (len(instances), max(lengths), 2)
    for row, encoded in zip(instances, inputs, strict=True):
        assert not encoded[len(row) :].any()
        for step, values in zip(row, encoded, strict=False):
            expected = [
                0 if value is None else (value - mean) / std
                for value, mean, std in zip(step, FEATURES.mean, FEATURES.std, strict=True)
            ]
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_without_rows_is_one_too() -> None:
    inputs, lengths = encode(FEATURES, {"series": np.empty(0, object)})
    assert (inputs.shape, lengths.shape) == ((0, 1, 2), (0,))
    assert input_of(FEATURES) == Series(4, 2)


@given(SERIES, st.integers(0, 100))
def test_channels_are_measured_alike_however_cases_are_cut_into_shards(
    instances: Any, cut: int
) -> None:
    layout = SeriesLayout(4, 2)
    flat = [np.array(row, np.float32).ravel() for row in instances]
    rows = pa.table({"series": pa.array(flat, layout.fields["series"])})
    cut %= len(flat)
    shards = [shard for shard in (rows.slice(0, cut), rows.slice(cut)) if shard.num_rows]
    measures = [json.loads(json.dumps(measure(layout, shard))) for shard in shards]
    features, _ = settle_features(layout, measures, DataSpec(source="raw"))
    assert isinstance(features, SeriesFeatures)
    assert features_from_json(json.loads(json.dumps(features_to_json(features)))) == features
    values = np.concatenate(flat).reshape(-1, 2).astype(np.float64)
    for channel, mean, std in zip(values.T, features.mean, features.std, strict=True):
        known = channel[~np.isnan(channel)]
        assert mean == pytest.approx(known.mean() if len(known) else 0, rel=1e-9, abs=1e-6)
        constant = len(set(known)) < 2
        assert std == pytest.approx(1 if constant else known.std(), rel=1e-6)


@pytest.mark.parametrize(
    ("instance", "field"),
    [
        ([], "instances[0]"),
        ([[1, 2]] * 5, "instances[0]"),
        (7, "instances[0]"),
        ([[1, 2], [3]], "instances[0][1]"),
        ([[1, 2], 3], "instances[0][1]"),
        ([[1, 2], [3, "4"]], "instances[0][1][1]"),
        ([[1, True]], "instances[0][0][1]"),
        ([[1, 1e39]], "instances[0][0][1]"),
        ([[1, float("nan")]], "instances[0][0][1]"),
    ],
)
def test_a_value_that_cannot_be_taken_is_named(instance: object, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_instances(FEATURES, [instance])
    assert caught.value.field == field


def test_one_channel_needs_no_lists_of_one() -> None:
    features = SeriesFeatures(3, 1, (0.0,), (1.0,))
    inputs, lengths = encode(features, parse_instances(features, [[1, None, 3], [[4]]]))
    assert inputs[:, :, 0].tolist() == [[1, 0, 3], [4, 0, 0]]
    assert lengths.tolist() == [3, 1]
