"""Laws of a run's metrics: whatever is reported is JSON, or is refused by the name of its key.

Stock Ray Train ends a run for good at a NumPy scalar and stores a NaN without a word.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import HeliostatError
from heliostat.metrics import TRAINING, Sample, emit, plain

NUMBERS = st.booleans() | st.integers(-(2**100), 2**100) | st.floats(width=32)
SCALARS = st.one_of(
    NUMBERS,
    st.floats(),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.integers(0, 255).map(np.uint8),
    st.floats(width=32).map(torch.tensor),
    st.integers(-(2**63), 2**63 - 1).map(torch.tensor),
)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])
OTHERS = NOT_FINITE | st.none() | st.lists(NUMBERS) | st.sets(NUMBERS) | st.complex_numbers()


@given(st.dictionaries(st.text(), SCALARS))
def test_finite_scalars_of_any_library_become_floats_and_json(metrics: dict[str, Any]) -> None:
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    told = plain(finite)
    assert told == {key: float(value) for key, value in finite.items()}
    assert {type(number) for number in told.values()} <= {float}
    assert json.loads(json.dumps(told, allow_nan=False)) == told


@given(st.text(), SCALARS | OTHERS)
def test_anything_is_json_or_refused_by_its_key(key: str, value: Any) -> None:
    try:
        told = json.dumps(plain({key: value}), allow_nan=False)
    except HeliostatError as error:
        told = str(error)
    assert told.startswith(("{", f"metric {key!r} is "))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (np.float32(0.5), 0.5),
        (np.array(0.25), 0.25),
        (torch.tensor(1.5), 1.5),
        (torch.tensor(2, dtype=torch.bfloat16), 2.0),
        (3, 3.0),
        (True, 1.0),
    ],
)
def test_a_scalar_is_taken(value: Any, number: float) -> None:
    (told,) = plain({"loss": value}).values()
    assert (type(told), told) == (float, number)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({0.5}, "is a set, it must be one number"),
        ("high", "is a str, it must be one number"),
        ([0.5], "is a list, it must be one number"),
        (None, "is a NoneType, it must be one number"),
        (torch.ones((), device="meta"), "is a Tensor, it must be one number"),
        (torch.ones(2), "is a Tensor, it must be one number"),
        (np.ones(2), "is a ndarray, it must be one number"),
        (math.nan, "is nan, it must be finite"),
        (np.float32("nan"), "is nan, it must be finite"),
        (torch.tensor(math.inf), "is inf, it must be finite"),
        (-math.inf, "is -inf, it must be finite"),
    ],
)
def test_anything_but_one_finite_number_is_refused(value: Any, said: str) -> None:
    with pytest.raises(HeliostatError, match=re.escape(f"metric 'val/loss' {said}")):
        plain({"accuracy": 1.0, "val/loss": value})


@pytest.mark.parametrize(
    "value", ["0.5", "nan", b"1", 10**400], ids=["text", "nan", "bytes", "big"]
)
def test_text_of_a_number_and_a_number_beyond_floats_are_refused(value: Any) -> None:
    with pytest.raises(HeliostatError, match="metric 'loss' is a"):
        plain({"loss": value})


# --- The table -----------------------------------------------------------------------------------


def collect(values: dict[str, Any]) -> list[Sample]:
    told: list[Sample] = []
    emit(7, values, [lambda step, samples: told.extend(samples)])
    return told


@pytest.mark.parametrize("name", TRAINING)
def test_a_metric_is_found_by_its_name(name: str) -> None:
    metric = TRAINING[name]
    key = f"{name}/some" if metric.label else name
    assert collect({key: 2}) == [Sample(key, metric, "some" if metric.label else None, 2.0)]


@pytest.mark.parametrize("name", TRAINING)
def test_prometheus_takes_every_name_and_label(name: str) -> None:
    metric = TRAINING[name]
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.scraped)
    assert metric.label is None or re.fullmatch(r"[a-z]+", metric.label)
    assert metric.help == metric.help.strip()
    assert metric.help


@pytest.mark.parametrize("key", ["accuracy", "top/5", "loss/other", "goodput", "goodput/"])
def test_what_the_table_does_not_name_is_a_score_of_the_task(key: str) -> None:
    assert collect({key: 1}) == [Sample(key, TRAINING["score"], key, 1.0)]


@given(st.dictionaries(st.text(), SCALARS | OTHERS))
def test_every_sink_gets_all_values_or_none_does(values: dict[str, Any]) -> None:
    told: list[tuple[int, Sequence[Sample]]] = []
    sinks = [lambda step, samples: told.append((step, samples))] * 2
    try:
        emit(7, values, sinks)
    except HeliostatError:
        assert told == []
    else:
        assert told == [(7, told[0][1])] * 2
        assert {sample.key: sample.value for sample in told[0][1]} == plain(values)
        assert all((sample.at is None) == (sample.metric.label is None) for sample in told[0][1])
