"""The rows that a version is known by: the same answers pass, others do not."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from heliostat import examples
from heliostat.data.shards import pack_rows
from heliostat.errors import HeliostatError
from heliostat.storage import Store, connect
from serving import TABLE, serve

SERVED = serve("people", TABLE)
ROWS = pa.table(
    {"numbers": pack_rows(np.array([[41.0], [np.nan]])), "x.job": pa.array(["cook", None])}
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = connect(str(tmp_path))
    examples.record(store, SERVED.version, SERVED.predictor, ROWS)
    return store


def test_the_same_network_passes_and_says_how_long_a_row_takes(store: Store) -> None:
    seconds = examples.check(store, SERVED.version, SERVED.predictor)
    assert seconds is not None
    assert seconds > 0


def test_another_network_is_refused(store: Store) -> None:
    other = serve("people", TABLE).predictor
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.raises(HeliostatError, match=r"otherwise than when it was published \(by up to 0"):
        examples.check(store, SERVED.version, other)


def test_a_version_without_examples_passes(tmp_path: Path) -> None:
    assert examples.check(connect(str(tmp_path)), SERVED.version, SERVED.predictor) is None


def test_damaged_examples_are_a_sentence(store: Store) -> None:
    store.write("models/people/examples/3.parquet", b"PAR1")
    with pytest.raises(HeliostatError, match="is damaged: delete the object"):
        examples.check(store, SERVED.version, SERVED.predictor)
