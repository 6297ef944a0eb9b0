"""Made-up wide tables: numbers drawn from a seed, and what a fixed random network says of them.

Inputs are standard normal. The teacher is a network of two layers, y = tanh(x W1) W2, with W1 drawn
from N(0, 1 / inputs) and W2 from N(0, 1 / HIDDEN), so that every y has a deviation of about 0.6;
`noise` times a standard normal is added to it. A regression learns y0, y1, ...; for classes, y0 is
1 where the first of them is positive and 0 elsewhere.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from heliostat.errors import HeliostatError
from heliostat.spec import DataSpec, SyntheticSpec, digest
from heliostat.storage import Store, connect

HIDDEN = 16
ROWS_PER_OBJECT = 4096


@dataclass(frozen=True)
class Teacher:
    """`first` (inputs, HIDDEN) and `second` (HIDDEN, outputs)."""

    first: NDArray[np.float64]
    second: NDArray[np.float64]


def synthesize(data: DataSpec) -> list[str]:
    """Write the rows of `data.synthetic` below `data.source`; the keys that were not there before.

    Raises:
        HeliostatError: there is no such section, or other objects lie there already.
    """
    if data.synthetic is None:
        raise HeliostatError(
            "data.synthetic is missing: it says how many rows to make, and of what"
        )
    is_class = data.task != "regression"
    store = connect(data.source)
    keys = _name_objects(data.synthetic, is_class)
    known = {entry.key for entry in store.list()}
    if foreign := known - set(keys):
        raise HeliostatError(
            f"{store.uri} holds {min(foreign)}, which is not of this data.synthetic: "
            "choose another data.source"
        )
    missing = [key for key in keys if key not in known]
    for part, key in enumerate(keys):
        if key in missing:
            _write(store, key, make_rows(data.synthetic, part, is_class))
    return missing


def make_rows(spec: SyntheticSpec, part: int, is_class: bool) -> pa.Table:
    """The rows of object number `part`: columns x000, ... of float32, then y0, ..."""
    teacher = make_teacher(spec)
    count = min(ROWS_PER_OBJECT, spec.rows - part * ROWS_PER_OBJECT)
    draw = _generator(spec.seed, "rows", part)
    x = draw.standard_normal((count, spec.inputs), dtype=np.float32)
    y = np.tanh(x.astype(np.float64) @ teacher.first) @ teacher.second
    y += spec.noise * draw.standard_normal(y.shape)
    digits = max(3, len(str(spec.inputs - 1)))
    inputs = {f"x{index:0{digits}}": column for index, column in enumerate(x.T)}
    if is_class:
        return pa.table({**inputs, "y0": (y[:, 0] > 0).astype(np.int8)})
    outputs = {f"y{index}": column for index, column in enumerate(y.T.astype(np.float32))}
    return pa.table({**inputs, **outputs})


def make_teacher(spec: SyntheticSpec) -> Teacher:
    """The same for every part."""
    draw = _generator(spec.seed, "teacher", 0)
    return Teacher(
        draw.standard_normal((spec.inputs, HIDDEN)) / np.sqrt(spec.inputs),
        draw.standard_normal((HIDDEN, spec.outputs)) / np.sqrt(HIDDEN),
    )


def _generator(seed: int, what: str, part: int) -> np.random.Generator:
    hashed = hashlib.sha256(f"{seed}:{what}:{part}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashed[:16], "big")))


def _name_objects(spec: SyntheticSpec, is_class: bool) -> list[str]:
    """Names that tell what is in them, so that two kinds of rows never mix."""
    made_of = digest([spec.model_dump(mode="json"), is_class])[:8]
    objects = -(-spec.rows // ROWS_PER_OBJECT)
    return [f"{made_of}-{part:04d}-of-{objects:04d}.parquet" for part in range(objects)]


def _write(store: Store, key: str, rows: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(rows, file, compression="zstd", use_dictionary=False, write_statistics=False)
    store.write(key, file.getvalue())
