"""Id columns: every value of the training split has a number, all others share 0."""

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

from heliostat.data import measure as measuring
from heliostat.data.encoding import encode
from heliostat.data.features import (
    IdColumn,
    NumericColumn,
    TableFeatures,
    features_from_json,
    features_to_json,
    input_of,
)
from heliostat.data.instances import FieldError, parse_instances
from heliostat.data.measure import measure, settle_features
from heliostat.data.raw import TableLayout
from heliostat.data.shards import to_columns
from heliostat.errors import HeliostatError
from heliostat.signature import Interaction
from heliostat.spec import DataSpec

Read = Callable[..., Any]
LAYOUT = TableLayout(("y",), {"user": "id"})
FEATURES = TableFeatures(
    (
        IdColumn("user", ("5", "10", "anna")),
        NumericColumn("age", 40.0, 10.0, has_missing=True),
        IdColumn("item", ("x",)),
    )
)


def id_rows(*ids: str | None) -> pa.Table:
    return pa.table({"x.user": pa.array(ids, pa.string())})


def settle(*shards: pa.Table) -> IdColumn:
    measures = [json.loads(json.dumps(measure(LAYOUT, shard))) for shard in shards]
    features, notes = settle_features(LAYOUT, measures, DataSpec(source="raw", max_categories=1))
    assert not notes
    assert isinstance(features, TableFeatures)
    (column,) = features.columns
    assert isinstance(column, IdColumn)
    return column


@given(st.lists(st.none() | st.text(max_size=3), min_size=1).filter(any), st.integers(0, 100))
def test_every_id_of_training_has_a_number_of_its_own(ids: list[str | None], cut: int) -> None:
    column = settle(id_rows(*ids))
    assert settle(id_rows(*ids[: cut % len(ids)]), id_rows(*ids[cut % len(ids) :])) == column
    features = TableFeatures((column,))
    numbers, others = encode(features, to_columns(features, id_rows(*ids)))
    assert others.shape == (len(ids), 0)
    assert [column.values[number - 1] if number else None for number in numbers[:, 0]] == ids
    unseen, _ = encode(features, to_columns(features, id_rows("never seen", None)))
    assert unseen.tolist() == [[0], [0]]
    assert input_of(features) == Interaction((len(set(ids) - {None}) + 1,), 0)


def test_ids_are_in_the_order_of_their_numbers_if_all_are_numbers() -> None:
    assert settle(id_rows("10", "9", "-1", "9")).values == ("-1", "9", "10")
    assert settle(id_rows("10", "9", "b", "a")).values == ("10", "9", "a", "b")


def test_one_id_is_one_however_it_is_written(read: Read) -> None:
    file = io.BytesIO()
    columns = {"f": [5.0, None], "i": [5, 6], "s": [" 5", "6.0"], "y": [1.0, 2.0]}
    pq.write_table(pa.table(columns), file)
    kinds = dict.fromkeys("fis", "id")
    section = {"label": "y", "task": "regression", "columns": kinds}
    survey, rows = read({"t.parquet": file.getvalue()}, **section)
    assert survey.layout.kinds == kinds
    assert rows.select(["x.f", "x.i", "x.s"]).to_pylist() == [
        {"x.f": "5", "x.i": "5", "x.s": "5"},
        {"x.f": None, "x.i": "6", "x.s": "6"},
    ]
    _, lines = read({"t.csv": b"f,i,s,y\n5.0,5, 5 ,1\n,6,6.00,2\n"}, **section)
    assert lines.drop_columns(["id", "object"]) == rows.drop_columns(["id", "object"])
    assert not any(rows["problem"].to_pylist())


@pytest.mark.parametrize("user", [5, 5.0, "5", " 5.0 "])
def test_a_request_may_give_an_id_as_a_text_or_a_number(user: object) -> None:
    numbers, others = encode(FEATURES, parse_instances(FEATURES, [{"user": user, "age": 50}]))
    assert numbers.dtype == np.int64
    assert numbers.tolist() == [[1, 0]]
    assert others.tolist() == [[1, 0]]


@given(st.floats(-1e100, 1e100) | st.integers(-(10**100), 10**100))
def test_a_number_and_its_text_are_one_id(number: float) -> None:
    as_number = parse_instances(FEATURES, [{"user": number}])["x.user"][0]
    assert type(number)(as_number) == number
    assert parse_instances(FEATURES, [{"user": as_number}])["x.user"][0] == as_number


@pytest.mark.parametrize("user", [True, ["5"], {"id": 5}, float("nan"), 10**500])
def test_what_is_no_id_is_refused_by_its_field(user: object) -> None:
    with pytest.raises(FieldError) as caught:
        parse_instances(FEATURES, [{"user": 5}, {"user": user}])
    assert caught.value.field == "instances[1].user"


def test_id_columns_survive_json() -> None:
    assert features_from_json(json.loads(json.dumps(features_to_json(FEATURES)))) == FEATURES
    assert input_of(FEATURES) == Interaction((4, 2), 2)


def test_more_ids_than_embeddings_can_be_made_of_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "MAX_IDS", 3)
    assert len(settle(id_rows("a", "b"), id_rows("b", "c")).values) == 3
    for shards in ([id_rows("a", "b"), id_rows("c", "d")], [id_rows(*"abcd")]):
        with pytest.raises(HeliostatError, match="id column user has more than 3 values"):
            settle(*shards)


def test_an_id_column_without_a_value_is_dropped(read: Read) -> None:
    survey, rows = read(
        {"t.csv": b"u,a,y\n,1,1\n,2,2\n"}, label="y", task="regression", columns={"u": "id"}
    )
    features, notes = settle_features(
        survey.layout, [measure(survey.layout, rows)], DataSpec(source="raw")
    )
    assert notes == ["column u is dropped: it has no value in the training rows"]
    assert [column.name for column in features.columns] == ["a"]  # type: ignore[union-attr]
