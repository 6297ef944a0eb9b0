"""Rows with what a version said of them when it was published: what a deploy checks first."""

import io
import statistics
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heliostat.data.features import BlockFeatures
from heliostat.data.shards import to_columns
from heliostat.errors import HeliostatError
from heliostat.evaluate import Columns, Predictor, predict, score
from heliostat.registry import Version
from heliostat.storage import Missing, Store

EXPECTED = "expected"
MAX_EXAMPLES = 8
TIMES = 5  # that one row is computed, to tell how long it takes
RTOL, ATOL = 1e-3, 1e-4  # other processors and thread counts sum in another order


def record(store: Store, version: Version, predictor: Predictor, rows: pa.Table) -> None:
    """Keep MAX_EXAMPLES of `rows`, as the shards store them, with what it says of them."""
    rows = rows.slice(0, MAX_EXAMPLES)
    expected = _answer(predictor, to_columns(predictor.features, rows))
    column = pa.array(list(expected), pa.list_(pa.float32()))
    sink = io.BytesIO()
    pq.write_table(rows.append_column(EXPECTED, column), sink)
    store.write(_key(version), sink.getvalue())


def check(store: Store, version: Version, predictor: Predictor) -> float | None:
    """Let `predictor` answer the examples of `version`; the seconds that a row takes.

    None if the version has no examples.

    Raises:
        HeliostatError: it answers otherwise than when it was published.
    """
    rows, expected = read(store, version)
    if rows is None:
        return None
    compare(version, _answer(predictor, to_columns(predictor.features, rows)), expected)
    return _time(predictor, to_columns(predictor.features, rows.slice(0, 1)))


def read(store: Store, version: Version) -> tuple[pa.Table | None, NDArray[np.float32]]:
    """The rows of the examples and the answers (rows, values) expected; None if there are none.

    Raises:
        HeliostatError: they are damaged.
    """
    try:
        rows = pq.read_table(io.BytesIO(store.read(_key(version))))
    except Missing:
        return None, np.empty((0, 0), np.float32)
    except (pa.ArrowException, OSError) as error:
        raise HeliostatError(
            f"{store.uri}/{_key(version)}, the examples of {version.ref}, is damaged: delete the "
            "object to deploy without them"
        ) from error
    return rows.drop_columns([EXPECTED]), np.array(rows[EXPECTED].to_pylist(), np.float32)


def compare(
    version: Version,
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    rtol: float = RTOL,
) -> None:
    """Raises HeliostatError: what was found is not what was expected."""
    if found.shape != expected.shape or not np.allclose(found, expected, rtol, ATOL):
        differs = "in shape" if found.shape != expected.shape else _say(found, expected)
        raise HeliostatError(
            f"{version.ref} answers its examples otherwise than when it was published ({differs}): "
            "deploy another version"
        )


def _answer(predictor: Predictor, columns: Columns) -> NDArray[np.float32]:
    """What it says of each row; of a language model, what it makes of the blocks together."""
    if isinstance(predictor.features, BlockFeatures):
        loss = score(predictor, [columns]).metrics["loss"]
        return np.array([[loss]] * len(next(iter(columns.values()))), np.float32)
    return predict(predictor, columns)


def _time(predictor: Predictor, columns: Columns) -> float:
    """The median of TIMES."""
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        _answer(predictor, columns)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _say(found: NDArray[np.float32], expected: NDArray[np.float32]) -> str:
    return f"by up to {np.abs(found - expected).max():.3g}"


def _key(version: Version) -> str:
    return f"models/{version.name}/examples/{version.number}.parquet"
