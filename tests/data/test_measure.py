"""Statistics: the same whichever way the rows are cut into shards."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from heliostat.data.encoding import encode
from heliostat.data.features import (
    CategoryColumn,
    Features,
    ImageFeatures,
    NumericColumn,
    TableFeatures,
)
from heliostat.data.measure import measure, settle_features
from heliostat.data.raw import ImageLayout, Layout, TableLayout
from heliostat.data.shards import pack_rows, to_columns
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec

DATA = DataSpec(source="raw", max_categories=2)
IMAGES = ImageLayout(2, 1, 3)
NUMBERS = TableLayout("y", {"n": "numeric"})
TEXTS = TableLayout("y", {"c": "category"})
CUTS = st.integers(0, 1000)


def settle(layout: Layout, *shards: pa.Table) -> tuple[Features, list[str]]:
    measures = [json.loads(json.dumps(measure(layout, shard))) for shard in shards]
    return settle_features(layout, measures, DATA)


def image_rows(images: list[bytes]) -> pa.Table:
    return pa.table({"image": pa.array(images, pa.binary(6))})


def text_rows(*texts: str | None) -> pa.Table:
    return pa.table({"x.c": pa.array(texts, pa.string())})


def number_rows(*numbers: float | None) -> pa.Table:
    return pa.table({"numbers": pack_rows(np.array(numbers, np.float64)[:, None])})


@given(st.lists(st.binary(min_size=6, max_size=6), min_size=2), CUTS)
def test_pixels_are_measured_exactly(images: list[bytes], cut: int) -> None:
    cut = 1 + cut % (len(images) - 1)
    features, _ = settle(IMAGES, image_rows(images))
    assert settle(IMAGES, image_rows(images[:cut]), image_rows(images[cut:]))[0] == features
    assert isinstance(features, ImageFeatures)
    pixels = np.frombuffer(b"".join(images), np.uint8).reshape(-1, 3) / 255
    np.testing.assert_allclose(features.mean, pixels.mean(axis=0))
    deviations = pixels.std(axis=0)
    np.testing.assert_allclose(features.std, np.where(deviations < 1e-9, 1, deviations))
    (inputs,) = encode(features, to_columns(features, image_rows(images)))
    np.testing.assert_allclose(inputs.mean(axis=(0, 2, 3)), 0, atol=1e-4)


@example([170.844] * 3, 0)
@given(st.lists(st.none() | st.floats(-1e9, 1e9).map(lambda x: round(x, 3)), min_size=2), CUTS)
def test_numbers_become_mean_0_and_deviation_1(numbers: list[float | None], cut: int) -> None:
    rows = number_rows(*numbers)
    cut %= len(numbers)
    known = [number for number in numbers if number is not None]
    if not known:
        with pytest.raises(HeliostatError, match="column n is dropped: it has no value"):
            settle(NUMBERS, rows)
        return
    features, notes = settle(NUMBERS, rows.slice(0, cut), rows.slice(cut))
    assert isinstance(features, TableFeatures)
    column = features.columns[0]
    assert isinstance(column, NumericColumn)
    assert column.mean == pytest.approx(np.mean(known), rel=1e-9, abs=1e-6)
    assert column.has_missing == (None in numbers)
    constant = len(set(known)) == 1
    assert any("has only the value" in note for note in notes) == constant
    inputs = encode(features, to_columns(features, rows))[0][:, 0]
    assert column.std == pytest.approx(1 if constant else np.std(known), rel=1e-6)
    assert abs(inputs).max() == 0 if constant else inputs.any()


def test_the_most_frequent_texts_are_kept_and_the_rest_share_an_input() -> None:
    features, notes = settle(TEXTS, text_rows("b", "a", "z", None), text_rows("b", "a", "c", "b"))
    assert features == TableFeatures((CategoryColumn("c", ("a", "b")),))
    assert notes == [
        "column c: 2 rarer values share one input, as data.max_categories is 2",
    ]
    columns = {"x.c": np.array(["c", "b", None], dtype=object)}
    assert encode(features, columns)[0].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_a_column_that_says_nothing_is_dropped() -> None:
    layout = TableLayout("y", {"c": "category", "n": "numeric"})
    rows = text_rows("ann", "bob").append_column("numbers", number_rows(1.0, 2.0)["numbers"])
    features, notes = settle(layout, rows)
    assert [column.name for column in features.columns] == ["n"]  # type: ignore[union-attr]
    assert notes == ["column c is dropped: no value occurs twice in the training rows"]
