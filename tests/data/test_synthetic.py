"""Made-up tables: a pure function of the spec, learnable, and written once."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heliostat.data import synthetic
from heliostat.data.synthetic import make_rows, make_teacher, synthesize
from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec, SyntheticSpec
from heliostat.storage import connect

WIDE = SyntheticSpec(rows=6000, inputs=30, outputs=3)


def make_data(source: Path, **section: object) -> DataSpec:
    named = {"task": "regression", "label": ["y0", "y1", "y2"], "synthetic": WIDE}
    return DataSpec(source=str(source), **named | section)  # type: ignore[arg-type]


def to_array(table: pa.Table, letter: str) -> np.ndarray:
    names = [name for name in table.column_names if name.startswith(letter)]
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def test_rows_are_what_the_teacher_says_and_noise() -> None:
    table = make_rows(WIDE, 0, is_class=False)
    x, y = to_array(table, "x"), to_array(table, "y")
    assert x.shape == (synthetic.ROWS_PER_OBJECT, 30)
    assert x.dtype == np.float32
    assert table.column_names[:2] == ["x000", "x001"]
    assert (x.mean(), x.std()) == pytest.approx((0, 1), abs=0.01)
    teacher = make_teacher(WIDE)
    noise = y - np.tanh(x @ teacher.first) @ teacher.second
    assert noise.std() == pytest.approx(WIDE.noise, rel=0.05)
    assert y.std() > 4 * noise.std()
    classes = make_rows(WIDE, 0, is_class=True)
    assert to_array(classes, "y")[:, 0].tolist() == (y[:, 0] > 0).tolist()
    assert 0.4 < to_array(classes, "y").mean() < 0.6


def test_parts_and_seeds_differ_and_stay_what_they_are() -> None:
    assert make_rows(WIDE, 1, is_class=False).num_rows == 6000 - synthetic.ROWS_PER_OBJECT
    again = SyntheticSpec(**WIDE.model_dump())
    assert make_rows(again, 1, is_class=False) == make_rows(WIDE, 1, is_class=False)
    other = SyntheticSpec(rows=6000, inputs=30, outputs=3, seed=1)
    first = to_array(make_rows(WIDE, 0, is_class=False), "x")
    for table in (make_rows(WIDE, 1, is_class=False), make_rows(other, 0, is_class=False)):
        assert (to_array(table, "x") != first[: table.num_rows]).all(axis=1).all()


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    keys = synthesize(data)
    assert len(keys) == 2
    store = connect(str(tmp_path))
    whole = pa.concat_tables(pq.read_table(io.BytesIO(store.read(key))) for key in keys)
    assert whole.num_rows == WIDE.rows
    before = list(store.list())
    assert synthesize(data) == []
    assert list(store.list()) == before
    store.delete(keys[1])
    assert synthesize(data) == keys[1:]
    assert [entry.key for entry in store.list()] == [entry.key for entry in before]


@pytest.mark.parametrize(
    "section",
    [
        {"synthetic": SyntheticSpec(rows=6000, inputs=30, outputs=3, seed=1)},
        {"task": "classification", "label": "y0"},
    ],
)
def test_rows_of_two_kinds_never_mix(tmp_path: Path, section: dict[str, object]) -> None:
    synthesize(make_data(tmp_path))
    with pytest.raises(HeliostatError, match="choose another data"):
        synthesize(make_data(tmp_path, **section))


def test_a_spec_without_the_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HeliostatError, match=r"data\.synthetic is missing"):
        synthesize(make_data(tmp_path, synthetic=None))
