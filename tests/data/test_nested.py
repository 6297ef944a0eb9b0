"""Nested lists of numbers: read whole and exactly, or not at all."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.data.nested import NUMBERS_OR_NULL, WHOLE, read_numbers, scan_numbers

numbers = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False))
NAN = float("nan")
anything = st.recursive(
    st.one_of(numbers, st.booleans(), st.none(), st.text(max_size=2), st.integers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=1), inner, max_size=2)
    ),
    max_leaves=12,
)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in leaves(part)] if type(value) is list else [value]


@given(values=anything)
def test_what_is_read_has_every_number_and_nothing_else(values: Any) -> None:
    found = read_numbers(values)
    if found is not None:
        assert found.tolist() == values
        assert {type(leaf) for leaf in leaves(values)} <= {int, float}


@given(shape=shapes, data=st.data())
def test_lists_of_equal_lengths_are_read(shape: list[int], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    flat = data.draw(st.lists(numbers, min_size=size, max_size=size))
    values = np.array(flat, object).reshape(shape).tolist()
    found = read_numbers(values)
    assert found is not None
    assert list(found.shape) == shape
    assert found.ravel().tolist() == flat


@pytest.mark.parametrize(
    "values",
    [
        [NAN],
        [[1.0], [NAN]],
        [True],
        [[1], [2, 3]],
        [[1], 2],
        [10**400],
        ["1"],
        [{}],
        "12",
        7,
        None,
        [None],
    ],
)
def test_what_is_no_list_of_numbers_is_not_read(values: Any) -> None:
    assert read_numbers(values) is None


def test_lists_in_lists_without_end_are_not_read() -> None:
    values: Any = [1.0]
    for _ in range(100):
        values = [values]
    assert read_numbers(values) is None


def test_null_is_nan_and_whole_numbers_keep_all_their_digits() -> None:
    found = read_numbers([[1, None]], NUMBERS_OR_NULL)
    assert found is not None
    assert np.array_equal(found, [[1, np.nan]], equal_nan=True)
    exact = read_numbers([2**63 - 1], WHOLE, np.int64)
    assert exact is not None
    assert exact.tolist() == [2**63 - 1]
    assert read_numbers([256], WHOLE, np.uint8) is None
    assert read_numbers([1.0], WHOLE, np.uint8) is None


@given(shape=shapes, data=st.data())
def test_what_is_scanned_has_every_number_and_nothing_else(
    shape: list[int], data: st.DataObject
) -> None:
    rows = data.draw(st.integers(1, 3))
    size = rows * int(np.prod(shape))
    flat = data.draw(st.lists(numbers.filter(np.isfinite), min_size=size, max_size=size))
    values = np.array(flat, object).reshape(rows, *shape).tolist()
    indent = data.draw(st.sampled_from([None, 1]))
    assert scan_numbers(json.dumps(values, indent=indent).encode(), tuple(shape)) == flat


TEXT = b"[[[1, -2.5e3],\n [30,4]]]"
PARTS = [b"", b"[", b"]", b",", b" ", b"1", b".", b"-", b"e", b"[]", b"null", b"NaN", b'"', b"0"]


@given(at=st.integers(0, len(TEXT)), cut=st.integers(0, 3), put=st.lists(st.sampled_from(PARTS)))
def test_a_text_that_is_damaged_is_scanned_as_json_says_or_not_at_all(
    at: int, cut: int, put: list[bytes]
) -> None:
    text = TEXT[:at] + b"".join(put) + TEXT[at + cut :]
    found = scan_numbers(text, (2, 2))
    if found is not None:
        assert np.array(json.loads(text)).reshape(-1, 2, 2).ravel().tolist() == found
        assert np.array(json.loads(text)).shape[1:] == (2, 2)
